"""Layers that C walks give what Python gives, bit for bit, in any epoch; and end as its do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from support.comm_local import Local

from flexpert.comm import BufferSpec, CommError, Interrupted, RankTimeout
from flexpert.comm.buffer import Point, Reduce
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.cpu.program import (
    RowProgram,
    StepWords,
    experts_operation,
    run,
)
from flexpert.kernels.experts import ExpertWeights
from flexpert.models.gate_programs import gate_program
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import Placement, replan
from flexpert.moe.runtime import MoERuntime, expert_tables, replica_routes

EXPERTS, TOPK, HIDDEN, INTER, LAYERS = 6, 3, 32, 16, 2


def swiglu(x: torch.Tensor) -> torch.Tensor:
    half, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(half) * up


def gate_of(dtype: torch.dtype) -> RowProgram:
    gate = gate_program(swiglu, 2 * INTER, dtype)
    assert gate is not None
    return gate


GATES = {dtype: gate_of(dtype) for dtype in (torch.float32, torch.bfloat16)}


class Ranks(Local):
    """Ranks of one model, each with a runtime."""

    def __init__(self, dtype: torch.dtype, reduce: Reduce, members: Iterable[int]) -> None:
        super().__init__()
        dice = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.weights = [
            ExpertWeights(
                torch.randn((2 * INTER, HIDDEN), generator=dice).to(dtype),
                torch.randn((HIDDEN, INTER), generator=dice).to(dtype),
            )
            for _ in range(EXPERTS)
        ]
        spec = BufferSpec(capacity=4, max_tokens=16, hidden=HIDDEN, topk=TOPK, dtype=dtype)
        self.start(spec, members)
        self.moe = {
            rank: MoERuntime(buffer, reduce=reduce, layers=LAYERS, experts=EXPERTS)
            for rank, buffer in self.buffers.items()
        }

    def enter(self, members: Iterable[int], placement: Placement, *, split: bool = False) -> None:
        """An epoch."""
        chosen = tuple(members)
        self.activate(chosen)
        for rank in chosen:
            self.install(rank, placement, split=split)

    def install(self, rank: int, placement: Placement, *, split: bool = False) -> None:
        """split: tokens take turns with the replicas of an expert."""
        routes = [(route.table, route.split) for route in replica_routes(placement, rank)]
        if not split:
            routes = [(table, None) for table in expert_tables(placement, rank)]
        layers = [
            LayerState(
                table,
                LayerExperts([self.weights[e] for e in held], deterministic=True),
                turns,
            )
            for (table, turns), held in zip(routes, placement.held_by(rank), strict=True)
        ]
        self.moe[rank].install(self.moe[rank].stage(layers))

    def tokens(self, rank: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dice = torch.Generator().manual_seed(100 * rank + count)
        ids = [torch.randperm(EXPERTS, generator=dice)[:TOPK] for _ in range(count)]
        return (
            torch.randn((count, HIDDEN), generator=dice).to(self.dtype),
            torch.stack(ids) if ids else torch.empty((0, TOPK), dtype=torch.int64),
            torch.rand((count, TOPK), generator=dice).to(self.dtype),
        )

    def in_c(self, rank: int, count: int) -> tuple[int, torch.Tensor]:
        """Both layers, each of the same tokens: how many were walked, and the last one's result."""
        x, ids, weights = self.tokens(rank, count)
        out = torch.full_like(x, 7.0)
        addresses = [one.data_ptr() for one in (out, x, ids, weights)]
        words = np.array(
            [
                experts_operation(
                    layer,
                    (self.dtype, self.dtype),
                    (count, TOPK),
                    addresses,
                    GATES[self.dtype],
                )
                for layer in range(LAYERS)
            ],
            dtype=np.int64,
        )
        with self.moe[rank].native() as moe:
            reached = run(words, 0, LAYERS, StepWords(), moe)
        return reached, out

    def in_python(self, rank: int, count: int) -> torch.Tensor:
        gate = GATES[self.dtype]
        given = self.tokens(rank, count)
        return [self.moe[rank].forward(layer, *given, gate) for layer in range(LAYERS)][-1]


def spread(members: Iterable[int], redundant: int = 0) -> Placement:
    return replan(None, members, experts=EXPERTS, layers=LAYERS, redundant=redundant)


@pytest.mark.parametrize("reduce", ["home", "rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_gives_what_python_gives_in_every_epoch(dtype: torch.dtype, reduce: Reduce) -> None:
    counts = {0: 5, 1: 0, 2: 13}
    with Ranks(dtype, reduce, range(3)) as ranks:
        for members, redundant in (((0, 1, 2), 0), ((0, 2), 4), ((2,), 0), ((0, 1, 2), 6)):
            ranks.enter(members, spread(members, redundant), split=redundant > 0)
            expected = ranks.each(members, lambda b: ranks.in_python(b.rank, counts[b.rank]))
            found = ranks.each(members, lambda b: ranks.in_c(b.rank, counts[b.rank]))
            for rank in members:
                assert found[rank][0] == LAYERS
                assert torch.equal(found[rank][1], expected[rank])
        for rank, moe in ranks.moe.items():
            counted = moe.loads()
            assert counted is not None
            epochs = sum(rank in members for members in ((0, 1, 2), (0, 2), (2,), (0, 1, 2)))
            assert counted.choices.sum() == 2 * epochs * LAYERS * counts[rank] * TOPK
            assert moe.walked == 2 * epochs * LAYERS
            assert ranks.buffers[rank].statistics().exchanges == 2 * epochs * LAYERS


def test_c_and_python_may_take_turns_within_a_step() -> None:
    """Each rank for itself: the others see no difference."""
    with Ranks(torch.bfloat16, "home", range(2)) as ranks:
        ranks.enter(range(2), spread(range(2)))
        expected = ranks.each(range(2), lambda b: ranks.in_python(b.rank, 4))
        found = ranks.each(
            range(2), lambda b: ranks.in_python(0, 4) if b.rank == 0 else ranks.in_c(1, 4)[1]
        )
        for rank in range(2):
            assert torch.equal(found[rank], expected[rank])


def test_a_layer_with_an_expert_that_nobody_holds_is_left_to_python() -> None:
    holes = Placement(EXPERTS, [{0: list(range(EXPERTS))}, {0: [4, 1, 0]}])
    with Ranks(torch.float32, "home", [0]) as ranks:
        ranks.enter([0], holes)
        reached, out = ranks.in_c(0, 4)
        assert reached == 1
        assert not (out == 7).any()


def test_an_expert_that_does_not_exist_is_pythons_error() -> None:
    with Ranks(torch.float32, "home", [0]) as ranks:
        ranks.enter([0], spread([0]))
        ranks.tokens = lambda rank, count: (  # type: ignore[method-assign]
            torch.zeros((1, HIDDEN)),
            torch.tensor([[0, EXPERTS, 1]]),
            torch.ones((1, TOPK)),
        )
        assert ranks.in_c(0, 1)[0] == 0
        with pytest.raises(ValueError):  # noqa: PT011 - of numpy
            ranks.in_python(0, 1)


def test_a_change_that_is_noted_takes_effect_before_the_next_layer() -> None:
    """As between two exchanges of Python: C leaves the layer, and goes on after it."""
    with Ranks(torch.float32, "home", range(2)) as ranks:
        ranks.enter([0], spread([0]))
        buffer = ranks.buffers[0]
        with buffer.native():
            worker = threading.Thread(target=buffer.disconnect, args=([1],))
            worker.start()
            worker.join()
            assert buffer.connected == (0,)
            assert buffer._core.b.changed
        ranks.in_c(0, 3)
        assert not buffer._core.b.changed
        assert ranks.in_c(0, 3)[0] == LAYERS


@pytest.mark.parametrize("point", ["dispatch_send", "dispatch_wait", "combine_send"])
def test_a_rank_that_stops_in_the_middle_is_named_by_the_others(point: Point) -> None:
    """And the epoch that follows finds all as if the step had not begun."""

    class Ends(Exception):  # noqa: N818
        pass

    with Ranks(torch.bfloat16, "rank", range(2)) as ranks:
        ranks.enter(range(2), spread(range(2)))
        expected = ranks.each(range(2), lambda b: ranks.in_c(b.rank, 3))
        ranks.buffers[0].timeout_s = 0.2
        native = ranks.buffers[1].native

        def ends(at: Point) -> None:
            if at == point:
                raise Ends

        ranks.buffers[1].native = lambda tell=None: native(ends)  # type: ignore[method-assign]
        stopped = ranks.pool.submit(ranks.in_c, 1, 3)
        with pytest.raises(RankTimeout) as raised:
            ranks.in_c(0, 3)
        assert raised.value.ranks == (1,)
        with pytest.raises(Ends):
            stopped.result(5)
        with pytest.raises(CommError):
            ranks.in_c(0, 3)  # the epoch is over
        ranks.buffers[1].native = native  # type: ignore[method-assign]
        ranks.buffers[0].timeout_s = 30.0
        ranks.enter(range(2), spread(range(2)))
        again = ranks.each(range(2), lambda b: ranks.in_c(b.rank, 3))
        for rank in range(2):
            assert torch.equal(again[rank][1], expected[rank][1])


def test_an_interrupt_ends_the_wait() -> None:
    with Ranks(torch.bfloat16, "rank", range(2)) as ranks:
        ranks.enter(range(2), spread(range(2)))
        waiting = ranks.pool.submit(ranks.in_c, 0, 3)
        deadline = time.monotonic() + 5
        while not ranks.buffers[0].turns and time.monotonic() < deadline:
            time.sleep(0.001)
        ranks.buffers[0].interrupt()
        with pytest.raises(Interrupted):
            waiting.result(5)


def test_another_mode_of_a_peer_is_named() -> None:
    with Ranks(torch.bfloat16, "rank", range(2)) as ranks:
        ranks.enter(range(2), spread(range(2)))
        ranks.moe[1] = MoERuntime(ranks.buffers[1], reduce="home")
        ranks.install(1, spread(range(2)))
        jobs = [ranks.pool.submit(ranks.in_c, rank, 3) for rank in range(2)]
        for rank, job in enumerate(jobs):
            with pytest.raises(CommError, match=f"rank {1 - rank} sent another reduce mode"):
                job.result(10)
