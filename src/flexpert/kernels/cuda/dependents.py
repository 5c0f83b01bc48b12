"""Kernels that begin while the one in front of them on the stream still runs (programmatic
dependent launch).

Each calls `await_previous` once in every program, before it reads what the kernel in front has
written and before it writes anything. Ahead of that it may read what was written at the latest by
the kernel before the one in front, because each kernel lets the next one begin only after its own
wait. Kernels that were launched in the ordinary way may stand between; behind one of them there is
nothing to gain, and such a launch costs a little more.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexpert.comm.interpreter import INTERPRETED


@triton.jit
def await_previous(FOLLOWS: tl.constexpr):
    """What the kernel in front has written may be read, and the next kernel may begin."""
    if FOLLOWS:
        gdc_wait()
        gdc_launch_dependents()


def follows(device: torch.device) -> bool:
    """Whether a device launches kernels as each other's dependents: GPUs from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def following(device: torch.device, *, wanted: bool = True) -> dict[str, Any]:
    """Arguments of a launch of a kernel with `FOLLOWS`: it, and how Triton is to launch.

    wanted: whether it is to begin early where a device can do so.
    """
    if INTERPRETED:
        return {"FOLLOWS": False}
    early = wanted and follows(device)
    return {"FOLLOWS": early, "launch_pdl": early}
