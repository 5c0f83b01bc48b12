"""Compiles the C files of this folder into flexpert.comm.host._kernels (cffi, API mode).

pip runs this through setup.py. For development: `python src/flexpert/comm/host/build_kernels.py`
builds next to the sources.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
NAMES = ("kernels.c", "native.c", "quant.c", "liveness.c")
SOURCES = [(HERE / name).read_text(encoding="utf-8") for name in NAMES]


def declarations(source: str) -> str:
    """What Python sees stands between two marks in the C file, so that it is said only once."""
    found = re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", source, re.DOTALL)
    if found is None:
        raise ValueError("a C file has lost its cdef marks")
    return found.group(1)


def compiled(source: str) -> str:
    """The file as a C compiler takes it: what Python implements is declared apart."""
    return re.sub(r'^extern "Python" .*\n', "", source, flags=re.MULTILINE)


ffibuilder = FFI()
for source in SOURCES:
    ffibuilder.cdef(declarations(source))
ffibuilder.set_source(
    "flexpert.comm.host._kernels",
    "\n".join(map(compiled, SOURCES)),
    include_dirs=[str(HERE)],
    depends=[str(HERE / "exchange.h")],
    # no FMA: sums are the same bits on every machine; no fast-math, ever
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parents[2]), verbose=True)
