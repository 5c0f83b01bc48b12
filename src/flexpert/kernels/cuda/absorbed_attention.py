"""Attention on a GPU whose cache has one latent of each token, with queries absorbed into them.

The latent and the rotary part behind it are one key that all heads share, and the latent is the
value as well: so a program takes a token with as many heads as its registers hold results for, and
reads each key once for both products. As in `attention`, keys are split among programs where there
are too few of them to fill the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.attention_parts import (
    MOST_SPLITS,
    merge_splits,
    padded,
    seen_by,
    split_sums,
)
from flexpert.kernels.cuda.multiprocessors import multiprocessor_count
from flexpert.kernels.step_shapes import lanes

_LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class LatentTiling:
    """heads: of a token in a program. keys: that it looks at in one go. fill: programs that a
    multiprocessor runs at once; keys are split among so many, which all take as long, and no more.
    """

    heads: int
    keys: int
    warps: int
    stages: int
    fill: int = 1


@triton.jit
def _store_latents(
    latents,
    cache,
    slot_mapping,
    token_stride,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        d = tl.arange(0, SIZE_PAD)
        row = tl.load(latents + token * token_stride + d, mask=d < SIZE)
        tl.store(cache + slot * SIZE + d, row, mask=d < SIZE)


@triton.jit(
    do_not_specialize=["first", "sequences", "max_blocks", "tokens", "splits"],
    # they begin with any sequence of a step
    do_not_specialize_on_alignment=["query_start", "context_len", "block_tables"],
)
def _attend_latents(
    query,
    rotary,
    cache,
    query_start,
    context_len,
    block_tables,
    sinks,
    out,
    partial,
    peaks,
    sums,
    first,
    sequences,
    max_blocks,
    tokens,
    splits,
    scaling,
    softcap,
    query_head,
    query_token,
    rotary_head,
    rotary_token,
    SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token = tl.program_id(0)
    split = tl.program_id(2)
    row = token  # with one token each, lengths and tables begin with the first sequence here
    if not DECODE:
        row = first + token
    sequence, last = seen_by(row, query_start, context_len, sequences, SEQUENCES, DECODE)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_ok = head < HEADS
    d = tl.arange(0, RANK_PAD)
    r = tl.arange(0, ROPE_PAD)
    rank_ok = d < RANK
    rope_ok = r < ROPE
    wide = head[:, None].to(tl.int64)
    q = tl.load(
        query + wide * query_head + token * query_token + d[None, :],
        mask=row_ok[:, None] & rank_ok[None, :],
        other=0.0,
    )
    turned = tl.load(
        rotary + wide * rotary_head + token * rotary_token + r[None, :],
        mask=row_ok[:, None] & rope_ok[None, :],
        other=0.0,
    )

    # the keys that this token sees, and this split's part of them
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, last - WINDOW)
    low = begin // KEYS
    high = (last + KEYS - 1) // KEYS
    share = (high - low + splits - 1) // splits
    low = low + split * share
    high = tl.minimum(high, low + share)

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:
        if split == 0:
            peak = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * _LOG2_E
            total = tl.full((ROWS,), 1.0, tl.float32)
    accumulated = tl.zeros((ROWS, RANK_PAD), tl.float32)
    blocks = block_tables + sequence * max_blocks
    for tile in range(low, high):
        n = tile * KEYS + tl.arange(0, KEYS)
        seen = n < last
        if WINDOW > 0:
            seen = seen & (n >= begin)
        block = tl.load(blocks + n // BLOCK, mask=seen, other=0)
        place = (block.to(tl.int64) * BLOCK + n % BLOCK) * (RANK + ROPE)
        latent = tl.load(
            cache + place[:, None] + d[None, :],
            mask=seen[:, None] & rank_ok[None, :],
            other=0.0,
        )
        rope = tl.load(
            cache + place[:, None] + RANK + r[None, :],
            mask=seen[:, None] & rope_ok[None, :],
            other=0.0,
        )
        score = tl.dot(turned, tl.trans(rope), input_precision=PRECISION)
        score = tl.dot(q, tl.trans(latent), score, input_precision=PRECISION)
        if CAPPED:
            score *= scaling
            score = softcap * _LOG2_E * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
        else:
            score *= scaling * _LOG2_E
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        shrink = tl.exp2(peak - higher)  # each tile has a key that is seen
        p = tl.exp2(score - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        accumulated = tl.dot(
            p.to(latent.dtype),
            latent,
            accumulated * shrink[:, None],
            input_precision=PRECISION,
        )
        peak = higher
    ok = row_ok[:, None] & rank_ok[None, :]
    if not SPLIT:
        # no key at all is a row of padding
        result = accumulated * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
        where = head * tokens + token
        tl.store(out + where[:, None] * RANK + d[None, :], result.to(out.dtype.element_ty), mask=ok)
    else:
        where = (split * HEADS + head) * tokens + token
        tl.store(partial + where[:, None] * RANK + d[None, :], accumulated, mask=ok)
        tl.store(peaks + where, peak, mask=row_ok)
        tl.store(sums + where, total, mask=row_ok)


def store_latents(latents: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Put each token's latent where `slot_mapping` says.

    Args:
        latents: [N, rank + rope]; last dimension contiguous.
        cache: [blocks, block_size, 1, rank + rope], contiguous.
        slot_mapping: [N] int64; -1 = nowhere.
    """
    tokens, size = latents.shape
    if tokens == 0:
        return
    _store_latents[(tokens,)](
        latents,
        cache,
        slot_mapping,
        latents.stride(0),
        SIZE=size,
        SIZE_PAD=padded(size),
        num_warps=4,
    )


def attend_latents(
    query: Tensor,
    rotary: Tensor,
    cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    *,
    first: int = 0,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    decode: bool,
    tiling: LatentTiling | None = None,
) -> Tensor:
    """Attend causally over a cache that has this step's latents.

    All floating tensors have one dtype, bf16 or f32. N of the tokens of S sequences, packed, so
    that heads · N · rank is below 2³¹.

    Args:
        query: [heads, N, rank], absorbed; last dimension contiguous, as for `rotary`.
        rotary: [heads, N, rope].
        cache: [blocks, block_size, 1, rank + rope], contiguous.
        query_start: [S + 1] int32, where each sequence's tokens begin in the step.
        context_len, block_tables: see `attention.paged_attention`.
        first: of the step's tokens, the first one here.
        scaling, window, softcap, sinks: see `attention.paged_attention`.
        decode: each sequence has one token; nothing asks for `query_start` then.
        tiling: default: `choose`'s.

    Returns:
        [heads, N, rank], sums of the latents.
    """
    heads, tokens, rank = query.shape
    rope = rotary.shape[2]
    sequences, max_blocks = block_tables.shape
    out = query.new_empty((heads, tokens, rank))
    if tokens == 0 or sequences == 0:
        return out
    tiling = tiling or choose(heads, rank, decode=decode, dtype=query.dtype)
    programs = tokens * -(-heads // tiling.heads)
    longest = max_blocks * cache.shape[1]
    if window:
        longest = min(longest, window + tiling.keys)
    processors = multiprocessor_count(query.device, interpreted=8)  # so that it meets both ways
    most = min(tiling.fill * processors // programs, MOST_SPLITS, longest // (2 * tiling.keys))
    splits = 1 << max(1, most).bit_length() - 1  # each power of two is a kernel in decode steps
    parts = split_sums(out, splits)
    _attend_latents[(tokens, -(-heads // tiling.heads), splits)](
        query,
        rotary,
        cache,
        query_start,
        context_len,
        block_tables,
        sinks,
        out,
        *parts,
        first,
        sequences,
        max_blocks,
        tokens,
        splits,
        scaling,
        softcap,
        query.stride(0),
        query.stride(1),
        rotary.stride(0),
        rotary.stride(1),
        SEQUENCES=1 if decode else lanes(sequences),
        BLOCK=cache.shape[1],
        HEADS=heads,
        RANK=rank,
        RANK_PAD=padded(rank),
        ROPE=rope,
        ROPE_PAD=padded(rope),
        ROWS=tiling.heads,
        KEYS=tiling.keys,
        SPLIT=splits > 1,
        DECODE=decode,
        WINDOW=window,
        CAPPED=softcap != 0.0,
        SINKS=sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    merge_splits(parts, out, splits, lanes=splits if decode else MOST_SPLITS)
    return out


def choose(heads: int, rank: int, *, decode: bool, dtype: torch.dtype) -> LatentTiling:
    """A tiling by what a multiprocessor of Hopper holds: results for 64 heads and a rank of 512 are
    half of its registers, and where the search for a token's sequence comes on top they spill.
    float32 is for checking."""
    rows = min(64, padded(heads))
    if dtype == torch.float32:
        return LatentTiling(min(rows, 16), 16, warps=4, stages=1)
    if rank <= 256:
        return LatentTiling(rows, 64, warps=4 if rows < 64 else 8, stages=2, fill=2)
    if not decode:
        rows = min(rows, 32)
    if rows == 16:
        return LatentTiling(rows, 32, warps=4, stages=3, fill=2)
    return LatentTiling(rows, 32, warps=8, stages=3)
