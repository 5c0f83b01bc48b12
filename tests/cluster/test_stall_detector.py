"""Whom the watch ends: a rank that neither speaks nor works, at the second look that finds so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest

from flexpert.cluster.interfaces import HeadInterface, Timer, Work
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.stall_detector import PART, WATCHES, Watch

STALL_S = 2.0


class Clock:
    """The part of the head that a watch uses, on a clock that the test moves."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.done = Work(0.0, 0)
        self.killed: list[tuple[float, int]] = []
        self.look: Callable[[], None] = lambda: None
        self.broken: Exception | None = None
        self.impaired: dict[str, str | None] = {}

    def now(self) -> float:
        return self.seconds

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        self.look = action
        return cast(Timer, None)

    def work(self, rank: int) -> Work | None:
        if self.broken:
            raise self.broken
        return self.done

    def impair(self, part: str, why: str | None) -> None:
        self.impaired[part] = why

    def kill(self, rank: int) -> None:
        self.killed.append((self.seconds, rank))

    def run(self, seconds: float, meanwhile: Callable[[], Any] = lambda: None) -> None:
        for _ in range(round(seconds * WATCHES / STALL_S)):
            self.seconds += STALL_S / WATCHES
            meanwhile()
            self.look()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watched(clock: Clock) -> tuple[Watch, RankState]:
    record = RankState(3, state="active")
    watch = Watch({3: record}, cast(HeadInterface, clock), STALL_S, lambda text, rank: None)
    watch.start()
    return watch, record


def test_who_neither_speaks_nor_works_is_ended_once_before_the_limit(clock: Clock) -> None:
    watched(clock)
    clock.run(2 * STALL_S)
    ((at, rank),) = clock.killed
    assert rank == 3
    assert 0.85 * STALL_S < at < STALL_S


def test_a_word_that_was_on_its_way_at_the_first_look_counts(clock: Clock) -> None:
    watch, record = watched(clock)
    while not record.suspect:
        clock.run(STALL_S / WATCHES)
    assert not clock.killed
    watch.heard(record)
    clock.run(0.8 * STALL_S)
    assert not clock.killed


@pytest.mark.parametrize(
    ("processor", "faults", "starved", "ended"),
    [
        (0.02, 0, (), True),  # threads that wait for Python's lock
        (0.02, 0, (8, 9), True),  # the same on a busy machine: now the one is runnable, now others
        (0.10, 0, (), False),
        (0.0, 1, (), False),
        (0.0, 0, (9,), False),
    ],
)
def test_slow_is_not_dead(
    clock: Clock, processor: float, faults: int, starved: tuple[int, ...], ended: bool
) -> None:
    """processor: of one; faults: at each look; starved: threads that are runnable in turn."""
    looks = itertools.count()

    def works() -> None:
        spent_s = processor * clock.seconds
        runnable = frozenset(starved[:1]) if len(starved) < 2 else {starved[next(looks) % 2]}
        clock.done = Work(spent_s, clock.done.faults + faults, frozenset(runnable))

    watched(clock)
    clock.run(4 * STALL_S, works)
    assert bool(clock.killed) == ended


def test_a_head_that_was_held_up_blames_nobody(clock: Clock) -> None:
    watched(clock)
    clock.run(0.8 * STALL_S)
    clock.seconds += STALL_S
    clock.look()
    clock.run(0.8 * STALL_S)
    assert not clock.killed
    clock.run(0.2 * STALL_S)
    assert clock.killed


def test_a_look_that_fails_is_said_once_and_not_the_last(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    watched(clock)
    clock.broken = RuntimeError("no such clock")
    clock.run(2 * STALL_S)
    assert clock.killed == []
    assert "no such clock" in (clock.impaired[PART] or "")
    (record,) = caplog.records
    assert record.exc_info
    clock.broken = None
    clock.run(2 * STALL_S)
    assert clock.impaired[PART] is None
    assert [rank for _, rank in clock.killed] == [3]
