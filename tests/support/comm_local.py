"""Several ranks in the test's own process: quick to start, and open to a look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from flexpert.comm import Buffer, BufferSpec, Received
from flexpert.comm.buffer import OnTimeout, Reduce
from flexpert.comm.host._kernels import ffi
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.routing import Sent, expected_rows, expected_sums
from support.comm_ranks import LIMIT_S, apply_experts, vote


class Local:
    """Buffers by id. `each` runs a call on all given ranks at once, a thread for each."""

    def __init__(self) -> None:
        self.buffers: dict[int, HostBuffer] = {}
        self.pool = ThreadPoolExecutor(32)
        self.epoch = 0

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self.buffers.values():
            buffer.close()
        self.pool.shutdown()

    def start(
        self, spec: BufferSpec, ids: Iterable[int], on_timeout: OnTimeout = "raise"
    ) -> dict[int, HostBuffer]:
        """Create the buffers and connect all with all."""
        for rank in ids:
            self.start_one(spec, rank, on_timeout)
        self.connect_all()
        return self.buffers

    def start_one(self, spec: BufferSpec, rank: int, on_timeout: OnTimeout = "raise") -> None:
        self.buffers[rank] = HostBuffer(rank, spec, timeout_s=LIMIT_S, on_timeout=on_timeout)

    def connect_all(self) -> None:
        addresses = {rank: buffer.address for rank, buffer in self.buffers.items()}
        for buffer in self.buffers.values():
            buffer.connect(addresses)

    def activate(self, ids: Iterable[int]) -> None:
        """A new epoch for these ids, with its first vote."""
        self.epoch += 1
        chosen = tuple(ids)
        for rank in chosen:
            self.buffers[rank].set_active(chosen, self.epoch)
        self.each(chosen, vote)

    def each(self, ids: Iterable[int], call: Callable[..., Any], *args: Any) -> dict[int, Any]:
        started = {rank: self.pool.submit(call, self.buffers[rank], *args) for rank in ids}
        return {rank: job.result(LIMIT_S) for rank, job in started.items()}

    def exchange(self, sent: dict[int, Sent], reduce: Reduce) -> None:
        """One dispatch and combine of all ranks in `sent`, held against the oracle."""
        received = self.each(sent, lambda b: dispatch(b, sent[b.rank]))
        y = {}
        for rank, got in received.items():
            check_received(got, sent, rank)
            y[rank] = apply_experts(got.x, got.offsets)

        def combined(b: HostBuffer) -> torch.Tensor:
            got = received[b.rank]
            return b.combine(placed(b, got, y[b.rank]), got, reduce=reduce)

        sums = self.each(sent, combined)
        for rank in sent:
            assert same_bits(sums[rank], expected_sums(sent, y, rank, reduce))


def dispatch(buffer: Buffer, s: Sent, timeout_s: float | None = None) -> Received:
    return buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, timeout_s=timeout_s)


def placed(buffer: Buffer, received: Received, y: torch.Tensor) -> torch.Tensor:
    """The results of experts where combine may take them from: of two ranks, and of two exchanges,
    one has them where peers read them, the other where they are sent from."""
    if (received.sequence + buffer.active.index(buffer.rank)) % 2:
        return buffer.combine_input(received).copy_(y)
    return y


def check_received(got: Received, sent: dict[int, Sent], rank: int) -> None:
    x, offsets, weights = expected_rows(sent, rank)
    assert torch.equal(got.offsets, offsets)
    assert same_bits(got.x, x)
    assert same_bits(got.weights, weights)
    assert got.tokens_sent == sent[rank].x.shape[0]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    kind = torch.int32 if a.dtype.itemsize == 4 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def poke(address: int, data: bytes) -> None:
    """Write into a window as only a broken peer would."""
    ffi.buffer(ffi.cast("char *", address), len(data))[:] = data


def masked_ids(s: Sent, view: set[int]) -> torch.Tensor:
    """The choices whose owners are in view; -1 for the others."""
    owners = s.table.rank[s.expert_ids.clamp(min=0).long()]
    up = torch.isin(owners, torch.tensor(sorted(view), dtype=torch.int32))
    return torch.where(up & (s.expert_ids >= 0), s.expert_ids, -1)


def applied(s: Sent, reduce: str) -> torch.Tensor:
    """The sums of `apply_experts` over a rank's own tokens, rounded where `reduce` rounds."""
    out = torch.zeros(s.x.shape, dtype=torch.float32)
    partial: dict[tuple[int, int], torch.Tensor] = {}
    for token, experts in enumerate(s.expert_ids.tolist()):
        for choice, expert in enumerate(experts):
            if expert < 0:
                continue
            row = (s.x[token].float() * (1.0 + 0.25 * int(s.table.slot[expert]))).to(s.x.dtype)
            value = s.weights[token, choice] * row.float()
            if reduce == "home":
                out[token] += value
            else:
                key = (token, int(s.table.rank[expert]))
                partial[key] = partial.get(key, torch.zeros_like(value)) + value
    for token, owner in sorted(partial):
        out[token] += partial[token, owner].to(s.x.dtype).float()
    return out.to(s.x.dtype)
