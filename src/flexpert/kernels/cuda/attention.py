"""Paged attention on a GPU, as `flexpert.kernels.cpu.ops.paged_attention` on a CPU.

A program takes a few tokens of one sequence with all query heads of one key head, so that keys
are read once for the whole group. Where there are too few such programs to fill the GPU, the
keys of a sequence are split among several, and a second kernel merges what they found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.attention_parts import (
    LOG2_E,
    first_seen,
    merge_splits,
    padded,
    split_sums,
    splits_of,
)
from flexpert.kernels.cuda.prompt_attention import attend_prompts


@dataclass(frozen=True, slots=True)
class AttentionTiling:
    """Of a step in which each sequence has one token. keys: that a program looks at in one go.
    fill: programs for each multiprocessor, below which keys are split."""

    keys: int
    warps: int
    stages: int
    fill: int = 2


@triton.jit
def _write_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_token,
    key_head,
    value_token,
    value_head,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KEY: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        head = tl.arange(0, HEADS_PAD)[:, None]
        d = tl.arange(0, KEY_PAD)[None, :]
        ok = (head < HEADS) & (d < KEY)
        row = tl.load(key + token * key_token + head * key_head + d, mask=ok)
        tl.store(key_cache + (slot * HEADS + head) * KEY + d, row, mask=ok)
        d = tl.arange(0, VALUE_PAD)[None, :]
        ok = (head < HEADS) & (d < VALUE)
        row = tl.load(value + token * value_token + head * value_head + d, mask=ok)
        tl.store(value_cache + (slot * HEADS + head) * VALUE + d, row, mask=ok)


@triton.jit
def look(
    accumulated,
    peak,
    total,
    q,
    key_cache,
    value_cache,
    blocks,
    tile,
    last,
    position,
    kv_head,
    scaling,
    softcap,
    BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The sums so far with one tile of keys; not MASKED: every row sees all of them."""
    n = tile * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, KEY_PAD)
    v = tl.arange(0, VALUE_PAD)
    if MASKED:
        there = n < last
        block = tl.load(blocks + n // BLOCK, mask=there, other=0)
    else:
        block = tl.load(blocks + n // BLOCK)
    place = (block.to(tl.int64) * BLOCK + n % BLOCK) * KV_HEADS + kv_head
    keys = key_cache + place[None, :] * KEY + d[:, None]
    if MASKED:
        k = tl.load(keys, mask=there[None, :] & (d < KEY)[:, None], other=0.0)
    elif KEY < KEY_PAD:
        k = tl.load(keys, mask=(d < KEY)[:, None], other=0.0)
    else:
        k = tl.load(keys)
    score = tl.dot(q, k, input_precision=PRECISION)
    if CAPPED:
        score *= scaling
        score = softcap * LOG2_E * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)
    else:
        score *= scaling * LOG2_E
    if MASKED:
        seen = n[None, :] <= position[:, None]
        if WINDOW != 0:
            seen = seen & (n[None, :] >= first_seen(position, WINDOW)[:, None])
        score = tl.where(seen, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = higher
    if MASKED:
        safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - safe)
    p = tl.exp2(score - safe[:, None])
    total = total * shrink + tl.sum(p, 1)
    values = value_cache + place[:, None] * VALUE + v[None, :]
    if MASKED:
        w = tl.load(values, mask=there[:, None] & (v < VALUE)[None, :], other=0.0)
    elif VALUE < VALUE_PAD:
        w = tl.load(values, mask=(v < VALUE)[None, :], other=0.0)
    else:
        w = tl.load(values)
    accumulated = tl.dot(p.to(w.dtype), w, accumulated * shrink[:, None], input_precision=PRECISION)
    return accumulated, higher, total


@triton.jit(do_not_specialize=["max_blocks", "tokens", "splits"])
def _attend_decode(
    query, key_cache, value_cache, context_len, block_tables, sinks, out, partial, peaks, sums,
    max_blocks, tokens, splits, scaling, softcap, query_token, query_head,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, KEY: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(context_len + sequence)
    r = tl.arange(0, ROWS)
    row_ok = r < GROUP
    position = context - 1 + r // GROUP
    token = sequence.to(tl.int64)
    head = kv_head * GROUP + r
    d = tl.arange(0, KEY_PAD)
    q = tl.load(
        query + token * query_token + head[:, None] * query_head + d[None, :],
        mask=row_ok[:, None] & (d < KEY)[None, :],
        other=0.0,
    )
    v = tl.arange(0, VALUE_PAD)

    # this split's part of the keys
    low = first_seen(context - 1, WINDOW) // KEYS
    high = (context + KEYS - 1) // KEYS
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
    # as fast as its keys arrive: a second loop, for tiles without masks, makes it slower
    for tile in range(low, high):
        accumulated, peak, total = look(
            accumulated, peak, total, q, key_cache, value_cache, blocks, tile, context, position,
            kv_head, scaling, softcap, BLOCK, KV_HEADS, KEY, KEY_PAD, VALUE, VALUE_PAD, KEYS,
            True, WINDOW, CAPPED, PRECISION,
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


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    slot_mapping: Tensor,
    *,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Append this step's keys and values to the cache, then attend causally over it.

    All floating tensors have one dtype, bf16 or f32. N tokens of S sequences, packed. As many
    tokens as sequences means that each sequence has one.

    Args:
        query: [N, heads, key_dim]; last dimension contiguous, as for key and value.
        key: [N, kv_heads, key_dim].
        value: [N, kv_heads, value_dim].
        key_cache: [blocks, block_size, kv_heads, key_dim], contiguous.
        value_cache: [blocks, block_size, kv_heads, value_dim], contiguous.
        query_start: [S + 1] int32. Tokens from query_start[S] on are padding: not touched.
        context_len: [S] int32, tokens in the cache after this step; a sequence's rows are its last.
            0: the sequence is padding; its row becomes zero.
        block_tables: [S, max_blocks] int32, contiguous.
        slot_mapping: [N] int64, where each token's key and value go; -1 = nowhere.
        window: keys each row sees, itself included; 0 = all; negative: those of its own chunk,
            which begins at a multiple of -window.
        softcap: scores become softcap · tanh(score / softcap); 0 = off.
        sinks: [heads] scores of a key whose value is zero, or None.

    Returns:
        [N, heads, value_dim].
    """
    write_cache(key, value, key_cache, value_cache, slot_mapping)
    return attend(
        query,
        key_cache,
        value_cache,
        query_start,
        context_len,
        block_tables,
        scaling=scaling,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def write_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Put each token's key and value where `slot_mapping` says; see `paged_attention`."""
    tokens, kv_heads, key_dim = key.shape
    value_dim = value.shape[2]
    if tokens == 0:
        return
    _write_cache[(tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=kv_heads,
        HEADS_PAD=triton.next_power_of_2(kv_heads),
        KEY=key_dim,
        KEY_PAD=padded(key_dim),
        VALUE=value_dim,
        VALUE_PAD=padded(value_dim),
        num_warps=2,
    )


def attend(
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
    tiling: AttentionTiling | None = None,
) -> Tensor:
    """Attend causally over a cache that has this step's keys and values; see `paged_attention`.

    tiling: where each sequence has one token; default: `choose`'s.
    """
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = value_cache.shape[2:]
    sequences, max_blocks = block_tables.shape
    if tokens != sequences:
        return attend_prompts(
            query, key_cache, value_cache, query_start, context_len, block_tables,
            scaling=scaling, window=window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    out = query.new_empty((tokens, heads, value_dim))
    if tokens == 0:
        return out
    key_pad, value_pad = padded(key_dim), padded(value_dim)
    group = heads // kv_heads
    if tiling is None:
        tiling = choose(key_pad, dtype=query.dtype)
    longest = max_blocks * key_cache.shape[1]
    if window:
        longest = min(longest, abs(window) + 1 + tiling.keys)
    splits = splits_of(tokens * kv_heads, longest // (2 * tiling.keys), tiling.fill, query.device)
    parts = split_sums(out, splits)
    _attend_decode[(tokens, kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        context_len,
        block_tables,
        sinks,
        out,
        *parts,
        max_blocks,
        tokens,
        splits,
        scaling,
        softcap,
        query.stride(0),
        query.stride(1),
        BLOCK=key_cache.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        KEY=key_dim,
        KEY_PAD=key_pad,
        VALUE=value_dim,
        VALUE_PAD=value_pad,
        ROWS=max(16, triton.next_power_of_2(group)),
        KEYS=tiling.keys,
        SPLIT=splits > 1,
        WINDOW=window,
        CAPPED=softcap != 0.0,
        SINKS=sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    merge_splits(parts, out, splits, lanes=splits)
    return out


def choose(key_dim: int, *, dtype: torch.dtype) -> AttentionTiling:
    """A tiling for a padded dimension of keys, measured on an H100; float32 is for checking."""
    stages = 2 if dtype == torch.float32 else 3
    return AttentionTiling(64 if key_dim <= 128 else 32, warps=4, stages=stages)
