"""Rows that ranks of one machine read where their owner has them: not before they are there, not
after they are written over."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch
from support.comm_local import Local, applied, dispatch, poke, same_bits
from support.comm_ranks import apply_experts, random_sent, spec_of

from flexpert.comm import BufferSpec, CommError, ExpertTable, RankLost, Received
from flexpert.comm.buffer import OnTimeout, Pending
from flexpert.comm.host import memfd
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.routing import Sent
from flexpert.comm.window_layout import layout

IDS = (0, 1, 2)


def is_shared(buffer: HostBuffer, y: torch.Tensor) -> bool:
    shared = buffer._core.window.shared
    return 0 <= y.data_ptr() - shared.data_ptr() < shared.numel()


def begin(buffer: HostBuffer, s: Sent, *, shared: bool = True) -> Pending[torch.Tensor]:
    """Up to the sums, which the caller asks for. shared: whether results, if any, are to be."""
    got = dispatch(buffer, s)
    y = buffer.combine_input(got).copy_(apply_experts(got.x, got.offsets))
    assert is_shared(buffer, y) is shared or y.numel() == 0
    return buffer.begin_combine(y, got)


def begin_all(
    local: Local, spec: BufferSpec, on_timeout: OnTimeout = "raise"
) -> tuple[dict[int, Sent], dict[int, Pending[torch.Tensor]]]:
    local.start(spec, IDS, on_timeout)
    local.activate(IDS)
    sent = random_sent(spec, IDS, 1)
    return sent, local.each(IDS, lambda b: begin(b, sent[b.rank]))


def go_on_without(local: Local, late: int, spec: BufferSpec, *, shared: bool) -> None:
    """The others begin an epoch, and exchange what is not what they have shared."""
    rest = tuple(rank for rank in IDS if rank != late)
    local.activate(rest)
    again = random_sent(spec, rest, 2)
    sums = local.each(rest, lambda b: begin(b, again[b.rank], shared=shared)())
    for rank in rest:
        assert same_bits(sums[rank], applied(again[rank], "rank"))


def test_who_has_been_left_out_still_reads_what_was_shared_with_it(local: Local) -> None:
    spec = spec_of(3)
    sent, pending = begin_all(local, spec)
    assert all(same_bits(pending[rank](), applied(sent[rank], "rank")) for rank in (0, 2))
    go_on_without(local, 1, spec, shared=False)
    assert same_bits(pending[1](), applied(sent[1], "rank"))


def test_a_vote_says_that_nothing_is_read_any_more(local: Local) -> None:
    spec = spec_of(3)
    _, pending = begin_all(local, spec)
    local.each(IDS, lambda b: pending[b.rank]())
    local.each(IDS, lambda b: b.barrier(timeout_s=30))
    go_on_without(local, 1, spec, shared=True)


@pytest.mark.parametrize("on_timeout", ["raise", "mask"])
def test_sums_of_what_was_written_over_are_given_to_nobody(
    local: Local, on_timeout: OnTimeout
) -> None:
    spec = spec_of(3)
    sent, pending = begin_all(local, spec, on_timeout)
    local.each((0, 2), lambda b: pending[b.rank]())
    for rank in (0, 2):
        local.buffers[rank].timeout_s = 0.0  # so long is a rank waited for that was left out
        local.buffers[rank].set_active((0, 2), 2)
        local.buffers[rank].timeout_s = 30.0
    local.epoch = 2
    go_on_without(local, 1, spec, shared=True)
    if on_timeout == "raise":
        with pytest.raises(RankLost, match="went on without this rank"):
            pending[1]()
        return
    own = sent[1].table.rank[sent[1].expert_ids.clamp(min=0).long()] == 1
    kept = torch.where(own & (sent[1].expert_ids >= 0), sent[1].expert_ids, -1)
    assert same_bits(pending[1](), applied(replace(sent[1], expert_ids=kept), "rank"))
    assert local.buffers[1].active == (1,)


def test_combine_input_after_combine_begins_changes_nothing(local: Local) -> None:
    sent, pending = begin_all(local, spec_of(3))
    for buffer in local.buffers.values():
        received = buffer._core.received
        assert isinstance(received, Received)
        buffer.combine_input(received)
    for rank, sums in local.each(IDS, lambda b: pending[b.rank]()).items():
        assert same_bits(sums, applied(sent[rank], "rank"))


def test_more_results_than_may_be_shared_are_sent(local: Local) -> None:
    """Five ranks have all their tokens computed by one."""
    spec = spec_of(5, max_tokens=4, topk=2, hidden=32)
    ids = range(5)
    local.start(spec, ids)
    local.activate(ids)
    table = ExpertTable(torch.zeros(2, dtype=torch.int32), torch.arange(2, dtype=torch.int32), 2)
    none = ExpertTable(table.rank, table.slot, 0)
    chosen = torch.tensor([[0, 1]] * 4)
    sent = {
        rank: Sent(torch.randn(4, 32).bfloat16(), chosen, torch.rand(4, 2), none if rank else table)
        for rank in ids
    }
    sums = local.each(ids, lambda b: begin(b, sent[b.rank], shared=b.rank != 0)())
    for rank in ids:
        assert same_bits(sums[rank], applied(sent[rank], "rank"))


@pytest.mark.parametrize("place", [-1, 4 * 16 * 4, 2**31 - 1])
def test_a_result_that_lies_nowhere_is_refused(local: Local, place: int) -> None:
    spec = spec_of(3)
    _, pending = begin_all(local, spec)
    at = local.buffers[1]._core.b.outbox[0] + layout(spec).results_at
    poke(at, struct.pack("=i", place))
    with pytest.raises(CommError, match="rank 1 sent"):
        pending[0]()


def test_without_overcommitted_memory_results_are_sent(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memfd, "overcommits", lambda: False)
    spec = spec_of(2)
    local.start(spec, (0, 1))
    local.activate((0, 1))
    sent = random_sent(spec, (0, 1), 1)
    sums = local.each((0, 1), lambda b: begin(b, sent[b.rank], shared=False)())
    assert all(same_bits(sums[rank], applied(sent[rank], "rank")) for rank in (0, 1))
