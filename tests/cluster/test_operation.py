"""What a target means, and what the journal keeps."""

from __future__ import annotations

import asyncio

import pytest

from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.operation import resolve_target
from flexpert.engine.rank_protocol import Contradiction
from flexpert.engine.request import HeldKV, SamplingParams, TokenEvent
from flexpert.errors import FlexpertError, OperationRefused, Overloaded, ServiceStopped


@pytest.mark.parametrize(
    ("before", "wish", "after"),
    [
        ({0, 1}, {"ranks": 4}, {0, 1, 2, 3}),
        ({0, 2}, {"ranks": 3}, {0, 1, 2}),
        ({0, 1, 2, 3}, {"ranks": 2}, {0, 1}),
        ({0, 1, 2}, {"remove": [1]}, {0, 2}),
        ({0, 2}, {"add": 2}, {0, 1, 2, 3}),
        ({0, 1}, {"add": 1, "remove": [0]}, {1, 2}),
        ({0, 1}, {"add": 2, "remove": [0, 1]}, {2, 3}),
        ({0, 1}, {"ranks": 2}, {0, 1}),
    ],
)
def test_targets(before: set[int], wish: dict[str, object], after: set[int]) -> None:
    assert resolve_target(before, 8, **wish) == after  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({}, "either the number of ranks, or"),
        ({"ranks": 2, "add": 1}, "either the number of ranks, or"),
        ({"ranks": 0}, "at least one rank"),
        ({"remove": [0, 1]}, "at least one rank"),
        ({"remove": [7]}, "cannot remove rank 7"),
        ({"add": -1}, "must not be negative"),
        ({"ranks": 5}, "exceed the capacity of 4"),
        ({"add": 3, "remove": [0]}, "need 3 free ids but only 2 of 4"),
    ],
)
def test_impossible_targets_are_refused_with_the_reason(wish: dict[str, object], says: str) -> None:
    with pytest.raises(OperationRefused, match=says):
        resolve_target({0, 1}, 4, **wish)  # type: ignore[arg-type]


def open_entry(journal: Journal, name: str, cancelled: list[str]) -> Entry:
    params = SamplingParams(max_tokens=8, seed=1)
    return journal.open(name, [1, 2, 3], params, (0,), cancelled.append)


def test_a_full_journal_takes_no_more_until_one_ends() -> None:
    async def scenario() -> None:
        journal = Journal(limit=2)
        for name in "ab":
            open_entry(journal, name, [])
        with pytest.raises(Overloaded, match="2 sequences are unfinished"):
            open_entry(journal, "c", [])
        assert len(journal) == 2
        journal.close("a")
        open_entry(journal, "c", [])

    asyncio.run(scenario())


def test_a_sequence_resumes_with_every_published_token_and_no_other() -> None:
    async def scenario() -> None:
        journal = Journal()
        entry = open_entry(journal, "a", [])
        assert journal.assign(entry, [0, 1]) == 0
        journal.publish(0, TokenEvent("a", 0, [5], None, None))
        journal.publish(1, TokenEvent("a", 1, [9], None, None))  # not its rank
        journal.publish(0, TokenEvent("a", 0, [5], None, None))  # a repetition
        with pytest.raises(Contradiction, match="publishes token 3"):
            journal.publish(0, TokenEvent("a", 3, [9], None, None))  # a gap
        journal.publish(0, TokenEvent("a", 1, [6, 7], None, None))
        released = journal.release("a")
        assert released is not None
        assert released.resume().generated == [5, 6, 7]
        assert journal.assign(released, [1]) == 1
        journal.publish(1, TokenEvent("a", 3, [8], None, "length"))
        assert [delta.tokens async for delta in released.stream] == [[5], [6, 7], [8]]
        assert len(journal) == 0

    asyncio.run(scenario())


def test_a_degraded_answer_stays_so_wherever_it_goes_on() -> None:
    async def scenario() -> None:
        journal = Journal()
        entry = open_entry(journal, "a", [])
        journal.assign(entry, [0, 1])
        journal.publish(0, TokenEvent("a", 0, [5], None, None))
        journal.publish(0, TokenEvent("a", 1, [6, 7], None, None, degraded=True))
        journal.publish(0, TokenEvent("a", 1, [6, 7], None, None, degraded=True))  # a repetition
        journal.release("a")
        journal.assign(entry, [1])
        journal.publish(1, TokenEvent("a", 3, [8], None, "length"))
        marks = [delta.degraded async for delta in entry.stream]
        assert marks == [False, True, True]
        assert (journal.tokens_degraded, journal.answers_degraded) == (2, 1)

    asyncio.run(scenario())


def test_sequences_go_to_the_rank_with_the_fewest() -> None:
    async def scenario() -> None:
        journal = Journal()
        entries = [open_entry(journal, str(number), []) for number in range(4)]
        assert [journal.assign(entry, [0, 2]) for entry in entries] == [0, 2, 0, 2]
        journal.close("1")
        assert journal.assign(open_entry(journal, "x", []), [0, 2]) == 2
        assert journal.of_rank(0) == ["0", "2"]

    asyncio.run(scenario())


def test_what_moves_goes_where_its_kv_has_room() -> None:
    async def scenario() -> None:
        journal = Journal()
        journal.kv_tokens = 100
        params = SamplingParams(max_tokens=8, seed=1)
        for name, prompt, rank in (("long", 90, 0), ("a", 5, 1), ("b", 5, 1), ("x", 30, 2)):
            entry = journal.open(name, [1] * prompt, params, (0,), lambda _: None)
            journal.assign(entry, [rank])
        for name in "yz":
            journal.assign(journal.open(name, [1] * 8, params, (0,), lambda _: None), [2])
        held = [HeldKV(name, 8, [0]) for name in ("x", "y", "z")]
        migrations = journal.assign_destinations(held, [0, 1])
        there = {
            destination: [move.sequence.id for move in some]
            for destination, some in migrations.items()
        }
        assert there == {1: ["x", "z"], 0: ["y"]}, "rank 0 has fewer, but room for only 10 tokens"

    asyncio.run(scenario())


def test_leaving_the_stream_cancels_once_and_a_finished_one_never() -> None:
    async def scenario() -> None:
        journal = Journal()
        cancelled: list[str] = []
        entry = open_entry(journal, "a", cancelled)
        async with entry.stream:
            pass
        entry.stream.cancel()
        assert cancelled == ["a"]
        done = open_entry(journal, "b", cancelled)
        journal.assign(done, [0])
        journal.publish(0, TokenEvent("b", 0, [5], None, "stop"))
        async with done.stream as stream:
            async for _ in stream:
                pass
        assert cancelled == ["a"]

    asyncio.run(scenario())


def test_a_failed_sequence_raises_at_its_reader() -> None:
    async def scenario() -> None:
        journal = Journal()
        entry = open_entry(journal, "a", [])
        journal.fail_all(ServiceStopped("stopping"))
        with pytest.raises(FlexpertError, match="stopping"):
            async for _ in entry.stream:
                pass

    asyncio.run(scenario())
