"""A fork server imports less of torch and transformers; what is left out comes when asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexpert.cluster.processes import lean_imports
from flexpert.cluster.processes.lean_imports import WHOLE, DeferredModule

LEFT_OUT = (
    "huggingface_hub.hf_api",
    "sympy",
    "torch._dynamo",
    "torch._meta_registrations",
    "torch.distributions",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.nn.quantized",
    "torch.utils.data",
)

PROGRAM = f"""
import sys, torch
from flexpert.cluster.processes.lean_imports import _ON_NUMBERS, DeferredModule
assert all(isinstance(sys.modules[name], DeferredModule) for name in {LEFT_OUT!r})
assert "torch.distributed.tensor" not in sys.modules
shapes = sys.modules["torch.fx.experimental.symbolic_shapes"]
plain = {{name: getattr(shapes, name) for name in _ON_NUMBERS}}
import sympy
assert sympy.Symbol("x").is_Symbol
from torch.fx.experimental import symbolic_shapes as real
assert real.ShapeEnv and not isinstance(
    sys.modules["torch.fx.experimental.symbolic_shapes"], DeferredModule)
cases = {{"sym_eq": [(3, 3), ([1, 2], (1, 2)), ((1,), (1, 2))], "guard_int": [(3,)],
    "sym_and": [(True, False), (True,)], "sym_or": [(True, False), (False, False)],
    "is_nested_int": [(3,)], "has_guarding_hint": [(3,)],
    "guarding_hint_or_throw": [(3,), (True,)]}}
for name, function in plain.items():
    for arguments in cases.get(name, [(True,), (False,)]):
        assert function(*arguments) == getattr(real, name)(*arguments), (name, arguments)
assert torch.Generator().manual_seed(3).initial_seed() == 3
assert torch.nn.quantized.dynamic and torch.utils.data.Dataset
assert torch.distributions.constraints.positive.check(torch.ones(1)).all()
from torch.distributions.categorical import Categorical
assert Categorical(torch.ones(2)).sample().shape == ()
from huggingface_hub import HfApi, snapshot_download
assert HfApi().endpoint and HfApi is not sys.modules["huggingface_hub.hf_api"].HfApi
from flexpert.models.meta_kernels import with_meta_kernels
weights, ids = torch.empty(3, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
find = lambda: torch.nn.functional.embedding(ids, weights)
try:
    find()
    raise AssertionError("nothing is left out of torch's kernels")
except NotImplementedError:
    assert with_meta_kernels(find).shape == (2, 4)
find()
from torch._dynamo.utils import counters
assert not isinstance(torch._dynamo, DeferredModule)
assert "torch._dynamo.eval_frame" in sys.modules
"""


@pytest.mark.slow
def test_nothing_is_left_out_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WHOLE, "1")
    program = (
        "import sys\n"
        "from flexpert.cluster.processes.model_opening import import_all\n"
        "import_all()\n"
        "import torch._dynamo\n"
        "assert type(torch._dynamo).__name__ == 'module', type(torch._dynamo)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


@pytest.mark.slow
def test_what_is_left_out_is_there_when_it_is_asked_for() -> None:
    opened = (
        "from flexpert.cluster.processes.model_opening import open_model\n"
        "from flexpert.config import Config\n"
        "source = open_model(Config().model_dump_json().encode())\n"
        "assert source.info.experts == 16\n"
    )
    subprocess.run([sys.executable, "-c", opened + PROGRAM], check=True, timeout=100)


def test_a_module_that_stands_in_has_its_stand_ins_and_then_all_of_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "deferred_example").mkdir()
    (tmp_path / "deferred_example" / "__init__.py").write_text("one, two = 1, 2")
    (tmp_path / "deferred_example" / "inner.py").write_text("three = 3")
    monkeypatch.syspath_prepend(tmp_path)
    module = DeferredModule("deferred_example", {"one": "stand-in"}, package=True)
    monkeypatch.setitem(sys.modules, "deferred_example", module)
    import deferred_example  # type: ignore[import-not-found]

    assert deferred_example.one == "stand-in"
    assert sys.modules["deferred_example"] is module
    assert deferred_example.two == 2
    assert sys.modules["deferred_example"].one == 1
    monkeypatch.setitem(sys.modules, "deferred_example", module)
    from deferred_example.inner import three  # type: ignore[import-not-found]

    assert three == 3
    assert sys.modules["deferred_example"].one == 1


def test_names_are_read_from_a_file_until_a_model_is_added(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = tmp_path / "models"
    (models / "one").mkdir(parents=True)
    made = []

    def define(path: str) -> lean_imports.Structure:
        made.append(path)
        return {frozenset(): {"one.config": {"A", "B"}}, frozenset({"torch"}): {"one.model": {"C"}}}

    first = lean_imports._structure(models, "5.0", define)
    assert lean_imports._structure(models, "5.0", define) == first
    assert len(made) == 1
    lean_imports._structure(models, "5.1", define)
    (models / "two").mkdir()
    lean_imports._structure(models, "5.1", define)
    assert len(made) == 3
    (stored,) = (tmp_path / "cache" / "flexpert" / "transformers").iterdir()
    assert stored.stat().st_mode & 0o077 == 0
    stored.write_bytes(b"nonsense")
    assert lean_imports._structure(models, "5.1", define) == first
    os.chmod(stored.parent, 0o777)  # whoever can write there could say anything
    lean_imports._structure(models, "5.1", define)
    assert len(made) == 5
