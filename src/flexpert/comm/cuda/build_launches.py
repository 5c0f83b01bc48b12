"""Compiles launches.c into flexpert.comm.cuda._launches (cffi, API mode).

pip runs this through setup.py. For development: `python src/flexpert/comm/cuda/build_launches.py`
builds next to the source. It needs nothing of CUDA.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "launches.c").read_text(encoding="utf-8")

found = re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", SOURCE, re.DOTALL)
if found is None:
    raise ValueError("launches.c has lost its cdef marks")
ffibuilder = FFI()
ffibuilder.cdef(found.group(1))
ffibuilder.set_source(
    "flexpert.comm.cuda._launches", SOURCE, extra_compile_args=["-O2", "-Wall", "-Wextra"]
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(HERE.parents[2]), verbose=True)
