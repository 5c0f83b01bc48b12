"""Ranks of backend "nixl_ep" in the test's own process, over nixl_ep's interface on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from flexpert.comm import BufferSpec, ExpertTable
from flexpert.comm.buffer import Scales
from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer
from flexpert.comm.nixl_ep.nixl_ep_received import NixlReceived
from flexpert.comm.nixl_ep.package import Package
from flexpert.comm.quant import LARGEST, dequantise, quantise
from flexpert.comm.routing import Sent, arrivals, expected_rows, pairs
from flexpert.compat import nixl_ep as compat
from support.comm_local import same_bits
from support.comm_ranks import LIMIT_S, apply_experts, random_sent, spec_of, vote

SPEC = spec_of(4, hidden=128)
SLOTS = 11  # random_table deals ten experts and a spare to one rank
PACKAGE = Package(compat, fixed=True)


class NixlRanks:
    """Buffers by id, a thread for each."""

    def __init__(self, **options: Any) -> None:
        """options: of the buffers."""
        self.options = {"timeout_s": LIMIT_S, **options}
        self.buffers: dict[int, NixlEpBuffer] = {}
        self.pool = ThreadPoolExecutor(16)
        self.epoch = 0

    def __enter__(self) -> NixlRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self.buffers.values():
            buffer.close()
        self.pool.shutdown()

    def add(self, *ids: int, spec: BufferSpec = SPEC) -> None:
        """New ranks, connected with all there are."""
        for rank in ids:
            self.buffers[rank] = NixlEpBuffer(
                rank,
                spec,
                slots=SLOTS,
                device=torch.device("cpu"),
                **{"package": PACKAGE, **self.options},
            )
        addresses = {rank: buffer.address for rank, buffer in self.buffers.items()}
        self.each(self.buffers, lambda b: b.connect(addresses))

    def each(self, ids: Iterable[int], call: Callable[..., Any], *args: Any) -> dict[int, Any]:
        started = {rank: self.pool.submit(call, self.buffers[rank], *args) for rank in ids}
        return {rank: job.result(LIMIT_S) for rank, job in started.items()}

    def activate(self, *ids: int) -> None:
        """A new epoch for these ids, with its first vote."""
        self.epoch += 1

        def enter(buffer: NixlEpBuffer) -> None:
            buffer.set_active(ids, self.epoch)
            assert set(vote(buffer, b"hello")) == set(ids)

        self.each(ids, enter)

    def exchange(self, *ids: int, seed: int, fp8: Scales | None = None) -> None:
        """One dispatch and combine of these, checked."""
        self.each(ids, exchange, sent_by(ids, seed), fp8)


def sent_by(ids: Iterable[int], seed: int, *, spec: BufferSpec = SPEC) -> dict[int, Sent]:
    """What every rank sends; no token chooses an expert twice."""
    sent = random_sent(spec, tuple(ids), seed, idle=tuple(ids)[:1] if seed % 3 == 1 else ())
    return {rank: replace(s, expert_ids=chosen_once(s.expert_ids)) for rank, s in sent.items()}


def chosen_once(expert_ids: torch.Tensor) -> torch.Tensor:
    ids = expert_ids.clone()
    for row in ids:
        for k in range(1, len(row)):
            if bool((row[:k] == row[k]).any()):
                row[k] = -1
    return ids


def exchange(
    buffer: NixlEpBuffer,
    sent: dict[int, Sent],
    fp8: Scales | None = None,
    *,
    exact: bool = True,
) -> None:
    """One rank's part, against what the oracle says of all. exact: see `check_received`."""
    s = sent[buffer.rank]
    device = buffer.device
    table = ExpertTable(s.table.rank.to(device), s.table.slot.to(device), s.table.slots)
    got = buffer.dispatch(
        s.x.to(device), s.expert_ids.to(device), s.weights.to(device), table, fp8=fp8
    )
    order = check_received(got, sent, buffer.rank, fp8, exact=exact)
    y = results(sent)
    mine = torch.empty_like(y[buffer.rank])
    mine[order] = y[buffer.rank]
    out = buffer.combine(mine.to(device), got)
    check_sums(out.cpu(), sent, y, buffer.rank)


def results(sent: dict[int, Sent]) -> dict[int, torch.Tensor]:
    """What the experts of every rank make of the rows."""
    return {rank: apply_experts(*expected_rows(sent, rank)[:2]) for rank in sent}


def check_received(
    got: NixlReceived,
    sent: dict[int, Sent],
    rank: int,
    fp8: Scales | None = None,
    *,
    exact: bool = True,
) -> torch.Tensor:
    """Every row bit for bit; within a slot in any order.

    exact: also of fp8; else within half a step of it: a GPU may round scales otherwise.

    Returns: [rows] int64, where each row of the oracle is among those that came.
    """
    x, offsets, _ = expected_rows(sent, rank)
    assert torch.equal(got.offsets.cpu(), offsets)
    assert got.tokens_sent == sent[rank].x.shape[0]
    slot = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.long().diff())
    key = (slot << 40) + (got.source.cpu().long() << 20) + got.token.cpu().long()
    order = key.argsort()
    here = arrivals(sent, rank)
    assert got.source.cpu()[order].tolist() == [p.home for p in here]
    assert got.token.cpu()[order].tolist() == [p.token for p in here]
    rows = got.x.cpu()[order]
    if fp8 is None:
        assert same_bits(rows, x)
    elif len(x):
        assert got.scales is not None
        found = got.scales.cpu()[order]
        q, scales = quantise(x, fp8)
        if exact:
            assert torch.equal(rows.view(torch.uint8), q.view(torch.uint8))
            assert torch.equal(found, scales)
        step = 2 * x.float().abs().amax() / LARGEST * 2**-9  # of the smallest numbers
        error = (dequantise(rows, found, torch.float32) - x.float()).abs()
        assert bool((error <= 2**-4 * x.float().abs() + step).all())
    return order


def check_sums(
    out: torch.Tensor,
    sent: dict[int, Sent],
    y: dict[int, torch.Tensor],
    home: int,
    *,
    without: Iterable[int] = (),
) -> None:
    """out: [tokens, hidden] bfloat16, against sums in float64, rounded once or a little more.

    without: ids whose results are missing.
    """
    own = sent[home]
    row = {p: y[rank][at] for rank in sent for at, p in enumerate(arrivals(sent, rank))}
    want = torch.zeros(own.x.shape, dtype=torch.float64)
    size = torch.zeros(own.x.shape, dtype=torch.float64)
    for p in pairs(sent):
        if p.home == home and p.rank not in set(without):
            part = own.weights[p.token, p.choice].double() * row[p].double()
            want[p.token] += part
            size[p.token] += part.abs()
    assert out.shape == own.x.shape
    assert out.dtype is own.x.dtype
    assert bool(((out.double() - want).abs() <= 2**-8 * want.abs() + 2**-20 * size).all())
