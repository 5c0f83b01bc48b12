"""From a router's choices to rows sorted by expert, and from experts' results back to tokens.

For a rank that holds every expert its tokens want; between ranks `flexpert.comm` does this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.dependents import await_previous, following

SINGLE = 4096
"""Choices up to which one program sorts all of them; more are shared among many."""

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class SortedRows:
    """One row for each choice of an expert that is held, sorted by slot.

    offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
    token: [tokens * k] int32, the token of each row; unset behind offsets[slots].
    row: [tokens, k] int32, the row of each choice; -1 = none.
    """

    offsets: Tensor
    token: Tensor
    row: Tensor


@triton.jit
def _slots_of(ids, slot_of, valid, i, choices, experts, TOPK: tl.constexpr):
    """(slot, held) of the choices i."""
    ok = (i < choices) & (i // TOPK < tl.load(valid))
    expert = tl.load(ids + i, mask=ok, other=-1).to(tl.int32)
    ok = ok & (expert >= 0) & (expert < experts)
    slot = tl.load(slot_of + expert, mask=ok, other=-1)
    ok = ok & (slot >= 0)
    return tl.where(ok, slot, 0), ok


@triton.jit(do_not_specialize=["choices", "experts", "slots"])
def _sort_alone(
    ids,
    slot_of,
    valid,
    offsets,
    cursor,
    token,
    row,
    choices,
    experts,
    slots,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    await_previous(FOLLOWS)
    lane = tl.arange(0, SLOTS)
    count = tl.zeros((SLOTS,), tl.int32)
    for start in range(0, choices, CHUNK):
        i = start + tl.arange(0, CHUNK)
        slot, ok = _slots_of(ids, slot_of, valid, i, choices, experts, TOPK)
        count += tl.histogram(slot, SLOTS, mask=ok)
    past = tl.cumsum(count, 0)
    tl.store(cursor + lane, past - count)
    tl.store(offsets + lane + 1, past, mask=lane < slots)
    tl.store(offsets + lane, tl.zeros((SLOTS,), tl.int32), mask=lane == 0)
    tl.debug_barrier()
    for start in range(0, choices, CHUNK):
        i = start + tl.arange(0, CHUNK)
        slot, ok = _slots_of(ids, slot_of, valid, i, choices, experts, TOPK)
        place = tl.atomic_add(cursor + slot, 1, mask=ok, sem="relaxed")
        tl.store(token + place, i // TOPK, mask=ok)
        tl.store(row + i, tl.where(ok, place, -1), mask=i < choices)


@triton.jit(do_not_specialize=["choices", "experts"])
def _count(
    ids,
    slot_of,
    valid,
    counts,
    choices,
    experts,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    slot, ok = _slots_of(ids, slot_of, valid, i, choices, experts, TOPK)
    count = tl.histogram(slot, SLOTS, mask=ok)
    tl.atomic_add(counts + tl.arange(0, SLOTS), count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["choices", "experts", "slots"])
def _scatter(
    ids,
    slot_of,
    valid,
    counts,
    cursor,
    offsets,
    token,
    row,
    choices,
    experts,
    slots,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    lane = tl.arange(0, SLOTS)
    past = tl.cumsum(tl.load(counts + lane), 0)
    begin = past - tl.load(counts + lane)
    if tl.program_id(0) == 0:
        tl.store(offsets + lane + 1, past, mask=lane < slots)
        tl.store(offsets + lane, tl.zeros((SLOTS,), tl.int32), mask=lane == 0)
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    slot, ok = _slots_of(ids, slot_of, valid, i, choices, experts, TOPK)
    place = tl.atomic_add(cursor + slot, 1, mask=ok, sem="relaxed") + tl.gather(begin, slot, 0)
    tl.store(token + place, i // TOPK, mask=ok)
    tl.store(row + i, tl.where(ok, place, -1), mask=i < choices)


@triton.jit
def _combine(
    y,
    row,
    weights,
    residual,
    out,
    hidden,
    TOPK: tl.constexpr,
    WIDTH: tl.constexpr,
    ADDED: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    await_previous(FOLLOWS)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    ok = column < hidden
    total = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(TOPK):
        place = tl.load(row + token * TOPK + k).to(tl.int64)
        weight = tl.load(weights + token * TOPK + k).to(tl.float32)
        width = tl.where(place >= 0, hidden, 0)
        part = tl.load(y + place * hidden + column, mask=column < width, other=0.0)
        total += weight * part.to(tl.float32)
    total = total.to(out.dtype.element_ty)
    if ADDED:
        before = tl.load(residual + token * hidden + column, mask=ok, other=0.0)
        total = (total.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + token * hidden + column, total, mask=ok)


def sort_by_slot(
    expert_ids: Tensor, slot_of: Tensor, valid: Tensor, slots: int, *, follows: bool = False
) -> SortedRows:
    """Sort the choices of a router by the slot of their expert; within a slot in any order.

    Args:
        expert_ids: [tokens, k] int32 or int64, contiguous; -1 = none.
        slot_of: [experts] int32, the slot of each expert; -1 = not held.
        valid: [1] int32, tokens that count; the rest is padding.
        slots: how many there are.
        follows: of up to `SINGLE` choices: begin before the kernel in front has ended, see
            `dependents`.
    """
    tokens, topk = expert_ids.shape
    choices = tokens * topk
    device = expert_ids.device
    power = triton.next_power_of_2(slots)
    result = SortedRows(
        torch.empty(slots + 1, dtype=torch.int32, device=device),
        torch.empty(choices, dtype=torch.int32, device=device),
        torch.empty((tokens, topk), dtype=torch.int32, device=device),
    )
    common = {"TOPK": topk, "SLOTS": power}
    experts = slot_of.shape[0]
    if choices <= SINGLE:
        cursor = torch.empty(power, dtype=torch.int32, device=device)
        _sort_alone[(1,)](
            expert_ids,
            slot_of,
            valid,
            result.offsets,
            cursor,
            result.token,
            result.row,
            choices,
            experts,
            slots,
            **common,
            CHUNK=min(_CHUNK, max(32, triton.next_power_of_2(choices))),
            num_warps=8 if choices > 256 else 4,
            **following(device, wanted=follows),
        )
        return result
    counts = torch.zeros((2, power), dtype=torch.int32, device=device)
    grid = (triton.cdiv(choices, _CHUNK),)
    _count[grid](
        expert_ids, slot_of, valid, counts[0], choices, experts, **common, CHUNK=_CHUNK, num_warps=8
    )
    _scatter[grid](
        expert_ids,
        slot_of,
        valid,
        counts[0],
        counts[1],
        result.offsets,
        result.token,
        result.row,
        choices,
        experts,
        slots,
        **common,
        CHUNK=_CHUNK,
        num_warps=8,
    )
    return result


def combine(
    y: Tensor,
    row: Tensor,
    weights: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    *,
    follows: bool = False,
) -> Tensor:
    """out[t] = Σ_k weights[t, k] · y[row[t, k]], in float32 and the order of k: with the bits of a
    combine that sums at home (`comm.cuda.combine_kernels.reduce`).

    Args:
        y: [rows, hidden], contiguous.
        row: [tokens, k] int32; -1 = nothing.
        weights: [tokens, k] float, contiguous.
        out: [tokens, hidden] of any float dtype, contiguous.
        residual: of its shape and dtype, contiguous; added to the rounded sums. None: nothing is.
        follows: begin before the kernel in front has ended, see `dependents`.

    Returns:
        out.
    """
    tokens, hidden = out.shape
    if tokens == 0:
        return out
    width = min(1024, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, width))](
        y, row, weights, residual, out, hidden, TOPK=row.shape[1], WIDTH=width,
        ADDED=residual is not None, num_warps=4, enable_fp_fusion=False,
        **following(y.device, wanted=follows),
    )  # fmt: skip
    return out
