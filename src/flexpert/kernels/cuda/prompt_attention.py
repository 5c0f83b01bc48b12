"""Paged attention of prompts on a GPU: several tokens of a sequence in a program.

A program takes some tokens of one sequence with all query heads of one key head. Tiles of keys that
all its rows see whole are looked at without masks; those on the diagonal follow in a loop of their
own. Programs with many keys begin first, so that few are left when the GPU runs out of work.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.attention_parts import (
    LOG2_E,
    MOST_SPLITS,
    first_seen,
    merge_splits,
    padded,
    queries_of,
    split_sums,
    splits_of,
)
from flexpert.kernels.cuda.hopper_attention import attend_prompts_hopper, layouts
from flexpert.kernels.step_shapes import lanes


@dataclass(frozen=True, slots=True)
class PromptTiling:
    """rows: of queries in a program, tokens times heads of a group. keys: that it looks at in one
    go. by_hand: `hopper_attention`'s kernel, which has its own stages. fill: programs for each
    multiprocessor, below which keys are split among them."""

    rows: int
    keys: int
    warps: int
    stages: int
    by_hand: bool = False
    fill: int = 1


@triton.jit
def _ids(blocks, tile, end, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """[KEYS] int32: the block of each key of a tile; any for those from `end` on."""
    n = tile * KEYS + tl.arange(0, KEYS)
    return tl.load(blocks + n // BLOCK, mask=n < end, other=0)


@triton.jit
def _look(
    accumulated, peak, total, q, keys, values, block, tile, last, position, scale, softcap,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, KEY: tl.constexpr, KEY_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums so far with one tile of keys; not MASKED: every row sees all of them.

    scale: from a product to a power of two; peaks are such powers.
    """
    n = tile * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, KEY_PAD)
    v = tl.arange(0, VALUE_PAD)
    place = (block.to(tl.int64) * BLOCK + n % BLOCK) * KV_HEADS
    at = keys + place[None, :] * KEY + d[:, None]
    if MASKED:
        k = tl.load(at, mask=(n < last)[None, :] & (d < KEY)[:, None], other=0.0)
    elif KEY < KEY_PAD:
        k = tl.load(at, mask=(d < KEY)[:, None], other=0.0)
    else:
        k = tl.load(at)
    score = tl.dot(q, k, input_precision=PRECISION)
    if CAPPED:
        score = softcap * LOG2_E * (2.0 * tl.sigmoid(score * (2.0 * scale / softcap)) - 1.0)
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        seen = n[None, :] <= position[:, None]
        if WINDOW != 0:
            seen = seen & (n[None, :] >= first_seen(position, WINDOW)[:, None])
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1) * factor)
    safe = higher
    if MASKED:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - safe)
    p = tl.exp2(score * factor - safe[:, None])
    total = total * shrink + tl.sum(p, 1)
    at = values + place[:, None] * VALUE + v[None, :]
    if MASKED:
        w = tl.load(at, mask=(n < last)[:, None] & (v < VALUE)[None, :], other=0.0)
    elif VALUE < VALUE_PAD:
        w = tl.load(at, mask=(v < VALUE)[None, :], other=0.0)
    else:
        w = tl.load(at)
    accumulated = tl.dot(p.to(w.dtype), w, accumulated * shrink[:, None], input_precision=PRECISION)
    return accumulated, higher, total


@triton.jit(do_not_specialize=["sequences", "max_blocks", "tokens", "splits"])
def _attend_prompts(
    query, key_cache, value_cache, query_start, context_len, block_tables, sinks, out, partial,
    peaks, sums, sequences, max_blocks, tokens, splits, scaling, softcap, query_token, query_head,
    SEQUENCES: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    split = tl.program_id(2)
    # the last tokens of a sequence have the most keys
    program = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, first, begin, count = queries_of(program, query_start, sequences, SEQUENCES, TOKENS)
    if begin < count:
        context = tl.load(context_len + sequence)
        r = tl.arange(0, ROWS)
        inside = begin + r // GROUP
        row_ok = (r < TOKENS * GROUP) & (inside < count)
        position = context - count + inside
        token = (first + inside).to(tl.int64)
        head = kv_head * GROUP + r % GROUP
        d = tl.arange(0, KEY_PAD)
        q = tl.load(
            query + token[:, None] * query_token + head[:, None] * query_head + d[None, :],
            mask=row_ok[:, None] & (d < KEY)[None, :],
            other=0.0,
        )
        v = tl.arange(0, VALUE_PAD)

        # the keys that any row of this program sees, and this split's part of them
        last = tl.minimum(context, context - count + begin + TOKENS)
        low = first_seen(context - count + begin, WINDOW) // KEYS
        high = (last + KEYS - 1) // KEYS
        if SPLIT:
            share = (high - low + splits - 1) // splits
            low = low + split * share
            high = tl.minimum(high, low + share)

        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        if SINKS:
            if split == 0:
                sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32)
                peak = sink * LOG2_E
                total = tl.full((ROWS,), 1.0, tl.float32)
        accumulated = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        blocks = block_tables + sequence * max_blocks
        keys = key_cache + kv_head * KEY
        values = value_cache + kv_head * VALUE
        scale = scaling
        if not CAPPED:
            scale = scaling * LOG2_E
        middle = low
        ids = _ids(blocks, low, last, KEYS, BLOCK)
        if WINDOW == 0:
            # up to here every row sees every key
            middle = tl.minimum(tl.maximum((context - count + begin + 1) // KEYS, low), high)
            for tile in range(low, middle):
                block = ids
                ids = _ids(blocks, tile + 1, last, KEYS, BLOCK)
                accumulated, peak, total = _look(
                    accumulated, peak, total, q, keys, values, block, tile, last, position, scale,
                    softcap, BLOCK, KV_HEADS, KEY, KEY_PAD, VALUE, VALUE_PAD, KEYS, False, WINDOW,
                    CAPPED, PRECISION,
                )  # fmt: skip
        for tile in range(middle, high):
            block = _ids(blocks, tile, last, KEYS, BLOCK)
            accumulated, peak, total = _look(
                accumulated, peak, total, q, keys, values, block, tile, last, position, scale,
                softcap, BLOCK, KV_HEADS, KEY, KEY_PAD, VALUE, VALUE_PAD, KEYS, True, WINDOW,
                CAPPED, PRECISION,
            )  # fmt: skip
        ok = row_ok[:, None] & (v < VALUE)[None, :]
        heads = KV_HEADS * GROUP
        if not SPLIT:
            # no key at all is a row of padding
            result = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
            where = (token * heads + head)[:, None] * VALUE + v[None, :]
            tl.store(out + where, result.to(out.dtype.element_ty), mask=ok)
        else:
            row = (split * tokens + token) * heads + head
            tl.store(partial + row[:, None] * VALUE + v[None, :], accumulated, mask=ok)
            tl.store(peaks + row, peak, mask=row_ok)
            tl.store(sums + row, total, mask=row_ok)


def attend_prompts(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tiling: PromptTiling | None = None,
) -> Tensor:
    """As `attention.attend`, for any number of tokens of each sequence; tiling: `choose`'s."""
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = value_cache.shape[2:]
    sequences, max_blocks = block_tables.shape
    out = query.new_empty((tokens, heads, value_dim))
    if tokens == 0 or sequences == 0:
        return out
    key_pad, value_pad = padded(key_dim), padded(value_dim)
    group = heads // kv_heads
    if tiling is None:
        tiling = choose(key_pad, dtype=query.dtype, by_hand=fits(query, key_cache, value_cache))
    together = max(1, tiling.rows // triton.next_power_of_2(group))
    programs = tokens // together + sequences
    longest = max_blocks * key_cache.shape[1]
    if window:
        longest = min(longest, abs(window) + together + tiling.keys)
    splits = splits_of(programs * kv_heads, longest // (2 * tiling.keys), tiling.fill, query.device)
    parts = split_sums(out, splits)
    arguments = (
        query, key_cache, value_cache, query_start, context_len, block_tables, sinks, out, *parts,
        sequences, max_blocks, tokens, splits, scaling, softcap, query.stride(0), query.stride(1),
    )  # fmt: skip
    constants = {
        "SEQUENCES": lanes(sequences),
        "BLOCK": key_cache.shape[1],
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "TOKENS": together,
        "ROWS": max(16, triton.next_power_of_2(together * group)),
        "KEYS": tiling.keys,
        "SPLIT": splits > 1,
        "WINDOW": window,
        "CAPPED": softcap != 0.0,
        "SINKS": sinks is not None,
    }
    grid = (kv_heads, programs, splits)
    if tiling.by_hand:
        block = key_cache.shape[1]
        attend_prompts_hopper[grid](
            *arguments,
            **constants,
            **layouts(tiling.keys, block, key_dim, tiling.warps),
            DIM=key_dim,
            num_warps=tiling.warps,
        )
    else:
        _attend_prompts[grid](
            *arguments,
            **constants,
            KEY=key_dim,
            KEY_PAD=key_pad,
            VALUE=value_dim,
            VALUE_PAD=value_pad,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )
    merge_splits(parts, out, splits, query_start, lanes=MOST_SPLITS)
    return out


def fits(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `hopper_attention` computes it: bf16 heads of 64 or 128, copied 16 bytes at once, in
    blocks of a power of two."""
    tensors = (query, key_cache, value_cache)
    block = key_cache.shape[1]
    return (
        query.device.type == "cuda"
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and query.shape[2] in (64, 128)
        and query.shape[2] == value_cache.shape[3]
        and block >= 8
        and block & (block - 1) == 0
        and not any(stride % 16 for stride in query.stride()[:2])
        and all(t.dtype == torch.bfloat16 and t.data_ptr() % 16 == 0 for t in tensors)
    )


def choose(key_dim: int, *, dtype: torch.dtype, by_hand: bool) -> PromptTiling:
    """A tiling for a padded dimension of keys, measured on an H200; float32 is for checking.

    Larger ones read fewer keys, but one program of a multiprocessor waits while it has no scores
    yet; two do so in turn. And a step may have many sequences with one token.
    """
    if dtype == torch.float32:
        return PromptTiling(64, 64 if key_dim <= 128 else 32, warps=4, stages=2)
    if by_hand or key_dim <= 128:
        return PromptTiling(64, 64, warps=4, stages=2, by_hand=by_hand)
    return PromptTiling(128, 64, warps=8, stages=2)
