"""What the kernels of attention to keys in pages have in common."""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.multiprocessors import multiprocessor_count

MOST_SPLITS = 32
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def queries_of(program, query_start, sequences, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr):
    """(sequence, its first token, the program's first among its tokens, their number)."""
    # sequence s has the programs query_start[s] // TOKENS + s and on: at least enough
    lane = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + lane, mask=lane < sequences, other=1 << 30)
    sequence = tl.sum((starts // TOKENS + lane <= program).to(tl.int32), 0) - 1
    first = tl.load(query_start + sequence)
    begin = (program - first // TOKENS - sequence) * TOKENS
    return sequence, first, begin, tl.load(query_start + sequence + 1) - first


@triton.jit
def queries_of_program(
    query_start, sequences, SEQUENCES: tl.constexpr, TOKENS: tl.constexpr, DECODE: tl.constexpr
):
    """`queries_of` of this one."""
    if DECODE:
        return tl.program_id(0), tl.program_id(0), 0, 1
    return queries_of(tl.program_id(0), query_start, sequences, SEQUENCES, TOKENS)


@triton.jit
def seen_by(
    row, query_start, context_len, sequences, SEQUENCES: tl.constexpr, DECODE: tl.constexpr
):
    """(the sequence of a row of the step, how many of its tokens that row sees)."""
    if DECODE:
        return row, tl.load(context_len + row)
    lane = tl.arange(0, SEQUENCES)
    starts = tl.load(query_start + lane, mask=lane < sequences, other=1 << 30)
    sequence = tl.sum((starts <= row).to(tl.int32), 0) - 1
    behind = tl.load(query_start + sequence + 1) - row
    return sequence, tl.load(context_len + sequence) - behind + 1


@triton.jit(do_not_specialize=["rows", "sequences", "splits"])
def _merge_splits(
    partial,
    peaks,
    sums,
    query_start,
    out,
    rows,
    sequences,
    splits,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    DECODE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    last = rows
    if not DECODE:
        last = tl.load(query_start + sequences) * HEADS
    if row < last:
        s = tl.arange(0, SPLITS_PAD)
        peak = tl.load(peaks + s * rows + row, mask=s < splits, other=float("-inf"))
        highest = tl.max(peak, 0)
        factor = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
        total = tl.sum(factor * tl.load(sums + s * rows + row, mask=s < splits, other=0.0), 0)
        v = tl.arange(0, VALUE_PAD)
        part = tl.load(
            partial + (s[:, None] * rows + row) * VALUE + v[None, :],
            mask=(s < splits)[:, None] & (v < VALUE)[None, :],
            other=0.0,
        )
        result = tl.sum(part * factor[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out + row * VALUE + v, result.to(out.dtype.element_ty), mask=v < VALUE)


def split_sums(out: Tensor, splits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What programs that share the keys of a row leave for `merge_splits`; `out` for each, if none
    do.

    out: [.., value]. Returns: of each split the sums of values [splits, .., value], the highest
    score and the sum of exponentials, both [splits, ..]; all float32.
    """
    if splits == 1:
        return out, out, out
    shape, device = (splits, *out.shape[:-1]), out.device
    partial = torch.empty((*shape, out.shape[-1]), dtype=torch.float32, device=device)
    peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=device)
    return partial, peaks, sums


def merge_splits(
    parts: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    splits: int,
    query_start: Tensor | None = None,
    *,
    lanes: int,
) -> None:
    """out ← the results of all splits, if there are several.

    parts: of `split_sums`. query_start: [S + 1], where only the tokens before its last are there;
    out is [tokens, heads, value] then. lanes: a power of two, `splits` at least, and a kernel each.
    """
    if splits == 1:
        return
    rows, value = out.shape[:-1].numel(), out.shape[-1]
    _merge_splits[(rows,)](
        *parts, query_start, out, rows,
        0 if query_start is None else query_start.shape[0] - 1,
        splits,
        HEADS=out.shape[1], VALUE=value, VALUE_PAD=padded(value), SPLITS_PAD=lanes,
        DECODE=query_start is None, num_warps=4,
    )  # fmt: skip


def padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


def splits_of(programs: int, most: int, fill: int, device: torch.device) -> int:
    """Into how many parts the keys of a sequence are cut, `most` at most, to fill the GPU.

    A power of two: each number is a kernel of its own in decode steps.
    """
    # 8: so that the interpreter meets both ways
    processors = multiprocessor_count(device, interpreted=8)
    most = max(1, min(-(-fill * processors // programs), MOST_SPLITS, most))
    return 1 << most.bit_length() - 1


@triton.jit
def first_seen(position, WINDOW: tl.constexpr):
    """The first key that a row at `position` sees; see `attention.paged_attention` for WINDOW."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    elif WINDOW < 0:
        CHUNK: tl.constexpr = -WINDOW
        first = tl.maximum(position, 0)  # of padding it is -1
        first -= first % CHUNK
    return first
