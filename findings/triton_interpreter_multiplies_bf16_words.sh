#!/usr/bin/env bash
# Triton's interpreter multiplies bfloat16 matrices as if their words were integers.
#
# Versions    triton 3.9.0 with TRITON_INTERPRET=1, torch 2.13.0 on a CPU; Python 3.11, x86-64 Linux.
# Expected    tl.dot of two bfloat16 blocks, summed in float32, is their product, as on a GPU and as
#             the same kernel gives it for float16 and float32: of ones, 16 in each place.
# Seen        the interpreter keeps bfloat16 in 16-bit words and hands these to numpy: 1.0 is the
#             word 16,256, and the product of ones of size 16 is 16 * 16,256 * 16,256, some 4.2e9.
#             No error and no warning; a norm behind it hides the size, and what comes out looks
#             like an answer.
#
# Runs in a temporary folder. Exits with 0 if it is seen, 1 if it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy==2.4.0
cat > "$folder/run.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl

SIZE = 16


@triton.jit
def product(left, right, out, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    tl.store(out + at, tl.dot(tl.load(left + at), tl.load(right + at)))


print("triton", triton.__version__, "torch", torch.__version__)
found = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    ones = torch.ones(SIZE, SIZE, dtype=dtype)
    out = torch.zeros(SIZE, SIZE)
    product[(1,)](ones, ones, out, SIZE=SIZE)
    found[dtype] = out[0, 0].item()
    print(dtype, "expected", float(SIZE), "seen", found[dtype])
right = found[torch.float32] == found[torch.float16] == SIZE
sys.exit(0 if right and found[torch.bfloat16] == SIZE * 16256.0**2 else 1)
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/run.py"
