"""Scores of keys in pages, and the places of those picked, in Triton's interpreter (float32)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda.absorbed_attention import store_latents
from flexpert.kernels.cuda.index_scores import place_keys, score_keys

HEADS, DIM, BLOCK, BLOCKS = 20, 24, 8, 24


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("contexts", "counts"),
    [([37, 0, 61], [1, 1, 1]), ([37, 9, 61], [3, 1, 2])],
    ids=["decode", "mixed"],
)
def test_a_row_scores_what_comes_before_it_and_finds_what_it_picks(
    contexts: list[int], counts: list[int]
) -> None:
    """A sequence without tokens is padding; the last rows of a step alone as well."""
    keys = torch.full((BLOCKS, BLOCK, 1, DIM), math.nan)  # where no token has been written
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(1)).int()
    tables = order.view(3, -1)
    at = torch.arange(BLOCKS // 3 * BLOCK)
    slots = tables.long()[:, at // BLOCK] * BLOCK + at % BLOCK
    for own, context in zip(slots, contexts, strict=True):
        store_latents(randn(context, DIM, seed=context), keys, own[:context])
    rows, starts = sum(counts), torch.tensor([0, *counts]).cumsum(0).int()
    query, weights = randn(rows, HEADS, DIM, seed=2), randn(rows, HEADS, seed=3)
    given = starts, torch.tensor(contexts).int(), tables
    how = {"decode": rows == 3}
    scores = score_keys(query, weights, keys, *given, **how)
    later = score_keys(query[1:], weights[1:], keys, *given, first=1, **how)
    torch.testing.assert_close(later, scores[1:])

    most = 12
    picked = scores.topk(most).indices
    places = torch.full((rows, most), -1, dtype=torch.int32)
    seen = torch.full((rows,), -1, dtype=torch.int32)
    for some, first in ((slice(0, 1), 0), (slice(1, rows), 1)):
        place_keys(
            picked[some], *given, places[some], seen[some], first=first, block_size=BLOCK, **how
        )
    for s, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        kept = keys.flatten(0, 2)[slots[s]].double()
        for back in range(count):
            row = int(starts[s]) + back
            last = max(0, context - count + back + 1)
            match = (query[row].double() @ kept[:last].t()).relu()
            torch.testing.assert_close(
                scores[row, :last].double(), weights[row].double() @ match, rtol=1e-4, atol=1e-5
            )
            assert (scores[row, last:] == -math.inf).all()
            assert seen[row] == min(last, most)
            its = slots[s][picked[row, : seen[row]]]
            assert places[row, : seen[row]].tolist() == its.tolist()
            assert (its < BLOCKS * BLOCK).all()
