"""GPU ranks that exchange rows give the sums of one that holds all experts; in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")
pytest.importorskip("flexpert.comm.cuda", reason="the exchange between GPUs")

from flexpert.comm import BufferSpec
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_exchange import Tuning
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.experts import ExpertWeights
from flexpert.moe.cuda.exchanged_experts import ExchangedExperts
from flexpert.moe.cuda.local_experts import LocalExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import Placement, replan
from flexpert.moe.runtime import expert_tables

if torch.cuda.is_available():
    pytest.skip("ranks of one process wait for each other on a GPU", allow_module_level=True)

HIDDEN, INTER, EXPERTS, TOPK, MAX_TOKENS = 32, 16, 6, 2, 4
SPEC = BufferSpec(2, MAX_TOKENS, HIDDEN, TOPK, torch.float32)
CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor, Tensor]


def gate(h: Tensor) -> Tensor:
    a, b = h.chunk(2, dim=-1)
    return torch.nn.functional.silu(a) * b


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


WEIGHTS = [
    ExpertWeights(randn(2 * INTER, HIDDEN, seed=e), randn(HIDDEN, INTER, seed=e + 90))
    for e in range(EXPERTS)
]


def states(placement: Placement, rank: int) -> list[LayerState[SlotAddresses]]:
    held = SlotAddresses.of([WEIGHTS[e] for e in placement.held_by(rank)[0]])
    return [LayerState(expert_tables(placement, rank)[0], held)]


def started(ids: list[int], *, deterministic: bool = False) -> dict[int, ExchangedExperts]:
    tuning = Tuning(workers=2, reducers=4)
    buffers = {
        rank: CudaBuffer(rank, SPEC, timeout_s=20.0, device=CPU, tuning=tuning) for rank in ids
    }
    for buffer in buffers.values():
        buffer.connect({rank: b.address for rank, b in buffers.items()})
    shape = WEIGHTS[0].shape
    return {
        rank: ExchangedExperts(b, 1, EXPERTS, shape, CPU, deterministic=deterministic)
        for rank, b in buffers.items()
    }


def activate(ranks: dict[int, ExchangedExperts], ids: list[int], epoch: int) -> None:
    for rank in ids:
        ranks[rank].buffer.set_active(ids, epoch)
    for rank in ids:
        ranks[rank].buffer.post_vote(b"")
    for rank in ids:
        ranks[rank].buffer.collect_votes(20.0)


def batch(seed: int, tokens: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK).indices
    return randn(tokens, HIDDEN, seed=seed), ids, randn(tokens, TOPK, seed=seed + 1).abs()


def expected(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t, k in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(TOPK)).tolist():
        expert = WEIGHTS[int(ids[t, k])]
        out[t] += weights[t, k] * (expert.down @ gate(expert.gate_up @ x[t]))
    return out


@pytest.mark.slow
def test_a_rank_alone_and_its_padding() -> None:
    ranks = started([0])
    activate(ranks, [0], 1)
    ranks[0].install(ranks[0].stage(states(replan(None, [0], experts=EXPERTS, layers=1), 0)))
    x, ids, weights = batch(1, 4)
    ranks[0].expect(3)
    out = ranks[0].forward(0, x, ids, weights, gate)
    torch.testing.assert_close(out[:3], expected(x, ids, weights)[:3], rtol=1e-4, atol=1e-5)
    assert (out[3] == 0).all()
    ranks[0].buffer.close()


def computed(
    ranks: dict[int, ExchangedExperts], given: dict[int, Batch], place: Placement
) -> dict[int, Tensor]:
    """The sums of a layer, of ranks that exchange."""
    hooks = {}
    for rank, (x, ids, weights) in given.items():
        ranks[rank].install(ranks[rank].stage(states(place, rank)))
        table = ranks[rank]._tables[0]
        hooks[rank] = ranks[rank].buffer.begin_dispatch(x, ids, weights, table)
    got = {rank: hook() for rank, hook in hooks.items()}
    sums = {}
    for rank, received in got.items():
        y = ranks[rank].compute(0, received.indexed, gate, expected=4 * TOPK)
        sums[rank] = ranks[rank].buffer.begin_combine(y, received, reduce=ranks[rank].reduce)
    return {rank: hook() for rank, hook in sums.items()}


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_ranks_give_the_same_sums_under_any_placement(deterministic: bool) -> None:
    """deterministic: with the bits of a rank that holds all experts."""
    ranks = started([0, 1], deterministic=deterministic)
    placement = replan(None, [0, 1], experts=EXPERTS, layers=1)
    turned = Placement(EXPERTS, [{0: [5, 2, 0, 4], 1: [1, 3, 5]}])  # of one there are two
    alone = LocalExperts(0, 1, EXPERTS, WEIGHTS[0].shape, CPU, deterministic=True)
    alone.install(alone.stage(states(replan(None, [0], experts=EXPERTS, layers=1), 0)))
    alone.expect(MAX_TOKENS)
    try:
        for epoch, place in enumerate((placement, turned), 1):
            activate(ranks, [0, 1], epoch)
            given = {0: batch(epoch, 4), 1: batch(epoch + 7, 2)}
            for rank, found in computed(ranks, given, place).items():
                x, ids, weights = given[rank]
                torch.testing.assert_close(found, expected(*given[rank]), rtol=1e-4, atol=1e-5)
                if deterministic:
                    assert torch.equal(found, alone.forward(0, x, ids, weights, gate))
    finally:
        for rank in ranks.values():
            rank.buffer.close()
