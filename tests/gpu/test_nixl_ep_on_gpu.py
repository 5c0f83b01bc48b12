"""Backend "nixl_ep", NVIDIA's kernels, against the oracle: one rank and two.

Each rank is a process. With two: joins and leaves, an exchange that one of them breaks off, a rank
that is silent, and, where this nixl_ep can, one captured graph through all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.comm_ranks import Rank, vote
from support.nixl_backend_local import check_sums, exchange, results, sent_by

from flexpert.comm import Buffer, BufferSpec, ExpertTable, RankTimeout
from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer

SPEC = BufferSpec(2, 32, 2048, 4, torch.bfloat16)
SLOTS = 11
LIMIT_S = 5.0
KINDS = (None, "float32", "power2", "ue8m0")


# ---- what a rank does ---------------------------------------------------------------------------


def connect(buffer: Buffer, addresses: dict[int, bytes]) -> None:
    buffer.connect(addresses)


def enter(buffer: Buffer, ids: tuple[int, ...], epoch: int) -> None:
    buffer.set_active(ids, epoch)
    vote(buffer)


def exchanges(buffer: Buffer, ids: tuple[int, ...], seed: int, fp8: Any) -> None:
    assert isinstance(buffer, NixlEpBuffer)
    for turn in range(seed, seed + 6):
        exchange(buffer, sent_by(ids, turn, spec=SPEC), fp8, exact=not buffer._cuda)


def break_off(buffer: Buffer, ids: tuple[int, ...]) -> None:
    """Send, and never receive."""
    s = on(buffer, sent_by(ids, 2, spec=SPEC)[buffer.rank])
    buffer.begin_dispatch(*s)
    buffer.interrupt()


def wait_in_vain(buffer: Buffer, ids: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    began = time.monotonic()
    try:
        buffer.dispatch(*on(buffer, sent_by(ids, 2, spec=SPEC)[buffer.rank]))
    except RankTimeout as error:
        return error.ranks, time.monotonic() - began
    raise AssertionError("nobody was missed")


def on(buffer: Any, s: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ExpertTable]:
    device = buffer.device
    table = ExpertTable(s.table.rank.to(device), s.table.slot.to(device), s.table.slots)
    return s.x.to(device), s.expert_ids.to(device), s.weights.to(device), table


class Layer:
    """A captured graph of one rank: dispatch, experts, combine; inputs are rewritten in place."""

    def __init__(self, buffer: NixlEpBuffer) -> None:
        self.buffer = buffer
        device, tokens = buffer.device, SPEC.max_tokens
        self.x = torch.zeros((tokens, SPEC.hidden), dtype=SPEC.dtype, device=device)
        self.ids = torch.full((tokens, SPEC.topk), -1, device=device)
        self.weights = torch.zeros((tokens, SPEC.topk), device=device)
        none = torch.full((10,), -1, dtype=torch.int32, device=device)
        self.table = ExpertTable(none, none.clone(), SLOTS)
        self.out = torch.zeros_like(self.x)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.walk()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.walk()

    def walk(self) -> None:
        got = self.buffer.dispatch(self.x, self.ids, self.weights, self.table)
        at = got.indexed
        row = torch.arange(at.rows.shape[0], device=self.x.device, dtype=torch.int32)
        slot = torch.searchsorted(at.offsets[1:], row, right=True)
        y = at.payload[at.rows.long()].float() * (1.0 + 0.25 * slot.float()[:, None])
        if not torch.cuda.is_current_stream_capturing():
            y = y[: got.count]
        self.buffer.combine(y.to(SPEC.dtype), got, out=self.out)

    def replay(self, s: Any) -> torch.Tensor:
        x, ids, weights, table = on(self.buffer, s)
        n, k = ids.shape
        self.x.zero_()
        self.ids.fill_(-1)
        self.weights.zero_()
        self.x[:n], self.ids[:n, :k], self.weights[:n, :k] = x, ids, weights
        self.table.rank.copy_(table.rank)
        self.table.slot.copy_(table.slot)
        self.graph.replay()
        self.buffer.check()
        return self.out[:n].cpu()


LAYERS: list[Layer] = []


def capture(buffer: Buffer) -> bool:
    """While alone, before anybody has joined. Returns whether it can be done at all."""
    assert isinstance(buffer, NixlEpBuffer)
    if not buffer._cuda or not buffer.capabilities.graph_capture:
        return False
    LAYERS.append(Layer(buffer))
    return True


def replays(buffer: Buffer, ids: tuple[int, ...], seed: int) -> None:
    for turn in range(seed, seed + 6):
        sent = sent_by(ids, turn, spec=SPEC)
        out = LAYERS[0].replay(sent[buffer.rank])
        check_sums(out, sent, results(sent), buffer.rank)


# ---- what is checked ----------------------------------------------------------------------------


class Ranks:
    def __init__(self, count: int) -> None:
        self.ranks = [
            Rank(rank, SPEC, backend="nixl_ep", slots=SLOTS, timeout_s=LIMIT_S)
            for rank in range(count)
        ]
        self.epoch = 0

    def have(self, ids: tuple[int, ...], task: Callable[..., Any], *args: Any) -> list[Any]:
        for rank in ids:
            self.ranks[rank].ask(task, *args)
        return [self.ranks[rank].answer() for rank in ids]

    def activate(self, ids: tuple[int, ...]) -> None:
        self.epoch += 1
        self.have(ids, enter, ids, self.epoch)

    def stop(self) -> None:
        for rank in self.ranks:
            rank.kill()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    pytest.importorskip("nixl_ep")
    monkeypatch.delenv("FLEXPERT_NIXL_EP_DEVICE", raising=False)
    every: list[Ranks] = []

    def start(count: int) -> Ranks:
        every.append(Ranks(count))
        return every[-1]

    yield start
    for ranks in every:
        ranks.stop()


def test_one_rank(started: Callable[[int], Ranks]) -> None:
    ranks = started(1)
    for kind in KINDS:
        ranks.have((0,), exchanges, (0,), 10, kind)
        print(f"alone, {kind or 'rows as they are'}: as the oracle says", flush=True)
    ranks.activate((0,))
    ranks.have((0,), exchanges, (0,), 20, None)
    ranks.have((0,), break_off, (0,))
    ranks.activate((0,))
    ranks.have((0,), exchanges, (0,), 30, None)
    print("alone, after an exchange that was broken off: whole again", flush=True)


@pytest.mark.usefixtures("shared_gpu")
def test_two_ranks(started: Callable[[int], Ranks]) -> None:
    ranks = started(2)
    both = (0, 1)
    captured = all(ranks.have(both, capture))
    print("captured" if captured else "not captured: this nixl_ep or device cannot", flush=True)
    ranks.have(both, connect, {rank: r.address for rank, r in enumerate(ranks.ranks)})
    print("connected", flush=True)
    for turn, ids in enumerate([(0,), both, (1,), both, (0,), both]):
        ranks.activate(ids)
        ranks.have(ids, exchanges, ids, 100 * turn, None)
        if captured:
            ranks.have(ids, replays, ids, 100 * turn + 50)
        print(f"epoch of {ids}: as the oracle says", flush=True)
    for kind in KINDS[1:]:
        ranks.have(both, exchanges, both, 700, kind)
        print(f"two ranks, {kind}: as the oracle says", flush=True)
    for broken in both:
        ranks.have((broken,), break_off, both)
        ranks.activate(both)
        ranks.have(both, exchanges, both, 800 + 10 * broken, None)
        print(f"after rank {broken} broke an exchange off: whole again", flush=True)
    ((missing, waited_s),) = ranks.have((0,), wait_in_vain, both)
    assert missing == (1,), missing
    print(f"a silent rank is named after {waited_s:.1f} s (limit {LIMIT_S:.1f} s)", flush=True)
    ranks.activate((0,))
    ranks.have((0,), exchanges, (0,), 900, None)
    ranks.activate(both)
    ranks.have(both, exchanges, both, 910, None)
    if captured:
        ranks.have(both, replays, both, 950)
    print("and takes part again in the next epoch", flush=True)
