"""Joining and leaving: any ids, any order, unequal histories, and late writes that do no harm."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.comm_local import Local, check_received, dispatch
from support.comm_ranks import LIMIT_S, Ranks, random_sent, spec_of, vote

from flexpert.comm import Buffer
from flexpert.comm.host._kernels import ffi, lib

pytestmark = pytest.mark.slow


def steps(buffer: Buffer, ids: tuple[int, ...], count: int) -> bool:
    for step in range(count):
        vote(buffer)
        for layer in range(2):
            sent = random_sent(buffer.spec, ids, 10 * buffer.epoch + 2 * step + layer)
            received = dispatch(buffer, sent[buffer.rank])
            check_received(received, sent, buffer.rank)
            buffer.combine(received.x.clone(), received, reduce="home" if layer else "rank")
    return True


def test_processes_join_and_leave_with_unequal_histories() -> None:
    """Holes from the start, ids that come back, the first leaving, one alone."""
    plan = [(0, 2), (0, 1, 2, 3), (1, 2, 3), (3,), (0, 3), (0, 1, 2, 3)]
    with Ranks(spec_of(4), plan[0]) as ranks:
        for epoch, ids in enumerate(plan, 1):
            ranks.join(set(ids) - set(ranks.ranks))
            ranks.activate(ids, epoch)
            assert all(ranks.some(ids, steps, ids, 1 + epoch % 3).values())
            ranks.leave(tuple(set(ranks.ranks) - set(ids)))


def test_scaling_up_right_after_down_with_the_same_ids_meets_the_new_processes() -> None:
    with Ranks(spec_of(3), (0, 1, 2)) as ranks:
        for epoch in range(1, 11, 2):
            ranks.activate((0, 1, 2), epoch)
            ranks.all(steps, (0, 1, 2), 1)
            ranks.activate((0,), epoch + 1)
            ranks.leave((1, 2))
            ranks.join((1, 2))
        ranks.activate((0, 1, 2), 99)
        ranks.all(steps, (0, 1, 2), 2)


def test_set_active_refuses_what_cannot_be(local: Local) -> None:
    (buffer, _) = local.start(spec_of(4), [0, 1]).values()
    assert (buffer.active, buffer.epoch, buffer.connected) == ((0,), 0, (0, 1))
    buffer.set_active([1, 0], 3)
    assert (buffer.active, buffer.epoch) == ((0, 1), 3)
    for ids, epoch, message in (
        ([1], 4, "rank 0 is not among"),
        ([0, 2], 4, "rank 2 is not connected"),
        ([0, 1], 3, "does not follow"),
        ([0, 1], 2, "does not follow"),
        ([0, 1], 2**32, "does not follow"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.set_active(ids, epoch)
    assert (buffer.active, buffer.epoch) == ((0, 1), 3)


def test_who_disconnects_and_connects_again_on_its_own_is_heard_in_the_next_epoch(
    local: Local,
) -> None:
    """A member that drops a newcomer's link, while the newcomer has begun the epoch already."""
    spec = spec_of(3)
    local.start(spec, [0, 1, 2])
    local.activate([0, 1, 2])
    local.exchange(random_sent(spec, (0, 1, 2), 0), "home")
    address = local.buffers[2].address
    descriptors = len(os.listdir("/proc/self/fd"))
    for seed in range(1, 4):
        for rank in (0, 1):
            local.buffers[rank].disconnect([2])
            local.buffers[rank].connect({2: address})
        local.activate([0, 1, 2])
        local.exchange(random_sent(spec, (0, 1, 2), seed), "rank")
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_connecting_a_newcomer_disturbs_no_exchange(local: Local) -> None:
    """Preparation runs beside serving: another thread connects and disconnects all the time."""
    spec = spec_of(4)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    newcomers = Local()
    newcomers.start(spec, [2, 3])
    addresses = {rank: b.address for rank, b in newcomers.buffers.items()}
    stop = threading.Event()

    def prepare() -> int:
        rounds = 0
        while not stop.is_set():
            for buffer in (local.buffers[0], local.buffers[1]):
                buffer.connect(addresses)
                buffer.disconnect(addresses)
            rounds += 1
        return rounds

    preparing = local.pool.submit(prepare)
    try:
        for seed in range(40):
            local.exchange(random_sent(spec, (0, 1), seed), "rank" if seed % 2 else "home")
    finally:
        stop.set()
    assert preparing.result(LIMIT_S) > 0
    with newcomers:
        pass


def test_an_evicted_rank_that_goes_on_writing_changes_no_result(local: Local) -> None:
    """It hammers dispatch and combine of its old epoch into the survivors' windows."""
    spec = spec_of(3, hidden=256)
    local.start(spec, [0, 1, 2])
    local.activate([0, 1, 2])
    local.exchange(random_sent(spec, (0, 1, 2), 0), "home")
    local.activate([0, 1])
    evicted = local.buffers[2]
    s = random_sent(spec, (0, 1, 2), 5)[2]
    y = torch.full((spec.capacity * spec.max_tokens * spec.topk, spec.hidden), float("nan")).to(
        spec.dtype
    )
    bad = ffi.new("int64_t *")
    stop = threading.Event()

    def hammer() -> int:
        rounds = 0
        while not stop.is_set():
            lib.fx_send_dispatch(
                evicted._core.b,
                s.x.data_ptr(),
                spec.hidden * 2,
                spec.hidden * 2,
                0,
                s.expert_ids.data_ptr(),
                1,
                s.weights.data_ptr(),
                *s.expert_ids.shape,
                s.table.rank.data_ptr(),
                s.table.slot.data_ptr(),
                s.table.rank.shape[0],
                bad,
            )
            for home in (0, 1):
                lib.fx_send_combine(evicted._core.b, y.data_ptr(), home)
            rounds += 1
        return rounds

    hammering = local.pool.submit(hammer)
    try:
        for seed in range(30):
            local.exchange(random_sent(spec, (0, 1), seed), "rank" if seed % 2 else "home")
    finally:
        stop.set()
    assert hammering.result(LIMIT_S) > 0


class Membership(RuleBasedStateMachine):
    """Any sequence of starts, switches, exchanges, stalls and departures keeps the promises."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = spec_of(5, max_tokens=6, hidden=24, topk=3)
        self.local = Local()
        self.active: tuple[int, ...] = ()
        self.seed = 0

    @initialize(ids=st.sets(st.integers(0, 4), min_size=1))
    def begin(self, ids: set[int]) -> None:
        self.local.start(self.spec, ids)
        self.switch(tuple(ids))

    def switch(self, ids: tuple[int, ...]) -> None:
        """A new epoch; who is not in it is alone in an epoch of its own."""
        self.active = tuple(sorted(ids))
        self.local.activate(self.active)
        for rank in set(self.local.buffers) - set(self.active):
            self.local.buffers[rank].set_active((rank,), self.local.epoch)

    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        absent = sorted(set(range(5)) - set(self.local.buffers))
        if absent:
            new = data.draw(st.sets(st.sampled_from(absent), min_size=1))
            self.local.start(self.spec, new)

    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from(sorted(self.local.buffers)), min_size=1))
        self.switch(tuple(ids))

    @rule(reduce=st.sampled_from(["rank", "home"]), count=st.integers(1, 3))
    def step(self, reduce: str, count: int) -> None:
        self.local.each(self.active, vote)
        for _ in range(count):
            self.seed += 1
            sent = random_sent(self.spec, self.active, self.seed)
            self.local.exchange(sent, reduce)  # type: ignore[arg-type]

    @precondition(lambda self: len(self.active) > 1)
    @rule(data=st.data())
    def stall(self, data: st.DataObject) -> None:
        """One does not come; all others drop the exchange and go on without it."""
        lost = data.draw(st.sampled_from(self.active))
        self.seed += 1
        sent = random_sent(self.spec, self.active, self.seed)
        others = tuple(rank for rank in self.active if rank != lost)

        def fails(buffer: Buffer) -> tuple[int, ...]:
            try:
                dispatch(buffer, sent[buffer.rank], 0.02)
            except Exception as error:  # noqa: BLE001
                return error.ranks  # type: ignore[attr-defined, no-any-return]
            return ()

        assert all(lost in ranks for ranks in self.local.each(others, fails).values())
        self.switch(others)

    @precondition(lambda self: bool(set(self.local.buffers) - set(self.active)))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """An idle rank ends; all others let go of it."""
        gone = data.draw(st.sampled_from(sorted(set(self.local.buffers) - set(self.active))))
        self.local.buffers.pop(gone).close()
        for buffer in self.local.buffers.values():
            buffer.disconnect([gone])

    def teardown(self) -> None:
        with self.local:
            pass


Membership.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_any_sequence_of_changes = Membership.TestCase
