"""Paged attention whose rows have the same bits in any company, for `--deterministic`.

As `attention`, with one order of sums for a row, however it came: keys lie in chunks at absolute
positions, within a chunk tiles of keys follow each other, and chunks are folded in their order.
A program has as many rows of queries for a token that decodes as for a prompt, so that it meets the
same instructions. Where decoding would leave most of the GPU idle, the chunks of a sequence are
computed by several programs, and a second kernel folds them in the same order.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.attention import look, write_cache
from flexpert.kernels.cuda.attention_parts import LOG2_E, first_seen, padded, queries_of_program
from flexpert.kernels.cuda.multiprocessors import multiprocessor_count
from flexpert.kernels.step_shapes import lanes

CHUNK: Final = 512
"""Keys that are summed before they are folded with those before them."""
MOST_SPLITS: Final = 32
MOST_PARTIAL_BYTES: Final = 64 * 2**20
FILL: Final = 2
"""Programs for each multiprocessor, below which chunks are dealt out."""


@dataclass(frozen=True, slots=True)
class FixedTiling:
    """rows: of queries in a program. keys: of a tile. They decide bits, and are ones of a model."""

    rows: int
    keys: int
    warps: int
    stages: int


def choose(key_dim: int, value_dim: int, dtype: torch.dtype) -> FixedTiling:
    """For padded dimensions of keys and values; the same for prompts and for decoding.

    64 rows are what an instruction of Hopper's tensor cores (wgmma) takes; float32, which is for
    checking, is multiplied without them.
    """
    if dtype == torch.float32:
        return FixedTiling(16, 16, warps=4, stages=2)
    small = key_dim <= 128
    warps = 8 if value_dim > 128 else 4
    return FixedTiling(64, 64 if small else 32, warps, stages=3 if small else 2)


@triton.jit
def _fold(all_values, all_peak, all_total, values, peak, total):
    """What was folded, and one more chunk. [rows, n] float32, [rows], [rows]."""
    higher = tl.maximum(all_peak, peak)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    before = tl.exp2(all_peak - safe)
    now = tl.exp2(peak - safe)
    folded = all_values * before[:, None] + values * now[:, None]
    return folded, higher, all_total * before + total * now


@triton.jit
def _begin(sinks, head, ok, SINKS: tl.constexpr):
    """(peak, total) of nothing but the sinks. head, ok: [rows]."""
    if SINKS:
        sink = tl.load(sinks + head, mask=ok, other=0.0).to(tl.float32)
        return sink * LOG2_E, tl.full(head.shape, 1.0, tl.float32)
    return tl.full(head.shape, float("-inf"), tl.float32), tl.zeros(head.shape, tl.float32)


@triton.jit
def _chunks(context, position, KEYS_IN_CHUNK: tl.constexpr, WINDOW: tl.constexpr):
    """[first, behind the last) of those that a row at `position` and the rows behind it up to
    `context` see."""
    low = first_seen(position, WINDOW) // KEYS_IN_CHUNK
    return low, (context + KEYS_IN_CHUNK - 1) // KEYS_IN_CHUNK


@triton.jit(do_not_specialize=["sequences", "max_blocks", "tokens", "splits"])
def _attend(
    query, key_cache, value_cache, query_start, context_len, block_tables, sinks, out, partial,
    peaks, sums, sequences, max_blocks, tokens, splits, scaling, softcap, query_token, query_head,
    SEQUENCES: tl.constexpr, BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    KEY: tl.constexpr, KEY_PAD: tl.constexpr, VALUE: tl.constexpr, VALUE_PAD: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEYS_IN_CHUNK: tl.constexpr,
    SPLIT: tl.constexpr, DECODE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    sequence, first, begin, count = queries_of_program(
        query_start, sequences, SEQUENCES, TOKENS, DECODE
    )
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
        ok = row_ok[:, None] & (v < VALUE)[None, :]
        heads = KV_HEADS * GROUP
        blocks = block_tables + sequence * max_blocks

        # the keys that any row of this program sees
        start = context - count + begin
        last = tl.minimum(context, start + TOKENS)
        high = (last + KEYS - 1) // KEYS
        low = first_seen(start, WINDOW) // KEYS
        # up to here every row sees every key; one that decodes is as fast as its keys arrive, and
        # a second loop makes it slower
        middle = start * 0
        if WINDOW == 0 and not DECODE:
            middle = (start + 1) // KEYS
        TILES: tl.constexpr = KEYS_IN_CHUNK // KEYS
        first_chunk, behind = _chunks(last, start, KEYS_IN_CHUNK, WINDOW)
        chunk_begin = first_chunk
        if SPLIT:
            share = (behind - first_chunk + splits - 1) // splits
            chunk_begin = first_chunk + tl.program_id(2) * share
            behind = tl.minimum(behind, chunk_begin + share)

        all_peak, all_total = _begin(sinks, head, row_ok, SINKS)
        all_values = tl.zeros((ROWS, VALUE_PAD), tl.float32)
        for chunk in range(chunk_begin, behind):
            peak = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            values = tl.zeros((ROWS, VALUE_PAD), tl.float32)
            tile_begin = tl.maximum(chunk * TILES, low)
            tile_end = tl.minimum(chunk * TILES + TILES, high)
            masked = tile_begin
            if not DECODE and WINDOW == 0:
                masked = tl.minimum(tl.maximum(middle, tile_begin), tile_end)
                for tile in range(tile_begin, masked):
                    values, peak, total = look(
                        values, peak, total, q, key_cache, value_cache, blocks, tile, last,
                        position, kv_head, scaling, softcap, BLOCK, KV_HEADS, KEY, KEY_PAD, VALUE,
                        VALUE_PAD, KEYS, False, WINDOW, CAPPED, PRECISION,
                    )  # fmt: skip
            for tile in range(masked, tile_end):
                values, peak, total = look(
                    values, peak, total, q, key_cache, value_cache, blocks, tile, last, position,
                    kv_head, scaling, softcap, BLOCK, KV_HEADS, KEY, KEY_PAD, VALUE, VALUE_PAD,
                    KEYS, True, WINDOW, CAPPED, PRECISION,
                )  # fmt: skip
            if SPLIT:
                row = ((chunk - first_chunk) * tokens + token) * heads + head
                tl.store(partial + row[:, None] * VALUE + v[None, :], values, mask=ok)
                tl.store(peaks + row, peak, mask=row_ok)
                tl.store(sums + row, total, mask=row_ok)
            else:
                all_values, all_peak, all_total = _fold(
                    all_values, all_peak, all_total, values, peak, total
                )
        if not SPLIT:
            # no key at all is a row of padding
            result = all_values / tl.where(all_total == 0.0, 1.0, all_total)[:, None]
            where = (token * heads + head)[:, None] * VALUE + v[None, :]
            tl.store(out + where, result.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens"])
def _fold_chunks(
    partial, peaks, sums, context_len, sinks, out, tokens, HEADS: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, KEYS_IN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """A program has one head of one token, whose sequence has no other."""
    token = tl.program_id(0)
    head = tl.program_id(1) + tl.arange(0, 1)
    context = tl.load(context_len + token)
    first, behind = _chunks(context, context - 1, KEYS_IN_CHUNK, WINDOW)
    v = tl.arange(0, VALUE_PAD)[None, :]
    all_peak, all_total = _begin(sinks, head, head >= 0, SINKS)
    all_values = tl.zeros((1, VALUE_PAD), tl.float32)
    for chunk in range(first, behind):
        row = ((chunk - first) * tokens + token).to(tl.int64) * HEADS + head
        values = tl.load(partial + row[:, None] * VALUE + v, mask=v < VALUE, other=0.0)
        all_values, all_peak, all_total = _fold(
            all_values, all_peak, all_total, values, tl.load(peaks + row), tl.load(sums + row)
        )
    result = all_values / tl.where(all_total == 0.0, 1.0, all_total)[:, None]
    where = (token.to(tl.int64) * HEADS + head)[:, None] * VALUE + v
    tl.store(out + where, result.to(out.dtype.element_ty), mask=v < VALUE)


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
    """As `attention.paged_attention`, with bits that depend on the own sequence alone."""
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
    splits: int | None = None,
) -> Tensor:
    """As `attention.attend`, with bits that depend on the own sequence alone.

    splits: programs that share the chunks of a sequence that decodes; default: as many as fill the
        GPU. It decides no bits.
    """
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = value_cache.shape[2:]
    sequences, max_blocks = block_tables.shape
    out = query.new_empty((tokens, heads, value_dim))
    if tokens == 0 or sequences == 0:
        return out
    key_pad, value_pad = padded(key_dim), padded(value_dim)
    group = heads // kv_heads
    decode = tokens == sequences
    tiling = choose(key_pad, value_pad, query.dtype)
    rows = max(tiling.rows, triton.next_power_of_2(group))
    together = 1 if decode else rows // triton.next_power_of_2(group)
    programs = sequences if decode else tokens // together + sequences
    longest = max_blocks * key_cache.shape[1]
    if window:
        longest = min(longest, abs(window) + CHUNK)
    chunks = triton.cdiv(longest, CHUNK)
    if splits is None:
        splits = _splits(programs * kv_heads, chunks, query.device)
    size = chunks * tokens * heads
    if not decode or size * (value_dim + 2) * 4 > MOST_PARTIAL_BYTES:
        splits = 1
    partial = peaks = sums = out
    if splits > 1:
        shape = (chunks, tokens, heads)
        partial = torch.empty((*shape, value_dim), dtype=torch.float32, device=query.device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
    _attend[(programs, kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        query_start,
        context_len,
        block_tables,
        sinks,
        out,
        partial,
        peaks,
        sums,
        sequences,
        max_blocks,
        tokens,
        splits,
        scaling,
        softcap,
        query.stride(0),
        query.stride(1),
        SEQUENCES=1 if decode else lanes(sequences),
        BLOCK=key_cache.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        KEY=key_dim,
        KEY_PAD=key_pad,
        VALUE=value_dim,
        VALUE_PAD=value_pad,
        TOKENS=together,
        ROWS=rows,
        KEYS=tiling.keys,
        KEYS_IN_CHUNK=CHUNK,
        SPLIT=splits > 1,
        DECODE=decode,
        WINDOW=window,
        CAPPED=softcap != 0.0,
        SINKS=sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        enable_fp_fusion=False,  # each variant would fuse what it likes
    )
    if splits > 1:
        _fold_chunks[(tokens, heads)](
            partial,
            peaks,
            sums,
            context_len,
            sinks,
            out,
            tokens,
            HEADS=heads,
            VALUE=value_dim,
            VALUE_PAD=value_pad,
            KEYS_IN_CHUNK=CHUNK,
            WINDOW=window,
            SINKS=sinks is not None,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


def _splits(programs: int, chunks: int, device: torch.device) -> int:
    # 8: so that the interpreter meets both ways
    processors = multiprocessor_count(device, interpreted=8)
    return max(1, min(triton.cdiv(FILL * processors, programs), MOST_SPLITS, chunks))
