"""Promises of traces: what a sequence went through is known at its end, and costs no token time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.sequence_trace import SequenceTrace, TracedChange
from flexpert.engine.request import HeldKV, RequestSequence, SamplingParams, TokenEvent
from flexpert.errors import FlexpertError

PROMPT = list(range(10))


class Meter:
    """The journal tells times only if somebody wants them."""

    def first_token(self, entry: Entry) -> None: ...
    def finished(self, entry: Entry, finish: str, now: float) -> None: ...
    def failed(self) -> None: ...


class Traced:
    """A journal with one sequence that is traced, and a clock that is set by hand."""

    def __init__(self, trace: SequenceTrace | None = None) -> None:
        self.now = 100.0
        self.journal = Journal(clock=lambda: self.now)
        self.journal.meter = Meter()
        self.trace = trace or SequenceTrace()
        self.trace.running_change = lambda: TracedChange("op-1", "request")
        params = SamplingParams(max_tokens=8, seed=1)
        self.entry = self.journal.open("a", PROMPT, params, (), self._cancel, self.trace)

    def _cancel(self, name: str) -> None:
        self.journal.close(name)

    def at(self, now: float) -> Journal:
        self.now = now
        return self.journal

    def say(self, now: float, rank: int, finish: str | None = None, waited: float = 0.0) -> None:
        event = TokenEvent("a", len(self.entry.generated), [7], None, finish, waited=waited)
        self.at(now).publish(rank, event)

    def stages(self) -> list[tuple[str, float, float, int | None, int]]:
        return [
            (s.stage, s.began, s.ended, s.rank, s.tokens) for s in self.trace.stages(until=999.0)
        ]


def on_a_loop(check: Callable[[], None]) -> None:
    """Streams want one."""

    async def run() -> None:
        check()

    asyncio.run(run())


def test_waits_in_head_and_on_the_rank_are_the_queue_and_the_rest_is_prefill_and_decode() -> None:
    def check() -> None:
        traced = Traced()
        traced.at(102.0).assign(traced.entry, [3])
        traced.say(107.0, 3, waited=1.5)
        traced.say(108.0, 3)
        traced.say(110.0, 3, "length")
        assert traced.stages() == [
            ("queue", 100.0, 103.5, None, 0),
            ("prefill", 103.5, 107.0, 3, 1),
            ("decode", 107.0, 110.0, 3, 2),
        ]
        assert traced.trace.outcome == "length"
        assert traced.trace.moves == []

    on_a_loop(check)


def test_a_leaver_hands_over_with_its_kv_and_each_rank_has_its_part_of_the_decoding() -> None:
    def check() -> None:
        traced = Traced()
        traced.at(100.0).assign(traced.entry, [0])
        for now in (101.0, 102.0, 103.0):
            traced.say(now, 0)
        traced.at(104.0).hand_over(0, [HeldKV("a", 12, [1])], [5])
        traced.say(106.0, 5, "stop")
        assert traced.stages() == [
            ("queue", 100.0, 100.0, None, 0),
            ("prefill", 100.0, 101.0, 0, 1),
            ("decode", 101.0, 104.0, 0, 2),
            ("decode", 104.0, 106.0, 5, 1),
        ]
        ((left, came),) = traced.trace.moves
        assert (left.rank, came.rank, left.lost) == (0, 5, False)
        assert came.change == TracedChange("op-1", "request")
        assert came.kv_tokens == 12
        assert traced.trace.without_kv(came) == 0

    on_a_loop(check)


def test_after_a_loss_it_waits_for_a_rank_and_is_computed_again() -> None:
    def check() -> None:
        traced = Traced()
        journal = traced.at(100.0)
        journal.assign(traced.entry, [0])
        traced.say(101.0, 0)
        traced.say(102.0, 0)
        traced.at(103.0).rank_lost(0)
        assert journal.hand_over(0, [], []) == {}
        assert journal.waiting() == [traced.entry]
        traced.at(105.0).assign(traced.entry, [1])
        traced.say(109.0, 1, "length", waited=0.5)
        assert traced.stages()[2:] == [
            ("decode", 101.0, 103.0, 0, 1),
            ("queue", 103.0, 105.0, None, 0),
            ("decode", 105.0, 109.0, 1, 1),
        ]
        ((left, came),) = traced.trace.moves
        assert (left.lost, came.lost) == (True, False)
        assert traced.trace.without_kv(came) == len(PROMPT) + 2 - 1

    on_a_loop(check)


def test_a_move_before_the_first_token_makes_a_prefill_on_each_rank() -> None:
    def check() -> None:
        traced = Traced()
        traced.at(100.0).assign(traced.entry, [0])
        traced.at(102.0).hand_over(0, [], [1])
        traced.say(105.0, 1, "length", waited=1.0)
        assert traced.stages() == [
            ("queue", 100.0, 100.0, None, 0),
            ("prefill", 100.0, 102.0, 0, 0),
            ("queue", 102.0, 103.0, None, 0),
            ("prefill", 103.0, 105.0, 1, 1),
        ]

    on_a_loop(check)


def test_a_rank_that_tells_of_a_wait_that_cannot_be_is_cut() -> None:
    def check() -> None:
        traced = Traced()
        traced.at(100.0).assign(traced.entry, [0])
        traced.say(101.0, 0, "length", waited=60.0)
        assert traced.stages() == [
            ("queue", 100.0, 101.0, None, 0),
            ("prefill", 101.0, 101.0, 0, 1),
        ]

    on_a_loop(check)


def _fail(traced: Traced) -> None:
    traced.journal.fail("a", FlexpertError("it was bad"))


def _stop_text(traced: Traced) -> None:
    traced.entry.stream.enough = True
    traced.entry.stream.cancel()


@pytest.mark.parametrize(
    ("end", "outcome", "error"),
    [
        (_fail, "failed", "it was bad"),
        (_stop_text, "stop", ""),
        (lambda traced: traced.entry.stream.cancel(), "cancelled", ""),
    ],
)
def test_however_it_ends_is_told(end: Callable[[Traced], Any], outcome: str, error: str) -> None:
    def check() -> None:
        traced = Traced()
        traced.at(100.0).assign(traced.entry, [0])
        traced.say(101.0, 0)
        traced.at(104.0)
        end(traced)
        trace = traced.trace
        assert (trace.outcome, trace.error, trace.said) == (outcome, error, 1)
        assert traced.stages()[-1] == ("decode", 101.0, 104.0, 0, 0)

    on_a_loop(check)


def test_one_that_is_not_over_ends_where_its_request_does() -> None:
    def check() -> None:
        traced = Traced()
        assert traced.stages() == [("queue", 100.0, 999.0, None, 0)]
        traced.at(101.0).assign(traced.entry, [0])
        assert traced.stages()[-1] == ("prefill", 101.0, 999.0, 0, 0)

    on_a_loop(check)


class Counted(SequenceTrace):
    """Which of its methods were called."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if callable(found) and not name.startswith("_") and name != "running_change":
            super().__getattribute__("__dict__").setdefault("calls", []).append(name)
        return found


def test_nothing_is_told_of_tokens_but_the_first_and_the_last() -> None:
    def check() -> None:
        trace = Counted()
        traced = Traced(trace)
        traced.journal.assign(traced.entry, [0])
        for number in range(100):
            traced.say(101.0 + number, 0)
        traced.say(300.0, 0, "length")
        told = ["open", "placed", "first_token", "over"]
        assert [name for name in trace.__dict__["calls"] if name != "left"] == [*told, "over"]

    on_a_loop(check)


def test_a_sequence_of_another_head_has_no_trace() -> None:
    def check() -> None:
        journal = Journal()
        sequence = RequestSequence(
            id="a", prompt=PROMPT, generated=[], params=SamplingParams(), eos=()
        )
        assert journal.restore(sequence, [], lambda name: None).trace is None
        journal.rank_lost(0)
        assert journal.place("a", 0)
        journal.rank_lost(0)

    on_a_loop(check)
