"""Kernels that begin while the one in front of them on the stream still runs (programmatic
dependent launch).

Each calls `await_previous` once in every program, before it reads what the kernel in front has
written and before it writes anything. Ahead of that it may read what was written at the latest by
the kernel before the one in front, because each kernel lets the next one begin only after its own
wait. Kernels that were launched in the ordinary way may stand between.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexpert.comm.interpreter import INTERPRETED

REQUEST: Final = tl.constexpr(2048)  # bytes asked for at once
_MOST_AHEAD: Final = 2**25


@triton.jit
def await_previous(FOLLOWS: tl.constexpr):
    """What the kernel in front has written may be read, and the next kernel may begin."""
    if FOLLOWS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch_early(pointers, nbytes):
    """Ask for memory to be brought into the L2 cache; nothing waits for it. Not in the interpreter.

    pointers: a tensor of them, each aligned to 16 bytes. nbytes: behind each, a multiple of 16, of
    the same shape; 0: nothing.
    """
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        setp.ne.s32 p, $2, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [pointers.to(tl.int64), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def fetch_share(pointer, nbytes, program, programs, LANES: tl.constexpr):
    """Ask for one program's share of memory that a later kernel reads; see `fetch_early`.

    nbytes: of all programs, a multiple of 16; 0: nothing. LANES: requests of a program, at most.
    """
    each = (nbytes // programs + REQUEST) // REQUEST * REQUEST
    at = tl.arange(0, LANES) * REQUEST
    first = program.to(tl.int64) * each + at
    size = tl.minimum(tl.minimum(each - at, REQUEST), nbytes - first)
    start = pointer.to(tl.int64) + first
    fetch_early(start.to(tl.pointer_type(tl.int8)), tl.maximum(size, 0).to(tl.int32))


def follows(device: torch.device) -> bool:
    """Whether a device launches kernels as each other's dependents: GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def bytes_ahead(weight: torch.Tensor | None) -> int:
    """How much of a weight a kernel may ask for ahead of the one that reads it: what the L2 cache
    holds beside all else."""
    return 0 if weight is None else min(weight.nbytes, _MOST_AHEAD) // 16 * 16


def following(device: torch.device) -> dict[str, Any]:
    """Arguments of a launch of a kernel with `FOLLOWS`: it, and how Triton is to launch."""
    if INTERPRETED:
        return {"FOLLOWS": False}
    early = follows(device)
    return {"FOLLOWS": early, "launch_pdl": early}
