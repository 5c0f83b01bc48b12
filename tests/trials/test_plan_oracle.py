"""The float64 oracle of plans: agrees with comm's own, and sees every kind of mistake."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flexpert.comm import ExpertTable
from flexpert.comm.buffer import Reduce
from flexpert.comm.routing import Sent, arrivals, expected_rows, expected_sums
from flexpert.trials.plan import oracle

RANKS = (0, 2, 3)
SIZES = oracle.Sizes(tokens=9, hidden=32, topk=4, experts_per_rank=3, dtype=torch.bfloat16)
SENT = {rank: oracle.inputs(SIZES, RANKS, (5, 1, 0, rank)) for rank in RANKS}
TOLERANCE = oracle.rounding(SIZES)


def as_routing_has_it() -> dict[int, Sent]:
    index = torch.arange(4 * SIZES.experts_per_rank, dtype=torch.int32)
    table = ExpertTable(
        index // SIZES.experts_per_rank, index % SIZES.experts_per_rank, SIZES.experts_per_rank
    )
    return {
        rank: Sent(s.x, torch.from_numpy(s.experts), torch.from_numpy(s.weights), table)
        for rank, s in SENT.items()
    }


def rows_of(rank: int) -> oracle.Rows:
    sent = as_routing_has_it()
    x, offsets, weights = expected_rows(sent, rank)
    here = arrivals(sent, rank)
    return oracle.Rows(
        offsets,
        torch.tensor([pair.home for pair in here]),
        torch.tensor([pair.token for pair in here]),
        weights,
        x,
    )


def sums_of(rank: int, reduce: Reduce) -> torch.Tensor:
    sent = as_routing_has_it()
    y = {}
    for owner in RANKS:
        slots = torch.tensor([pair.slot for pair in arrivals(sent, owner)])
        scale = oracle.factor((owner * SIZES.experts_per_rank + slots).numpy())
        y[owner] = (expected_rows(sent, owner)[0].double() * torch.from_numpy(scale)[:, None]).to(
            SIZES.dtype
        )
    return expected_sums(sent, y, rank, reduce)


def received(rank: int, rows: oracle.Rows) -> str:
    return oracle.check_received(SIZES, rank, SENT, rows, 0.0)


def combined(rank: int, out: torch.Tensor) -> str:
    return oracle.check_combined(SIZES, SENT[rank], RANKS, out, None, None, (), TOLERANCE)


@pytest.mark.parametrize("rank", RANKS)
def test_it_agrees_with_the_oracle_of_comm(rank: int) -> None:
    assert received(rank, rows_of(rank)) == ""
    for reduce in ("home", "rank"):
        out = sums_of(rank, reduce)  # type: ignore[arg-type]
        assert oracle.check_combined(SIZES, SENT[rank], RANKS, out, None, None, (), TOLERANCE) == ""


def test_wrong_rows_are_seen() -> None:
    rows = rows_of(0)
    assert len(rows.source) > 2
    changed = rows.x.clone()
    changed[1, 3] += 0.5
    assert "arrived changed" in received(0, replace(rows, x=changed))
    assert "should be token" in received(0, replace(rows, token=rows.token + 1))
    assert "should be token" in received(0, replace(rows, source=rows.source.flip(0)))
    assert "router weight" in received(0, replace(rows, weights=rows.weights * 1.001))
    assert "rows up to" in received(0, replace(rows, offsets=rows.offsets + 1))
    missing = oracle.Rows(
        rows.offsets, rows.source[:-1], rows.token[:-1], rows.weights[:-1], rows.x[:-1]
    )
    assert "should be token" in received(0, missing)
    more = replace(rows, source=torch.cat((rows.source, rows.source[-1:])))
    assert "rows, expected" in received(0, more)


def test_rows_and_sums_that_are_no_numbers_are_seen() -> None:
    rows = rows_of(0)
    spoilt = rows.x.clone()
    spoilt[1, 3] = float("nan")
    assert "arrived changed" in received(0, replace(rows, x=spoilt))
    out = sums_of(2, "rank")
    out[0, 0] = float("nan")
    assert "combined result" in combined(2, out)


def test_each_contribution_counts_and_must_come_from_its_own_expert() -> None:
    own = SENT[2]
    factors = oracle.factor(own.experts)

    def sums(weights: NDArray[np.float32], factors: NDArray[np.float64]) -> torch.Tensor:
        kept = (weights.astype(np.float64) * (own.experts >= 0) * factors).sum(1)
        return (torch.from_numpy(kept)[:, None] * own.x.double()).to(SIZES.dtype)

    assert combined(2, sums(own.weights, factors)) == ""
    for choice in zip(*np.nonzero(own.experts >= 0), strict=True):
        weights = own.weights.copy()
        weights[choice] = 0.0
        assert "combined result" in combined(2, sums(weights, factors))
    neighbour = oracle.factor(own.experts + SIZES.experts_per_rank)
    assert "combined result" in combined(2, sums(own.weights, neighbour))


def test_a_loss_must_be_told_and_be_what_happened() -> None:
    own, up = SENT[2], (0, 2)
    gone = torch.from_numpy((own.experts >= 0) & (own.experts // SIZES.experts_per_rank == 3))
    assert gone.any()
    weight = (torch.from_numpy(own.weights) * gone).sum(1)
    left = torch.from_numpy(own.weights * ~gone.numpy() * (own.experts >= 0))
    factors = torch.from_numpy(oracle.factor(own.experts))
    out = ((left.double() * factors).sum(1)[:, None] * own.x.double()).to(SIZES.dtype)

    def check(
        out: torch.Tensor,
        lost: torch.Tensor | None,
        lost_weight: torch.Tensor | None,
        ranks: tuple[int, ...] = (3,),
    ) -> str:
        return oracle.check_combined(SIZES, own, up, out, lost, lost_weight, ranks, TOLERANCE)

    assert check(out, gone, weight) == ""
    assert "not the loss that happened" in check(out, None, None)
    assert "not the loss that happened" in check(out, torch.zeros_like(gone), weight)
    assert "lost weight is wrong" in check(out, gone, weight + 0.1)
    for ranks in ((), (2,), (2, 3)):
        assert "said to be missing" in check(out, gone, weight, ranks)
    assert "combined result is wrong" in check(sums_of(2, "home"), gone, weight)
