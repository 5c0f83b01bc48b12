"""What becomes of proposed tokens, on the device: which came true, and where the next rows lie.

A step leaves for each of its sequences w tokens, of which the first is the last one that counts,
the others those that the model proposes to follow it; and how many proposed tokens came true in it.
The next step was planned for the least: `place_rows` brings its rows to where they belong.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 64  # of a program
_COLUMNS = 1024  # of a program


@triton.jit(do_not_specialize=["rows", "columns", "stride"])
def _place_rows(
    sources,
    left,
    accepted,
    token_ids,
    positions,
    context_len,
    slot_mapping,
    tables,
    rows,
    columns,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(sources + row, mask=row < rows, other=-1)
    ok = source >= 0
    tl.store(token_ids + row, tl.load(left + source, mask=ok, other=0), mask=ok)
    before = tl.load(positions + row, mask=ok, other=0)
    position = before + tl.load(accepted + source // WIDTH, mask=ok, other=0)
    position = tl.minimum(position, columns.to(tl.int64) * BLOCK - 1)
    tl.store(positions + row, position, mask=ok)
    tl.store(context_len + row, (position + 1).to(tl.int32), mask=ok)
    block = tl.load(tables + row.to(tl.int64) * stride + position // BLOCK, mask=ok, other=0)
    slot = block.to(tl.int64) * BLOCK + position % BLOCK
    tl.store(slot_mapping + row, slot, mask=ok)


def place_rows(
    sources: Tensor,
    left: Tensor,
    accepted: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    context_len: Tensor,
    slot_mapping: Tensor,
    tables: Tensor,
    *,
    width: int,
    block_size: int,
) -> None:
    """Rows whose tokens the step before has left get them, and go on behind what came true there.

    Such rows are sequences of their own, before all others.

    Args:
        sources: [N] int64, which of `left` each row's token is; -1: it has it.
        left: [sequences * width] int64. accepted: [sequences] int64.
        token_ids, positions, slot_mapping: [N] int64, context_len: [S] int32; written to.
        tables: [S, blocks] int32, a row contiguous.
    """
    rows = min(sources.shape[0], tables.shape[0])
    _place_rows[(triton.cdiv(rows, _ROWS),)](
        sources,
        left,
        accepted,
        token_ids,
        positions,
        context_len,
        slot_mapping,
        tables,
        rows,
        tables.shape[1],
        tables.stride(0),
        WIDTH=width,
        BLOCK=block_size,
        ROWS=_ROWS,
    )


@triton.jit(do_not_specialize=["sequences"])
def _judge_rows(
    questions,
    sampled,
    token_ids,
    positions,
    left,
    accepted,
    last,
    at,
    asked,
    sequences,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    one = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = one < sequences
    row = tl.load(questions + one, mask=ok, other=0)
    sample = tl.load(questions + sequences + one, mask=ok, other=0)
    drafted = tl.load(questions + 2 * sequences + one, mask=ok, other=0)
    count = drafted * 0
    goes_on = ok
    for place in tl.static_range(WIDTH - 1):
        goes_on = goes_on & (place < drafted)
        said = tl.load(sampled + sample + place, mask=goes_on, other=0)
        proposed = tl.load(token_ids + row + place + 1, mask=goes_on, other=0)
        goes_on = goes_on & (said == proposed)
        count += goes_on.to(tl.int64)
    tl.store(accepted + one, count, mask=ok)
    tl.store(left + one * WIDTH, tl.load(sampled + sample + count, mask=ok, other=0), mask=ok)
    tl.store(last + one, row + count, mask=ok)
    tl.store(at + one, tl.load(positions + row + count, mask=ok, other=0), mask=ok)
    tl.store(asked + one, tl.load(questions + 3 * sequences + one, mask=ok, other=0), mask=ok)


def judge_rows(
    questions: Tensor,
    sampled: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    *,
    left: Tensor,
    accepted: Tensor,
    last: Tensor,
    at: Tensor,
    asked: Tensor,
    width: int,
) -> None:
    """How many proposed tokens came true, for each sequence that was sampled.

    Args:
        questions: [5, S] int64, as `DraftInputs.sequences`, contiguous.
        sampled: int64, the step's samples. token_ids, positions: [N] int64, of its rows.
        left: [at least S * width] int64: at the first place of each sequence its last token.
        accepted, last, at, asked: [at least S] int64: how many came true, the row of the last one
            that counts, its position, and how many tokens are to be proposed.
    """
    sequences = questions.shape[1]
    _judge_rows[(max(1, triton.cdiv(sequences, _ROWS)),)](
        questions,
        sampled,
        token_ids,
        positions,
        left,
        accepted,
        last,
        at,
        asked,
        sequences,
        WIDTH=width,
        ROWS=_ROWS,
    )


@triton.jit(do_not_specialize=["count"])
def _tokens_after(sources, token_ids, sampled, result, count, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = row < count
    source = tl.load(sources + row, mask=ok, other=-1)
    known = tl.load(token_ids + row, mask=ok, other=0)
    said = tl.load(sampled + source, mask=ok & (source >= 0), other=0)
    tl.store(result + row, tl.where(source < 0, known, said), mask=ok)


def tokens_after(sources: Tensor, token_ids: Tensor, sampled: Tensor, result: Tensor) -> None:
    """result [at least N] int64 ← the token after each row: sampled[sources], or, where that is
    negative, token_ids. All int64, sources and token_ids [N]."""
    count = sources.shape[0]
    _tokens_after[(max(1, triton.cdiv(count, _ROWS)),)](
        sources, token_ids, sampled, result, count, ROWS=_ROWS
    )


@triton.jit(do_not_specialize=["width"])
def _clear_rows(slots, cache, width, COLUMNS: tl.constexpr):
    slot = tl.load(slots + tl.program_id(0))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ok = (column < width) & (slot >= 0)
    nothing = tl.zeros([COLUMNS], dtype=cache.dtype.element_ty)
    tl.store(cache + slot * width + column, nothing, mask=ok)


def clear_rows(slots: Tensor, cache: Tensor) -> None:
    """cache[slots] ← 0. slots: [N] int64, of negative ones nothing is written. cache: [all slots,
    width], contiguous."""
    rows, width = slots.shape[0], cache.shape[1]
    grid = (rows, triton.cdiv(width, _COLUMNS))
    if rows:
        _clear_rows[grid](slots, cache, width, COLUMNS=_COLUMNS)


@triton.jit(do_not_specialize=["sequences", "columns", "stride"])
def _further_rows(
    step,
    asked,
    at,
    tables,
    positions,
    context_len,
    slot_mapping,
    sequences,
    columns,
    stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    one = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ok = one < sequences
    place = tl.load(step)
    wanted = tl.load(asked + one, mask=ok, other=0) > place
    position = tl.load(at + one, mask=ok, other=0) + place
    position = tl.minimum(position, columns.to(tl.int64) * BLOCK - 1)
    block = tl.load(
        tables + one.to(tl.int64) * stride + position // BLOCK, mask=ok & wanted, other=0
    )
    slot = block.to(tl.int64) * BLOCK + position % BLOCK
    tl.store(positions + one, position, mask=ok)
    tl.store(context_len + one, tl.where(wanted, position + 1, 0).to(tl.int32), mask=ok)
    tl.store(slot_mapping + one, tl.where(wanted, slot, -1), mask=ok)


def further_rows(
    step: Tensor,
    asked: Tensor,
    at: Tensor,
    tables: Tensor,
    *,
    positions: Tensor,
    context_len: Tensor,
    slot_mapping: Tensor,
    block_size: int,
) -> None:
    """The rows of another application of the draft layer, one for each of S sequences.

    Args:
        step: [1] int64, how many there were. asked: [S] int64, how many tokens each is proposed;
            where that is no more than the applications so far, nothing is written and attended to.
        at: [S] int64, the position of the last token that counts. tables: [S, blocks] int32.
        positions, slot_mapping: [S] int64, context_len: [S] int32; written to.
    """
    sequences = positions.shape[0]
    _further_rows[(max(1, triton.cdiv(sequences, _ROWS)),)](
        step,
        asked,
        at,
        tables,
        positions,
        context_len,
        slot_mapping,
        sequences,
        tables.shape[1],
        tables.stride(0),
        BLOCK=block_size,
        ROWS=_ROWS,
    )
