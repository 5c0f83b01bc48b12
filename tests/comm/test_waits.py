"""Every wait is bounded, says who is missing, and leaves a state that is clear."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from support.comm_local import Local, check_received, dispatch
from support.comm_ranks import LIMIT_S, Rank, Ranks, connect, random_sent, set_active, spec_of, vote

from flexpert.comm import Buffer, CommError, Interrupted, RankLost, RankTimeout
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.host._kernels import ffi
from flexpert.comm.routing import Sent
from flexpert.comm.window_layout import DISPATCH_FLAG_AT


def refuses_all(buffer: Buffer, s: Sent) -> None:
    with pytest.raises(StaleEpoch, match="epoch 1 is over"):
        buffer.post_vote(b"")
    with pytest.raises(StaleEpoch):
        buffer.collect_votes(1.0)
    with pytest.raises(StaleEpoch):
        buffer.wait_for_vote(0.0)
    with pytest.raises(StaleEpoch):
        dispatch(buffer, s)


def test_a_timeout_in_dispatch_names_who_is_missing_and_ends_the_epoch(local: Local) -> None:
    spec = spec_of(6)
    local.start(spec, [0, 3, 5])
    local.activate([0, 3, 5])
    sent = random_sent(spec, (0, 3, 5), 1)
    began = time.monotonic()
    with pytest.raises(RankTimeout) as caught:
        dispatch(local.buffers[0], sent[0], timeout_s=0.2)
    assert 0.2 <= time.monotonic() - began < 5.0
    error = caught.value
    assert (error.ranks, error.phase, error.epoch, error.limit_s) == ((3, 5), "dispatch", 1, 0.2)
    refuses_all(local.buffers[0], sent[0])


def test_a_timeout_in_combine_names_who_is_missing_and_ends_the_epoch(local: Local) -> None:
    spec = spec_of(3)
    local.start(spec, [0, 1, 2])
    local.activate([0, 1, 2])
    sent = random_sent(spec, (0, 1, 2), 1)
    received = local.each(sent, lambda b: dispatch(b, sent[b.rank]))

    def combine(buffer: Buffer) -> object:
        got = received[buffer.rank]
        try:
            return buffer.combine(got.x.clone(), got, timeout_s=0.5)
        except RankTimeout as error:
            return error

    for error in local.each([0, 1], combine).values():
        assert (error.ranks, error.phase, error.epoch) == ((2,), "combine", 1)
    refuses_all(local.buffers[0], sent[0])
    with pytest.raises(StaleEpoch):
        local.buffers[0].combine(received[0].x, received[0])


def test_set_active_recovers_after_a_timeout(local: Local) -> None:
    """The step is dropped and run again without the lost rank, on the right data."""
    spec = spec_of(3)
    local.start(spec, [0, 1, 2])
    local.activate([0, 1, 2])
    for seed in range(3):
        local.exchange(random_sent(spec, (0, 1, 2), seed), "rank")
    sent = random_sent(spec, (0, 1, 2), 9)

    def fails(buffer: Buffer) -> tuple[int, ...]:
        with pytest.raises(RankTimeout) as caught:
            dispatch(buffer, sent[buffer.rank], 0.5)
        return caught.value.ranks

    assert local.each([0, 1], fails) == {0: (2,), 1: (2,)}
    local.activate([0, 1])
    for seed in range(10, 14):
        local.exchange(random_sent(spec, (0, 1), seed), "home")


def test_after_a_broken_exchange_the_first_vote_comes_first(local: Local) -> None:
    """A peer that is still reading the broken one would see its rows change."""
    spec = spec_of(2)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    sent = random_sent(spec, (0, 1), 1)
    with pytest.raises(RankTimeout):
        dispatch(local.buffers[0], sent[0], 0.01)
    local.buffers[0].set_active([0], 2)
    alone = random_sent(spec, (0,), 1)
    with pytest.raises(CommError, match="before the first vote of epoch 2"):
        dispatch(local.buffers[0], alone[0])
    vote(local.buffers[0])
    check_received(dispatch(local.buffers[0], alone[0]), alone, 0)


def test_rows_of_a_rank_that_timed_out_are_never_read_as_its_next_ones(local: Local) -> None:
    """Rank 1 wrote in epoch 1 and stalled: in epoch 2 the same number is not there yet."""
    spec = spec_of(2)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    sent = random_sent(spec, (0, 1), 1)
    with pytest.raises(RankTimeout):
        dispatch(local.buffers[1], sent[1], 0.01)  # (epoch 1, exchange 1) is in 0's window
    local.buffers[0].set_active([0, 1], 2)
    with pytest.raises(RankTimeout) as caught:
        dispatch(local.buffers[0], sent[0], 0.05)
    assert caught.value.ranks == (1,)


def test_interrupt_ends_waits_from_another_thread_until_set_active(local: Local) -> None:
    spec = spec_of(2)
    local.start(spec, [0, 1])
    local.activate([0, 1])
    buffer = local.buffers[0]
    sent = random_sent(spec, (0, 1), 1)
    timer = threading.Timer(0.2, buffer.interrupt)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted, match="rank 0"):
        dispatch(buffer, sent[0])
    assert time.monotonic() - began < LIMIT_S / 2
    timer.join()
    for call in (
        lambda: buffer.wait_for_vote(None),
        lambda: buffer.collect_votes(LIMIT_S),
        lambda: dispatch(buffer, sent[0]),
    ):
        with pytest.raises(Interrupted):
            call()
    local.activate([0, 1])
    local.exchange(random_sent(spec, (0, 1), 2), "rank")


def test_interrupt_ends_an_endless_sleep(local: Local) -> None:
    buffer = local.start(spec_of(1), [0])[0]
    threading.Timer(0.1, buffer.interrupt).start()
    with pytest.raises(Interrupted):
        buffer.wait_for_vote(None)


def test_close_ends_a_wait_on_another_thread(local: Local) -> None:
    buffer = local.start(spec_of(1), [0])[0]
    waiting = local.pool.submit(buffer.wait_for_vote, None)
    time.sleep(0.05)
    buffer.close()
    with pytest.raises(CommError):
        waiting.result(LIMIT_S)
    buffer.close()
    buffer.ring()
    buffer.interrupt()
    with pytest.raises(CommError, match="closed"):
        buffer.post_vote(b"")


@pytest.mark.parametrize("limit_s", [-1.0, float("nan"), float("inf")])
def test_a_time_limit_must_be_a_time(local: Local, limit_s: float) -> None:
    buffer = local.start(spec_of(1), [0])[0]
    buffer.post_vote(b"")
    with pytest.raises(ValueError, match="time limit"):
        buffer.collect_votes(limit_s)


def wait_for_ctrl_c(buffer: Buffer, s: Sent) -> float:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        dispatch(buffer, s)
    except KeyboardInterrupt:
        with pytest.raises(StaleEpoch):
            buffer.post_vote(b"")
        return time.monotonic()
    raise AssertionError("the wait came to an end")


def test_ctrl_c_ends_a_wait(local: Local) -> None:
    spec = spec_of(2)
    (watcher,) = local.start(spec, [1]).values()
    with Ranks(spec, (0,)) as ranks:
        watcher.connect({0: ranks.ranks[0].address})
        ranks.all(connect, {1: watcher.address})
        ranks.ranks[0].ask(set_active, (0, 1), 1)
        ranks.ranks[0].answer()
        flag = watcher._core.b.inbox[0] + DISPATCH_FLAG_AT
        ranks.ranks[0].ask(wait_for_ctrl_c, random_sent(spec, (0, 1), 1)[0])
        limit = time.monotonic() + LIMIT_S
        while not any(ffi.buffer(ffi.cast("char *", flag), 8)[:]) and time.monotonic() < limit:
            time.sleep(0.01)  # until it has sent its rows, and so waits for ours
        sent = time.monotonic()
        os.kill(pid_of(ranks.ranks[0]), signal.SIGINT)
        assert ranks.ranks[0].answer() - sent < 5.0


def pid_of(rank: Rank) -> int:
    assert rank.process.pid is not None
    return rank.process.pid


def dispatch_fails(buffer: Buffer, s: Sent, timeout_s: float) -> tuple[int, ...]:
    vote(buffer)
    with pytest.raises(RankLost, match=r"lost in dispatch .*rank 2: process exited") as caught:
        dispatch(buffer, s, timeout_s)
    return caught.value.ranks


def dispatch_whole(buffer: Buffer, sent: dict[int, Sent]) -> None:
    vote(buffer)
    check_received(dispatch(buffer, sent[buffer.rank]), sent, buffer.rank)


def test_survivors_of_a_killed_process_go_on_without_it() -> None:
    """Its window stays mapped: writing to the dead harms nobody."""
    spec = spec_of(3)
    with Ranks(spec, (0, 1, 2)) as ranks:
        ranks.activate((0, 1, 2), 1)
        sent = random_sent(spec, (0, 1, 2), 3)
        ranks.ranks[2].ask(vote)
        for rank in (0, 1):
            ranks.ranks[rank].ask(dispatch_fails, sent[rank], LIMIT_S)
        ranks.ranks[2].answer()
        ranks.ranks.pop(2).kill()
        assert [ranks.ranks[rank].answer() for rank in (0, 1)] == [(2,), (2,)]
        ranks.activate((0, 1), 2)
        ranks.all(dispatch_whole, random_sent(spec, (0, 1), 4))
        ranks.leave(())


def test_a_stopped_process_that_wakes_in_an_older_epoch_disturbs_nobody() -> None:
    spec = spec_of(3)
    with Ranks(spec, (0, 1, 2)) as ranks:
        ranks.activate((0, 1, 2), 1)
        sent = random_sent(spec, (0, 1, 2), 3)
        ranks.all(vote)
        os.kill(pid_of(ranks.ranks[2]), signal.SIGSTOP)
        ranks.ranks[2].ask(dispatch_late, sent[2])
        ranks.activate((0, 1), 2)
        ranks.some((0, 1), dispatch_whole, random_sent(spec, (0, 1), 4))
        os.kill(pid_of(ranks.ranks[2]), signal.SIGCONT)
        assert ranks.ranks[2].answer() == (0, 1)
        ranks.activate((0, 1), 3)
        ranks.some((0, 1), dispatch_whole, random_sent(spec, (0, 1), 5))


def dispatch_late(buffer: Buffer, s: Sent) -> tuple[int, ...]:
    try:
        dispatch(buffer, s, 0.05)
    except RankTimeout as error:
        return error.ranks
    raise AssertionError("the dispatch was whole")


def test_who_waits_for_a_silent_rank_is_not_blamed_for_it(local: Local) -> None:
    """2 has sent to 0 and not to 1, and is heard of no more: 0 waits in combine, 1 in dispatch,
    and 0 for what 1 will send once it has given up on 2."""
    spec = spec_of(3)
    local.start(spec, [0, 1, 2], on_timeout="mask")
    local.activate([0, 1, 2])
    for buffer in local.buffers.values():
        buffer.timeout_s = 0.8
    local.buffers[2].mask([1])
    sent = random_sent(spec, (0, 1, 2), 1)

    def run(buffer: Buffer) -> tuple[int, ...]:
        s = sent[buffer.rank]
        pending = buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)
        if buffer.rank == 2:
            return ()
        if buffer.rank == 1:
            time.sleep(0.2)  # gives up on 2 after 0 has run out of time
        got = pending()
        buffer.combine(got.x.clone(), got)
        return buffer.active

    assert local.each([0, 1, 2], run) == {0: (0, 1), 1: (0, 1), 2: ()}
