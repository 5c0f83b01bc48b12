#!/usr/bin/env bash
# Host memory that is page-locked piece by piece cannot be copied to a GPU across a border.
#
# Versions    torch 2.11.0 with CUDA 13.0, driver 580.159; one NVIDIA GPU.
# Expected    cudaMemcpyAsync from one mapping of host memory works whether the mapping is pageable,
#             page-locked as a whole, or page-locked in adjoining pieces (cudaHostRegister on each,
#             as one does to keep each call short while a GPU serves): all of it can be read.
# Seen        pageable: copied. As a whole: copied. In pieces: a copy within one piece is copied,
#             one across the border of two fails with "invalid argument". Registered memory is thus
#             worse off than memory that is not registered at all; every copy has to be cut at the
#             borders.
#
# Runs in a temporary folder; PYTHON=… takes an interpreter that has such a torch already. Exits
# with 0 if it is seen, 1 if it is not, 2 without a GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.11.0 numpy==2.4.0
    PYTHON=$folder/venv/bin/python
fi
cat > "$folder/run.py" <<'PY'
import ctypes
import mmap
import sys

import torch

if not torch.cuda.is_available():
    print("no GPU")
    sys.exit(2)
MIB = 1 << 20
runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.split('.')[0]}")
print("torch", torch.__version__, "on", torch.cuda.get_device_name())
target = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")


def registered(pieces: int, begin: int, size: int) -> str:
    """Copy `size` bytes from `begin` of 128 MiB that are registered in so many pieces."""
    memory = mmap.mmap(-1, 128 * MIB)
    host = torch.frombuffer(memory, dtype=torch.uint8)
    host.fill_(7)
    length = 128 * MIB // pieces if pieces else 0
    for piece in range(pieces):
        status = runtime.cudaHostRegister(
            ctypes.c_void_p(host.data_ptr() + piece * length), ctypes.c_size_t(length), 0
        )
        assert status == 0, status
    target.zero_()
    try:
        target[:size].copy_(host[begin : begin + size], non_blocking=True)
        torch.cuda.synchronize()
        result = "copied" if bool((target[:size] == 7).all()) else "wrong bytes"
    except RuntimeError as error:
        result = str(error).splitlines()[0]
    for piece in range(pieces):
        runtime.cudaHostUnregister(ctypes.c_void_p(host.data_ptr() + piece * length))
    return result


results = {
    "pageable": registered(0, 48 * MIB, 32 * MIB),
    "registered as a whole": registered(1, 48 * MIB, 32 * MIB),
    "in two pieces, within one": registered(2, 16 * MIB, 32 * MIB),
    "in two pieces, across": registered(2, 48 * MIB, 32 * MIB),
}
for case, result in results.items():
    print(f"{case}: {result}")
*fine, across = results.values()
sys.exit(0 if fine == ["copied"] * 3 and "invalid argument" in across else 1)
PY
"$PYTHON" "$folder/run.py"
