"""Ranks that call nixl_ep's interface, a thread each, and an oracle of what they must see.

The oracle knows the contract and nothing of flexpert: expert e is number e % experts_per_rank on
rank e // experts_per_rank, and multiplies a row by `factor(e)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import HashStore

from flexpert.compat.nixl_ep import Buffer

LIMIT_S = 60.0
LOW = (1 << 32) - 1


@dataclass(frozen=True)
class Input:
    """What one rank passes to dispatch and combine."""

    x: torch.Tensor  # [tokens, hidden] bfloat16
    experts: torch.Tensor  # [tokens, k] int64
    weights: torch.Tensor  # [tokens, k] float32


@dataclass(frozen=True)
class Setup:
    capacity: int = 4
    max_tokens: int = 8
    hidden: int = 512
    experts_per_rank: int = 3

    def hint(self) -> int:
        return Buffer.get_rdma_size_hint(
            self.max_tokens, self.hidden, self.capacity, self.capacity * self.experts_per_rank
        )


class Ranks:
    """Buffers by id, connected through one store."""

    def __init__(self, setup: Setup | None = None) -> None:
        self.setup = setup or Setup()
        self.store = HashStore()
        self.buffers: dict[int, Buffer] = {}
        self.pool = ThreadPoolExecutor(16)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self.buffers.values():
            buffer.destroy()
        self.pool.shutdown()

    def add(self, rank: int, *, timeout_ms: int = 60_000) -> Buffer:
        """A buffer with memory, not connected."""
        setup = self.setup
        buffer = Buffer(
            rank=rank, explicitly_destroy=True, tcp_store_group=self.store, timeout_ms=timeout_ms
        )
        self.buffers[rank] = buffer
        buffer.update_memory_buffers(setup.capacity, setup.experts_per_rank, setup.hint())
        return buffer

    def start(self, ids: Iterable[int], *, timeout_ms: int = 60_000) -> None:
        """Add buffers, connect all with all, and exchange once, so that all links are up."""
        chosen = list(ids)
        for rank in chosen:
            self.add(rank, timeout_ms=timeout_ms)
        self.each(chosen, lambda b: b.connect_ranks(chosen))
        self.exchange(chosen, seed=0)

    def each(self, ids: Iterable[int], call: Callable[[Buffer], Any]) -> dict[int, Any]:
        """Have all these ranks do something at the same time."""
        jobs = {rank: self.pool.submit(call, self.buffers[rank]) for rank in ids}
        return {rank: job.result(LIMIT_S) for rank, job in jobs.items()}

    def inputs(self, ids: Iterable[int], seed: int, *, k: int = 3) -> dict[int, Input]:
        return {rank: make_input(self.setup, rank, seed, k=k) for rank in ids}

    def exchange(self, ids: Iterable[int], seed: int) -> None:
        """One dispatch and combine in bfloat16, checked."""
        sent = self.inputs(ids, seed)
        setup = self.setup

        def run(buffer: Buffer) -> None:
            mine = sent[buffer.rank]
            recv_x, count, handle, _, _ = buffer.dispatch(
                mine.x, mine.experts, setup.max_tokens, use_fp8=False
            )
            check_dispatched(setup, sent, buffer.rank, recv_x, count, handle)
            y = apply_experts(setup, buffer.rank, recv_x)
            out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
            check_combined(setup, mine, out, up=set(sent))

        self.each(sent, run)


def make_input(setup: Setup, rank: int, seed: int, *, k: int = 3) -> Input:
    """Random tokens, some choices -1; no token chooses an expert twice."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = int(torch.randint(0, setup.max_tokens + 1, (1,), generator=generator))
    experts = setup.capacity * setup.experts_per_rank
    scores = torch.rand(tokens, experts, generator=generator)
    chosen = scores.topk(k, dim=1).indices
    chosen[torch.rand(tokens, k, generator=generator) < 0.1] = -1
    return Input(
        torch.randn(tokens, setup.hidden, generator=generator).bfloat16(),
        chosen,
        torch.rand(tokens, k, generator=generator),
    )


def factor(expert: int) -> float:
    """Exact in bfloat16, as is its product with a row of few bits."""
    return 1.0 + 0.5 * (expert % 4)


def apply_experts(setup: Setup, rank: int, recv_x: torch.Tensor) -> torch.Tensor:
    """recv_x: [experts_per_rank, limit, hidden] bfloat16 → the same shape."""
    first = rank * setup.experts_per_rank
    factors = torch.tensor([factor(first + e) for e in range(setup.experts_per_rank)])
    return (recv_x.float() * factors[:, None, None]).bfloat16()


def routed(setup: Setup, sent: Mapping[int, Input], rank: int) -> list[list[tuple[int, int]]]:
    """For each local expert of a rank: (source rank, token) of its rows, in order."""
    rows: list[list[tuple[int, int]]] = [[] for _ in range(setup.experts_per_rank)]
    for source in sorted(sent):
        for token, experts in enumerate(sent[source].experts.tolist()):
            for expert in experts:
                if expert >= 0 and expert // setup.experts_per_rank == rank:
                    rows[expert % setup.experts_per_rank].append((source, token))
    return rows


def check_dispatched(
    setup: Setup,
    sent: Mapping[int, Input],
    rank: int,
    recv_x: torch.Tensor,
    count: torch.Tensor,
    handle: tuple[torch.Tensor, torch.Tensor, int, int],
) -> None:
    """recv_x: [experts_per_rank, limit, hidden] bfloat16: every row bit for bit."""
    src_info, layout_range, max_tokens, hidden = handle
    ranks = layout_range.shape[1]
    limit = ranks * setup.max_tokens
    assert max_tokens == setup.max_tokens
    assert hidden == recv_x.shape[2] == next(iter(sent.values())).x.shape[1]
    assert recv_x.shape[:2] == src_info.shape == (setup.experts_per_rank, limit)
    assert (count.dtype, src_info.dtype, layout_range.dtype) == (
        torch.int32,
        torch.int32,
        torch.int64,
    )
    for expert, rows in enumerate(routed(setup, sent, rank)):
        assert int(count[expert]) == len(rows)
        assert src_info[expert, : len(rows)].tolist() == [token for _, token in rows]
        for row, (source, token) in enumerate(rows):
            assert torch.equal(recv_x[expert, row], sent[source].x[token])
        begin = 0
        for source in range(ranks):
            number = sum(1 for s, _ in rows if s == source)
            entry = int(layout_range[expert, source])
            assert (entry >> 32, entry & LOW) == (begin, number)
            begin += number


def check_combined(
    setup: Setup,
    mine: Input,
    out: torch.Tensor,
    *,
    up: set[int],
    error: float = 2**-8,
) -> None:
    """out: [tokens, hidden] bfloat16 against float64 sums over the experts of ranks that are up.

    error: relative error of one row; the default is that of rounding to bfloat16.
    """
    assert out.dtype is torch.bfloat16
    assert out.shape == mine.x.shape
    want = torch.zeros(mine.x.shape, dtype=torch.float64)
    size = torch.zeros(mine.x.shape, dtype=torch.float64)
    for token, experts in enumerate(mine.experts.tolist()):
        for choice, expert in enumerate(experts):
            if expert >= 0 and expert // setup.experts_per_rank in up:
                part = (
                    mine.x[token].double() * factor(expert) * mine.weights[token, choice].double()
                )
                want[token] += part
                size[token] += part.abs()
    assert bool(((out.double() - want).abs() <= 2 * error * size + 1e-30).all())
