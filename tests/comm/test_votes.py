"""The vote: a barrier that a fast rank cannot run through, and a sleep that costs nothing."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from support.comm_local import Local
from support.comm_ranks import LIMIT_S, Ranks, spec_of, vote

from flexpert.comm import Buffer, CommError, RankTimeout


def many_votes(buffer: Buffer, ids: tuple[int, ...], first: int, count: int) -> bool:
    """Steps without any exchange: nothing but the votes keeps the ranks together."""
    for step in range(first, first + count):
        votes = vote(buffer, f"{step} of {buffer.rank}".encode())
        assert votes == {rank: f"{step} of {rank}".encode() for rank in ids}
    return True


def epochs_of_votes(buffer: Buffer, ids: tuple[int, ...], epochs: tuple[int, ...]) -> bool:
    """Ranks switch on their own after the last vote of an epoch, as they do when serving."""
    for at, epoch in enumerate(epochs):
        buffer.set_active(ids, epoch)
        many_votes(buffer, ids, 1000 * epoch, 1 + (at * 7) % 4)
    return True


def test_votes_never_mix_steps_between_processes() -> None:
    with Ranks(spec_of(4), (0, 2, 3)) as ranks:
        ranks.activate((0, 2, 3), 1)
        assert all(ranks.all(many_votes, (0, 2, 3), 0, 300).values())


def test_votes_never_mix_epochs_even_if_epochs_skip_numbers() -> None:
    epochs = tuple(10 * e + e % 3 for e in range(1, 120))
    assert any((b - a) % 2 == 0 for a, b in pairwise(epochs))
    with Ranks(spec_of(3), (0, 1, 2)) as ranks:
        assert all(ranks.all(epochs_of_votes, (0, 1, 2), epochs).values())


def test_a_fast_rank_cannot_overwrite_a_vote_that_is_still_to_be_read(local: Local) -> None:
    fast, slow = local.start(spec_of(2), [0, 1]).values()
    for buffer in (fast, slow):
        buffer.set_active([0, 1], 5)
        buffer.post_vote(b"one")
    assert fast.collect_votes(1.0) == {0: b"one", 1: b"one"}
    fast.post_vote(b"two")  # slow has not read "one" yet
    assert slow.collect_votes(1.0) == {0: b"one", 1: b"one"}
    with pytest.raises(RankTimeout):
        fast.collect_votes(0.01)
    slow.post_vote(b"2")
    assert fast.collect_votes(1.0) == {0: b"two", 1: b"2"}
    fast.set_active([0, 1], 7)  # same parity; slow has not read "two" yet
    fast.post_vote(b"first")
    assert slow.collect_votes(1.0) == {0: b"two", 1: b"2"}
    slow.set_active([0, 1], 7)
    slow.post_vote(b"1st")
    assert slow.collect_votes(1.0) == {0: b"first", 1: b"1st"}


def test_a_vote_of_an_older_epoch_is_not_taken_for_one_of_this(local: Local) -> None:
    ahead, behind = local.start(spec_of(2), [0, 1]).values()
    ahead.set_active([0, 1], 2)
    behind.set_active([0, 1], 1)
    behind.post_vote(b"old")
    ahead.post_vote(b"new")
    assert not ahead.wait_for_vote(0.01)
    with pytest.raises(RankTimeout) as caught:
        ahead.collect_votes(0.01)
    assert (caught.value.ranks, caught.value.phase, caught.value.epoch) == ((1,), "vote", 2)


def test_collecting_votes_may_be_tried_again_after_a_timeout(local: Local) -> None:
    one, two = local.start(spec_of(2), [0, 1]).values()
    for buffer in (one, two):
        buffer.set_active([0, 1], 1)
    one.post_vote(b"a")
    with pytest.raises(RankTimeout):
        one.collect_votes(0.01)
    two.post_vote(b"b")
    assert one.collect_votes(1.0) == {0: b"a", 1: b"b"}


def test_wait_for_vote_tells_a_vote_from_a_ring_from_the_end_of_the_time(local: Local) -> None:
    one, two = local.start(spec_of(2), [0, 1]).values()
    for buffer in (one, two):
        buffer.set_active([0, 1], 1)
    assert one.wait_for_vote(0.0) is False
    one.ring()  # remembered
    began = time.monotonic()
    assert one.wait_for_vote(LIMIT_S) is False
    assert time.monotonic() - began < LIMIT_S / 2
    one.post_vote(b"own")  # the own vote is none of a peer
    assert one.wait_for_vote(0.01) is False
    two.post_vote(b"work")
    assert one.wait_for_vote(None) is True
    assert one.collect_votes(1.0) == {0: b"own", 1: b"work"}
    assert one.wait_for_vote(0.01) is False  # the next step's vote is another


def test_ring_wakes_a_sleeper_from_another_thread(local: Local) -> None:
    (buffer,) = local.start(spec_of(1), [0]).values()
    threading.Timer(0.2, buffer.ring).start()
    began = time.monotonic()
    assert buffer.wait_for_vote(None) is False
    assert 0.1 < time.monotonic() - began < LIMIT_S


def test_votes_hold_48_bytes_and_zeros_and_nothing(local: Local) -> None:
    (buffer,) = local.start(spec_of(1), [0]).values()
    for payload in (b"", b"\0\0", bytes(range(48))):
        assert vote(buffer, payload) == {0: payload}
    with pytest.raises(ValueError, match="48"):
        buffer.post_vote(bytes(49))


def test_a_vote_out_of_turn_is_refused(local: Local) -> None:
    (buffer,) = local.start(spec_of(1), [0]).values()
    with pytest.raises(CommError, match="not posted"):
        buffer.collect_votes(1.0)
    buffer.post_vote(b"")
    with pytest.raises(CommError, match="second vote"):
        buffer.post_vote(b"")


def idle(buffer: Buffer, for_s: float) -> tuple[bool, float]:
    began = time.process_time()
    voted = buffer.wait_for_vote(for_s)
    return voted, time.process_time() - began


def test_idle_ranks_sleep() -> None:
    with Ranks(spec_of(2), (0, 1)) as ranks:
        ranks.activate((0, 1), 1)
        for voted, cpu_s in ranks.all(idle, 1.5).values():
            assert not voted
            assert cpu_s < 0.03


def sleep_then_work(buffer: Buffer, wakes: bool) -> float:
    """One rank gets work and votes; the others sleep until then."""
    if wakes:
        time.sleep(0.3)
    elif not buffer.wait_for_vote(None):
        raise AssertionError("woken without a vote")
    began = time.monotonic()
    votes = vote(buffer, b"work" if wakes else b"none")
    assert b"work" in votes.values()
    return time.monotonic() - began


def test_work_on_one_rank_wakes_all_others() -> None:
    with Ranks(spec_of(3), (0, 1, 2)) as ranks:
        ranks.activate((0, 1, 2), 1)
        for rank in (0, 1, 2):
            ranks.ranks[rank].ask(sleep_then_work, rank == 1)
        for rank in (0, 1, 2):
            assert ranks.ranks[rank].answer() < LIMIT_S / 2
