# Two commands on a fresh machine (Python 3.11 or newer, make, a C compiler with Python's headers):
#
#   make demo     watch ranks change under traffic
#   make test     everything that is tested
#
# and while working: make test-fast, some two minutes without what takes long.
#
# Each makes .venv and installs what it needs; the second call starts at once.
#
# On Linux the package index gives torch with CUDA, some gigabytes. For the CPU build name PyTorch's
# CPU index, whose address its own installation page shows:
#
#   make demo PIP_FLAGS="--extra-index-url <PyTorch's CPU index>"

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$p && break; done)
PIP_FLAGS ?=
DEMO_FLAGS ?=
TEST_FLAGS ?=
TEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_FLAGS)

# what an editable install compiles or reads; Python files of the package are used in place
BUILT := pyproject.toml setup.py $(shell find src -name '*.c' -not -name '_*' -o -name 'build_*.py')

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-gpu bench-gpu clients docs lint format clean python

help:
	@echo "make demo | test | test-fast | test-gpu | bench-gpu | clients | docs | lint | format | clean"

demo: $(VENV)/.installed
	@$(BIN)/flexpert demo $(DEMO_FLAGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 30 --durations-min 10 $(TEST_FLAGS)

test-fast: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(TEST_FLAGS)

# programs that tests/clients runs against a service; without them those tests are skipped
clients: .venv-clients/.installed

.venv-clients/.installed: tests/clients/requirements.txt | python
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip --disable-pip-version-check install $(PIP_FLAGS) -r $<
	@touch $@

# on a machine with NVIDIA GPUs, with the Python that has torch for CUDA: make test-gpu PYTHON=python3
test-gpu:
	@PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest tests/gpu tests/comm/test_cuda_processes.py \
		tests/comm/test_nixl_ep_graph.py tests/comm/test_nixl_ep_elastic.py tests/comm/test_forwarder.py $(TEST_FLAGS)

bench-gpu:
	@PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} PYTHON=$(PYTHON) bash tools/gpu/bench.sh

# the documentation as a site, in build/site
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	find src \( -name '*.egg-info' -o -name '*.so' -o -name '*.o' -o -name '_kernels.c' -o -name '_ops.c' \) -exec rm -rf {} +

python:
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or newer found; name one: make demo PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11, or does not run" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) has no venv; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("include"), "Python.h").stat()' \
		2>/dev/null || { \
		echo "error: Python.h is missing; on Debian: apt install python3-dev" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { \
		echo "error: no C compiler; on Debian: apt install gcc libc6-dev" >&2; exit 1; }

$(BIN)/python: | python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BUILT) | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(BUILT) | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed
