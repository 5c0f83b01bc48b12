"""What an indexer asks of the keys that it keeps of all tokens, in pages: how well each matches a
query, and where those lie that were picked.

A score is a weighted sum over the indexer's heads of what is positive of query · key; a factor
that models have besides changes no order. A program takes all heads of a query, with some keys
after each other; behind the last key that the query sees it only writes -inf, so that a captured
step of short sequences costs little more than that.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.attention_parts import padded, seen_by
from flexpert.kernels.step_shapes import lanes


@dataclass(frozen=True, slots=True)
class ScoreTiling:
    """keys: that a program looks at in one go. tiles: of them, one after the other."""

    keys: int
    tiles: int
    warps: int
    stages: int


@triton.jit(
    do_not_specialize=["first", "sequences", "max_blocks", "length"],
    do_not_specialize_on_alignment=["query", "weights"],
)
def _score_keys(
    query, weights, keys, query_start, context_len, block_tables, scores,
    first, sequences, max_blocks, length, query_token, query_head, weights_token,
    SEQUENCES: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, HEADS_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
    DECODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sequence, last = seen_by(first + row, query_start, context_len, sequences, SEQUENCES, DECODE)
    begin = tl.program_id(1) * KEYS * TILES
    end = tl.minimum(begin + KEYS * TILES, length)
    lane = tl.arange(0, KEYS)
    to = scores + row.to(tl.int64) * length
    looked = tl.minimum(end, (last + KEYS - 1) // KEYS * KEYS)
    if begin < looked:
        h = tl.arange(0, HEADS_PAD)
        d = tl.arange(0, DIM_PAD)
        wide = row.to(tl.int64)
        q = tl.load(
            query + wide * query_token + h[:, None] * query_head + d[None, :],
            mask=(h < HEADS)[:, None] & (d < DIM)[None, :],
            other=0.0,
        ).to(keys.dtype.element_ty)
        w = tl.load(weights + wide * weights_token + h, mask=h < HEADS, other=0.0)
        blocks = block_tables + sequence * max_blocks
        for tile in range(begin, looked, KEYS):
            n = tile + lane
            there = n < last
            block = tl.load(blocks + n // BLOCK, mask=there, other=0)
            place = (block.to(tl.int64) * BLOCK + n % BLOCK) * DIM
            k = tl.load(
                keys + place[:, None] + d[None, :],
                mask=there[:, None] & (d < DIM)[None, :],
                other=0.0,
            )
            match = tl.maximum(tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
            score = tl.where(there, tl.sum(match * w[:, None], 0), float("-inf"))
            tl.store(to + n, score, mask=n < length)
    for tile in range(tl.maximum(begin, looked), end, KEYS):
        n = tile + lane
        tl.store(to + n, tl.full((KEYS,), float("-inf"), tl.float32), mask=n < length)


@triton.jit(
    do_not_specialize=["first", "sequences", "max_blocks", "most"],
    do_not_specialize_on_alignment=["places", "counts"],
)
def _place_keys(
    picked, query_start, context_len, block_tables, places, counts,
    first, sequences, max_blocks, most,
    SEQUENCES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    sequence, last = seen_by(first + row, query_start, context_len, sequences, SEQUENCES, DECODE)
    count = tl.minimum(last, most)
    tl.store(counts + row, count)
    begin = row.to(tl.int64) * most
    for some in range(0, count, LANES):
        lane = some + tl.arange(0, LANES)
        ok = lane < count
        n = tl.load(picked + begin + lane, mask=ok, other=0)
        block = tl.load(block_tables + sequence * max_blocks + n // BLOCK, mask=ok, other=0)
        tl.store(places + begin + lane, block * BLOCK + (n % BLOCK).to(tl.int32), mask=ok)


def score_keys(
    query: Tensor,
    weights: Tensor,
    keys: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    *,
    first: int = 0,
    decode: bool,
    tiling: ScoreTiling | None = None,
) -> Tensor:
    """Of n of the tokens of S sequences, packed, the scores of the keys before them.

    Args:
        query: [n, heads, dim] of any floating dtype, taken as that of the keys; last dimension
            contiguous, as for `weights`.
        weights: [n, heads] float32.
        keys: [blocks, block_size, 1, dim] bf16 or f32, contiguous; they have this step's.
        query_start, context_len, block_tables: see `absorbed_attention.attend_latents`.
        first: of the step's tokens, the first one here.
        decode: each sequence has one token.
        tiling: default: `choose`'s.

    Returns:
        [n, max_blocks · block_size] float32; -inf for tokens that are not before the query, and in
        rows of sequences without tokens.
    """
    rows, heads, dim = query.shape
    sequences, max_blocks = block_tables.shape
    length = max_blocks * keys.shape[1]
    scores = torch.empty((rows, length), dtype=torch.float32, device=query.device)
    if rows == 0 or length == 0:
        return scores
    tiling = tiling or choose(keys.dtype)
    _score_keys[(rows, -(-length // (tiling.keys * tiling.tiles)))](
        query,
        weights,
        keys,
        query_start,
        context_len,
        block_tables,
        scores,
        first,
        sequences,
        max_blocks,
        length,
        query.stride(0),
        query.stride(1),
        weights.stride(0),
        SEQUENCES=1 if decode else lanes(sequences),
        BLOCK=keys.shape[1],
        HEADS=heads,
        HEADS_PAD=padded(heads),
        DIM=dim,
        DIM_PAD=padded(dim),
        KEYS=tiling.keys,
        TILES=tiling.tiles,
        DECODE=decode,
        PRECISION="ieee" if keys.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return scores


def place_keys(
    picked: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    block_tables: Tensor,
    places: Tensor,
    counts: Tensor,
    *,
    first: int = 0,
    block_size: int,
    decode: bool,
) -> None:
    """Say where in the cache the tokens lie that n queries have picked, the ones before them first.

    Args:
        picked: [n, k] int64, contiguous, numbers of tokens in their sequence, each at most once.
        query_start, context_len, block_tables, first, decode: see `score_keys`.
        places: [n, k] int32, contiguous; gets block · block_size + offset of each, and behind
            `counts` nothing.
        counts: [n] int32; gets how many of them are before the query: k at most.
    """
    rows, most = picked.shape
    sequences, max_blocks = block_tables.shape
    if rows == 0:
        return
    _place_keys[(rows,)](
        picked,
        query_start,
        context_len,
        block_tables,
        places,
        counts,
        first,
        sequences,
        max_blocks,
        most,
        SEQUENCES=1 if decode else lanes(sequences),
        BLOCK=block_size,
        LANES=512,
        DECODE=decode,
        num_warps=4,
    )


def choose(dtype: torch.dtype) -> ScoreTiling:
    """Not measured: what 64 heads and 128 numbers leave room for. float32 is for checking."""
    if dtype == torch.float32:
        return ScoreTiling(16, 2, warps=4, stages=1)
    return ScoreTiling(128, 8, warps=8, stages=3)
