"""GPU ranks in processes of their own: what the interpreter cannot show. Needs a GPU.

Ranks on one GPU run at the same time only under NVIDIA's MPS; without it they take turns, and a
killed rank takes nobody down. `make test-gpu` runs both.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from support.comm_local import same_bits
from support.comm_ranks import (
    LIMIT_S,
    Rank,
    connect,
    disconnect,
    random_sent,
    random_table,
    vote,
)
from support.gpu_exchanges import exchanges, placed, results

from flexpert.comm import Buffer, BufferSpec, RankLost, RankTimeout
from flexpert.comm.buffer import Reduce, Scales
from flexpert.comm.routing import Sent, expected_sums

HAS_GPU = torch.cuda.is_available()
MPS = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="needs a GPU; make test-gpu runs it on one"),
]

SPEC = BufferSpec(4, 32, 512, 4, torch.bfloat16)
TRIALS = int(os.environ.get("FLEXPERT_KILL_TRIALS", "4"))
BATCH = min(TRIALS, 10)  # victims that are started together


def start(ids: tuple[int, ...], spec: BufferSpec = SPEC, **options: Any) -> dict[int, Rank]:
    with ThreadPoolExecutor(len(ids)) as pool:  # a CUDA context takes its time
        made = pool.map(lambda rank: Rank(rank, spec, backend="cuda", **options), ids)
        ranks = dict(zip(ids, made, strict=True))
    everybody(ranks, ids, connect, {rank: r.address for rank, r in ranks.items()})
    return ranks


def everybody(ranks: dict[int, Rank], ids: tuple[int, ...], task: Any, *args: Any) -> list[Any]:
    for rank in ids:
        ranks[rank].ask(task, *args)
    return [ranks[rank].answer() for rank in ids]


def stop(ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        rank.kill()


def begin(buffer: Buffer, ids: tuple[int, ...], epoch: int) -> None:
    buffer.set_active(ids, epoch)
    vote(buffer)


@pytest.mark.parametrize(
    ("dtype", "reduce", "fp8"),
    [
        (torch.bfloat16, "rank", None),
        (torch.bfloat16, "home", None),
        (torch.float16, "rank", None),
        (torch.float32, "home", None),
        (torch.bfloat16, "rank", "float32"),
        (torch.bfloat16, "rank", "power2"),
        (torch.float32, "rank", "ue8m0"),
    ],
    ids=str,
)
def test_processes_exchange_what_the_oracle_says(
    dtype: torch.dtype, reduce: Reduce, fp8: Scales | None
) -> None:
    ranks = start((0, 1, 3), replace(SPEC, dtype=dtype), timeout_s=10.0)
    try:
        for epoch, ids in enumerate([(0,), (0, 3), (1, 3), (0, 1, 3)], 1):
            everybody(ranks, ids, begin, ids, epoch)
            seeds = range(10 * epoch, 10 * epoch + 4)
            assert everybody(ranks, ids, exchanges, ids, seeds, reduce, fp8) == [4] * len(ids)
    finally:
        stop(ranks)


class Layer:
    """A captured graph of one rank: dispatch, experts, combine; inputs are rewritten in place."""

    captures = 0

    def __init__(self, buffer: Buffer, tokens: int, experts: int, slots: int) -> None:
        from flexpert.comm.cuda.cuda_received import CudaReceived

        spec = buffer.spec
        self.tokens = tokens
        self.x = torch.zeros((tokens, spec.hidden), dtype=spec.dtype, device="cuda")
        self.ids = torch.full((tokens, spec.topk), -1, device="cuda")
        self.weights = torch.zeros((tokens, spec.topk), device="cuda")
        none = torch.full((experts,), -1, dtype=torch.int32, device="cuda")
        self.table = replace(
            random_table((0,), experts, 0, 0), rank=none, slot=none.clone(), slots=slots
        )
        self.out = torch.zeros_like(self.x)

        def run() -> None:
            got = cast(CudaReceived, buffer.dispatch(self.x, self.ids, self.weights, self.table))
            indexed = got.indexed
            places = torch.arange(indexed.rows.shape[0], device="cuda", dtype=torch.int32)
            slot = torch.searchsorted(indexed.offsets[1:], places, right=True)
            rows = indexed.payload[indexed.rows.long()]
            y = rows.float() * (1.0 + 0.25 * slot.float()[:, None])
            buffer.combine(y.to(spec.dtype), got, out=self.out)

        warm_up = torch.cuda.Stream()  # whose buffer is alone: every rank warms up by itself
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            got = buffer.dispatch(self.x, self.ids, self.weights, self.table)
            buffer.combine(buffer.combine_input(got), got, out=self.out)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()
        self.captures += 1

    def load(self, s: Sent) -> None:
        n, k = s.expert_ids.shape
        self.x.zero_()
        self.ids.fill_(-1)
        self.weights.zero_()
        self.x[:n] = s.x.cuda()
        self.ids[:n, :k] = s.expert_ids.cuda()
        self.weights[:n, :k] = s.weights.cuda()
        self.table.rank.copy_(s.table.rank)
        self.table.slot.copy_(s.table.slot)


LAYERS: dict[int, Layer] = {}
EXPERTS = 10
SLOTS = EXPERTS + 1  # as random_table deals them out to one rank


def capture(buffer: Buffer) -> int:
    buffer.set_active((buffer.rank,), 1)
    vote(buffer)
    LAYERS[buffer.rank] = Layer(buffer, SPEC.max_tokens, EXPERTS, slots=SLOTS)
    return LAYERS[buffer.rank].captures


def replay(buffer: Buffer, ids: tuple[int, ...], seeds: range) -> int:
    """Replays of the one graph; each seed is another input and another placement."""
    from flexpert.comm.cuda.cuda_buffer import CudaBuffer

    layer = LAYERS[buffer.rank]
    for seed in seeds:
        sent = random_sent(buffer.spec, ids, seed, experts=EXPERTS)
        sent = {rank: replace(s, table=replace(s.table, slots=SLOTS)) for rank, s in sent.items()}
        layer.load(sent[buffer.rank])
        layer.graph.replay()
        cast(CudaBuffer, buffer).check()
        s = sent[buffer.rank]
        desired = expected_sums(sent, results(sent, ids), buffer.rank, "rank")
        assert same_bits(layer.out[: s.x.shape[0]].cpu(), desired), (ids, seed)
    return layer.captures


def test_one_captured_graph_is_right_over_joins_leaves_and_placements() -> None:
    ids = (0, 1, 2)
    ranks = start(ids, timeout_s=10.0)
    try:
        everybody(ranks, ids, capture)
        late = Rank(3, SPEC, backend="cuda", timeout_s=10.0)
        epoch = 1
        for now in [(0,), (0, 1), (0, 1, 2), (2,), (1, 2), (0, 1, 2)]:
            epoch += 1
            everybody(ranks, now, begin, now, epoch)
            seeds = range(10 * epoch, 10 * epoch + 5)
            assert everybody(ranks, now, replay, now, seeds) == [1] * len(now)
        ranks[3] = late  # a newcomer joins ranks whose graphs were captured before it was there
        everybody(ranks, (0, 1, 2, 3), connect, {r: rank.address for r, rank in ranks.items()})
        ranks[3].ask(capture)
        assert ranks[3].answer() == 1
        for now in [(0, 1, 2, 3), (3,), (1, 3)]:
            epoch += 1
            everybody(ranks, now, begin, now, epoch)
            seeds = range(10 * epoch, 10 * epoch + 5)
            assert everybody(ranks, now, replay, now, seeds) == [1] * len(now)
    finally:
        stop(ranks)


def exchange_for_ever(buffer: Buffer, ids: tuple[int, ...], seed: int) -> tuple[str, float]:
    """Until a peer is lost; returns the error, and when it was raised."""
    sent = random_sent(buffer.spec, ids, seed)
    s = placed(sent[buffer.rank])
    y = results(sent, ids)
    mine, desired = y[buffer.rank].cuda(), expected_sums(sent, y, buffer.rank, "rank")
    while True:
        try:
            got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
            out = buffer.combine(mine, got)
            buffer.check()
        except (RankLost, RankTimeout) as error:
            return f"{type(error).__name__}: {error}", time.monotonic()
        assert same_bits(out.cpu(), desired)


@pytest.mark.timeout(600)
@pytest.mark.skipif(MPS, reason="under MPS a killed rank takes the others down with it")
def test_a_killed_peer_is_named_and_the_survivor_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = replace(SPEC, capacity=1 + BATCH)
    dice = random.Random(7)
    survivor = Rank(0, spec, backend="cuda", timeout_s=2.0)
    epoch, delays = 0, []
    victims: dict[int, Rank] = {}
    try:
        for trial in range(TRIALS):
            if not victims:
                ids = tuple(range(1, 1 + BATCH))
                with ThreadPoolExecutor(BATCH) as pool:
                    made = pool.map(lambda r: Rank(r, spec, backend="cuda", timeout_s=2.0), ids)
                    victims = dict(zip(ids, made, strict=True))
                survivor.ask(disconnect, ids)
                survivor.answer()
                survivor.ask(connect, {r: v.address for r, v in victims.items()})
                survivor.answer()
                for victim in victims.values():
                    victim.ask(connect, {0: survivor.address})
                for victim in victims.values():
                    victim.answer()
            rank, victim = victims.popitem()
            both, epoch = (0, rank), epoch + 1
            everybody({0: survivor, rank: victim}, both, begin, both, epoch)
            everybody({0: survivor, rank: victim}, both, exchanges, both, range(2), "rank", None)
            survivor.ask(exchange_for_ever, both, trial)
            victim.ask(exchange_for_ever, both, trial)
            time.sleep(dice.uniform(0.005, 0.05))  # into the middle of an exchange
            killed = time.monotonic()
            victim.kill()
            error, noticed = survivor.answer()
            assert f"rank {rank}" in error, error
            delays.append(noticed - killed)
            epoch += 1
            survivor.ask(begin, (0,), epoch)
            survivor.answer()
            survivor.ask(exchanges, (0,), range(trial, trial + 3), "rank", None)
            assert survivor.answer() == 3
    finally:
        stop({0: survivor, **victims})
    assert max(delays) < min(2.5, LIMIT_S)
    with capsys.disabled():
        ordered = sorted(delays)
        print(
            f"\n{len(delays)} kills: noticed after {ordered[len(ordered) // 2] * 1e3:.0f} ms "
            f"(median), {ordered[-1] * 1e3:.0f} ms (worst)"
        )
