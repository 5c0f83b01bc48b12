"""Attention with queries absorbed into latents is attention, in Triton's interpreter (float32)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda import absorbed_attention as absorbed
from flexpert.kernels.cuda.absorbed_attention import attend_latents, store_latents

HEADS, RANK, ROPE, BLOCK, BLOCKS = 20, 24, 8, 8, 40


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(
    query: Tensor, rotary: Tensor, keys: Tensor, last: int, options: dict[str, Any]
) -> Tensor:
    """[heads, rank] of a token in float64. keys: [context, rank + rope]; last: it sees so many."""
    first = max(0, last - options["window"]) if options.get("window") else 0
    seen = keys[first:last].double()
    score = torch.cat([query, rotary], -1).double() @ seen.t() * options["scaling"]
    if cap := options.get("softcap"):
        score = cap * torch.tanh(score / cap)
    if (sinks := options.get("sinks")) is not None:
        score = torch.cat([score, sinks.double()[:, None]], 1)
    return score.softmax(1)[:, : len(seen)] @ seen[:, :RANK]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 11},
    "softcap and sinks": {"softcap": 1.5, "sinks": randn(HEADS, seed=9)},
}


@pytest.mark.parametrize("extra", OPTIONS)
@pytest.mark.parametrize(
    ("contexts", "counts"),
    [([37, 1, 64], [1, 1, 1]), ([120], [1]), ([37, 9, 64], [5, 1, 9]), ([70], [2])],
    ids=["decode", "decode one", "mixed", "a short prompt"],
)
def test_rows_attend_to_what_comes_before_them(
    contexts: list[int], counts: list[int], extra: str
) -> None:
    """With keys whole and split among programs; the last sequences of a step alone as well."""
    options = {"scaling": 0.3, **OPTIONS[extra]}
    # what no token has been written to must not be read
    cache = torch.full((BLOCKS, BLOCK, 1, RANK + ROPE), math.nan)
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).int()
    width = BLOCKS // len(counts)
    tables = order[: len(counts) * width].view(-1, width)
    for table, context in zip(tables.tolist(), contexts, strict=True):
        slots = torch.tensor([table[p // BLOCK] * BLOCK + p % BLOCK for p in range(context)])
        store_latents(randn(context, RANK + ROPE, seed=context), cache, slots)
    tokens = sum(counts)
    query = randn(HEADS, tokens, RANK, seed=2)
    rotary = randn(tokens, HEADS, ROPE, seed=3).transpose(0, 1)  # as a model has it
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    lengths = torch.tensor(contexts).int()
    decode = tokens == len(counts)

    def attend(first: int) -> Tensor:
        return attend_latents(
            query[:, first:],
            rotary[:, first:],
            cache,
            starts[first:] if decode else starts,
            lengths[first:] if decode else lengths,
            tables[first:] if decode else tables,
            first=first,
            decode=decode,
            **options,
        )

    expected = torch.empty(HEADS, tokens, RANK, dtype=torch.float64)
    for s, (count, context) in enumerate(zip(counts, contexts, strict=True)):
        keys = cache[tables[s].long()].flatten(0, 2)
        for at in range(count):
            row = int(starts[s]) + at
            expected[:, row] = reference(
                query[:, row], rotary[:, row], keys, context - count + at + 1, options
            )
    torch.testing.assert_close(attend(0).double(), expected, rtol=1e-4, atol=1e-5)
    later = tokens - 1
    torch.testing.assert_close(attend(later).double(), expected[:, later:], rtol=1e-4, atol=1e-5)


def test_a_sequence_of_padding_attends_to_nothing_and_writes_nothing() -> None:
    cache = torch.full((4, BLOCK, 1, RANK + ROPE), math.nan)
    store_latents(randn(3, RANK + ROPE, seed=1), cache, torch.tensor([2, -1, -1]))
    assert cache.isnan().sum() == cache.numel() - (RANK + ROPE)
    out = attend_latents(
        randn(HEADS, 3, RANK, seed=2),
        randn(HEADS, 3, ROPE, seed=3),
        cache,
        torch.arange(4, dtype=torch.int32),
        torch.tensor([3, 0, 0], dtype=torch.int32),
        torch.zeros(3, 2, dtype=torch.int32),
        scaling=0.3,
        decode=True,
    )
    assert (out[:, 1:] == 0).all()


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize(
    ("heads", "rank"), [(128, 512), (64, 512), (40, 512), (16, 512), (128, 256)]
)
def test_results_of_a_program_fit_into_its_registers(heads: int, rank: int, decode: bool) -> None:
    """With half of them for the rest; tools/gpu/compile_kernels.py compiles what is chosen."""
    tiling = absorbed.choose(heads, rank, decode=decode, dtype=torch.bfloat16)
    assert tiling.heads * absorbed.padded(rank) * 4 <= tiling.warps * 32 * 128 * 4
    assert tiling.heads >= min(heads, 16)
