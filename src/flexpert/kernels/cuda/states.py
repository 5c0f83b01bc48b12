"""States of sequences out of their slots and back, for layers that torch computes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # numbers that a program copies


def take_states(states: Tensor, slots: Tensor) -> Tensor:
    """States of B sequences, as one tensor.

    Args:
        states: [slots, *shape] contiguous.
        slots: [B] int64; -1: zeros.

    Returns: [B, *shape].
    """
    taken = states.new_empty((slots.shape[0], *states.shape[1:]))
    size = states[0].numel()
    _take_states[(slots.shape[0], triton.cdiv(size, _BLOCK))](
        states, slots, taken, size, BLOCK=_BLOCK
    )
    return taken


def put_states(new: Tensor, states: Tensor, slots: Tensor) -> None:
    """The way back.

    Args:
        new: [B, *shape], rounded to what `states` has.
        states: [slots, *shape] contiguous.
        slots: [B] int64, no two equal; -1: nowhere.
    """
    size = states[0].numel()
    _put_states[(slots.shape[0], triton.cdiv(size, _BLOCK))](
        new.contiguous(), states, slots, size, BLOCK=_BLOCK
    )


@triton.jit
def _take_states(states, slots, taken, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(states + slot * size + at, mask=(at < size) & (slot >= 0), other=0.0)
    tl.store(taken + row * size + at, kept, mask=at < size)


@triton.jit
def _put_states(new, states, slots, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    made = tl.load(new + row * size + at, mask=at < size)
    tl.store(states + slot * size + at, made, mask=(at < size) & (slot >= 0))
