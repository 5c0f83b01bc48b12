"""Experts that nobody holds are routed around, and the tokens that lost one are known."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.comm_local import Local, same_bits

from flexpert.comm import BufferSpec, make_buffer
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import ExpertWeights
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import Placement, replan
from flexpert.moe.runtime import (
    SPLIT_PERIOD,
    MoERuntime,
    Route,
    expert_tables,
    replica_routes,
    without,
)

EXPERTS, TOPK, HIDDEN, INTER = 6, 3, 32, 16


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), absent=st.sets(st.integers(0, EXPERTS - 1)))
def test_the_choices_that_are_left_keep_the_sum_of_the_weights(seed: int, absent: set[int]) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = 9
    ids = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOPK] for _ in range(tokens)])
    ids[0, 0] = -1
    weights = torch.rand((tokens, TOPK), generator=draw) * 10 ** float(seed % 60 - 40)
    mask = torch.tensor([expert in absent for expert in range(EXPERTS)])
    new_ids, new_weights, rows = without(mask, ids, weights)
    assert not set(new_ids.flatten().tolist()) & absent
    for token in range(tokens):
        left = [expert for expert in ids[token].tolist() if expert not in absent]
        assert new_ids[token][new_ids[token] >= 0].tolist() == [e for e in left if e >= 0]
        assert bool(rows[token]) == (len(left) < TOPK)
        if not rows[token]:
            assert torch.equal(new_weights[token], weights[token])
        elif left:
            torch.testing.assert_close(
                new_weights[token].double().sum(), weights[token].double().sum(), rtol=1e-5, atol=0
            )
            kept = torch.tensor([e not in absent for e in ids[token].tolist()])
            shares = weights[token][kept].double() / weights[token][kept].double().sum()
            torch.testing.assert_close(
                new_weights[token][kept].double(),
                shares * weights[token].double().sum(),
                rtol=1e-5,
                atol=1e-45,
            )
        else:
            assert not new_weights[token].any()


@pytest.fixture
def weights() -> list[ExpertWeights]:
    torch.manual_seed(0)
    return [
        ExpertWeights(torch.randn(2 * INTER, HIDDEN), torch.randn(HIDDEN, INTER))
        for _ in range(EXPERTS)
    ]


def gate(x: torch.Tensor) -> torch.Tensor:
    half, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(half) * up


def test_a_layer_with_holes_computes_what_is_left_and_marks_who_lost_what(
    weights: list[ExpertWeights],
) -> None:
    whole = Placement(EXPERTS, [{0: list(range(EXPERTS))}] * 2)
    holes = Placement(EXPERTS, [{0: list(range(EXPERTS))}, {0: [4, 1, 0]}])
    spec = BufferSpec(capacity=1, max_tokens=8, hidden=HIDDEN, topk=TOPK, dtype=torch.float32)
    buffer = make_buffer(0, spec)
    try:
        buffer.set_active([0], 1)
        moe = MoERuntime(buffer, reduce="home")

        def install(placement: Placement) -> None:
            layers = [
                LayerState(table, LayerExperts([weights[e] for e in held], deterministic=True))
                for table, held in zip(
                    expert_tables(placement, 0), placement.held_by(0), strict=True
                )
            ]
            moe.install(moe.stage(layers))

        x = torch.randn(4, HIDDEN)
        ids = torch.tensor([[0, 1, 4], [0, 2, 1], [2, 3, 5], [4, 5, 0]])
        share = torch.rand(4, TOPK)
        install(whole)
        full = moe.forward(1, x, ids, share, gate)
        assert moe.lost_rows() is None

        install(holes)
        assert torch.equal(moe.forward(0, x, ids, share, gate), full), "layer 0 lacks nobody"
        assert moe.lost_rows() is None
        moe.forward(0, x, ids, share, gate)
        found = moe.forward(1, x, ids, share, gate)
        assert torch.equal(found[0], full[0])
        assert not found[2].any(), "a token that lost all its choices gets nothing from experts"
        for token, left in ((1, [0, 2]), (3, [0, 2])):
            rest = share[token, left]
            expected = sum(
                w * (weights[e].down @ gate((weights[e].gate_up @ x[token])[None])[0])
                for e, w in zip(
                    ids[token, left].tolist(), rest / rest.sum() * share[token].sum(), strict=True
                )
            )
            torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-4)
        lost = moe.lost_rows()
        assert lost is not None
        assert lost.tolist() == [False, True, True, True]

        moe.forward(1, x[:0], ids[:0], share[:0], gate)
        assert moe.lost_rows() is None, "a step without tokens loses none"
        moe.forward(1, x, ids, share, gate)
        install(whole)
        assert moe.lost_rows() is None, "a step that broke off is forgotten"
    finally:
        buffer.close()


@pytest.mark.parametrize("tokens", [1, 7])
def test_any_replica_gives_the_same_bits(weights: list[ExpertWeights], tokens: int) -> None:
    """What deterministic mode needs: `reduce="home"`, and products that see each row alone."""
    members = range(4)
    placement = replan(None, members, experts=EXPERTS, layers=1, redundant=2 * EXPERTS)
    spec = BufferSpec(capacity=4, max_tokens=8, hidden=HIDDEN, topk=TOPK, dtype=torch.float32)
    x = torch.randn(4, tokens, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOPK] for _ in range(4 * tokens)])
    ids = ids.reshape(4, tokens, TOPK)
    share = torch.rand(4, tokens, TOPK)
    layouts = [None, dict.fromkeys(members, "a"), dict(enumerate("abab")), dict(enumerate("abca"))]
    choices, sums = set(), []
    with Local() as local:
        buffers = local.start(spec, members)
        for machines, split in itertools.product(layouts, (False, True)):
            local.activate(members)
            runtimes = {}
            for rank in members:
                (route,) = replica_routes(placement, rank, machines)
                if not split:
                    (table,) = expert_tables(placement, rank, machines)
                    route = Route(table)
                table = route.table
                (held,) = placement.held_by(rank)
                choices.add((rank, tuple(table.rank.tolist())))
                own = LayerExperts([weights[e] for e in held], deterministic=True)
                runtimes[rank] = MoERuntime(buffers[rank], reduce="home")
                state = LayerState(table, own, route.split)
                runtimes[rank].install(runtimes[rank].stage([state]))
            got = local.each(
                members,
                lambda b, r=runtimes: r[b.rank].forward(
                    0, x[b.rank], ids[b.rank], share[b.rank], gate
                ),
            )
            sums.append(torch.stack([got[rank] for rank in members]))
    assert len(choices) > len(members), "some layout sends tokens to other replicas"
    assert all(same_bits(found, sums[0]) for found in sums)


@pytest.mark.parametrize("holders", [1, 2, 3, 4])
def test_tokens_of_all_ranks_spread_evenly_over_the_replicas(holders: int) -> None:
    """With as many tokens on each rank; and those at home stay there."""
    ranks, tokens = range(4), 24
    layer = {rank: [0, 1] if rank < holders else [1] for rank in ranks}
    placement = Placement(2, [layer])
    got = dict.fromkeys(ranks, 0)
    ids = torch.zeros(tokens, dtype=torch.int64)
    for rank in ranks:
        (route,) = replica_routes(placement, rank)
        rows = torch.arange(tokens) % SPLIT_PERIOD
        entries = ids if route.split is None else route.split[rows, ids]
        owners = route.table.rank[entries].tolist()
        if rank < holders:
            assert set(owners) == {rank}
        for owner in owners:
            got[owner] += 1
    assert [got[rank] for rank in range(holders)] == [4 * tokens // holders] * holders
