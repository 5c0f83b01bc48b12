"""A request that ends ranks is found and failed; those beside it are not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.service import active, answer, answer_all, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.quarantine import Quarantine
from flexpert.engine.faults import VARIABLE, Fault
from flexpert.engine.request import SamplingParams, TokenEvent
from flexpert.errors import FlexpertError


def test_who_was_on_board_when_ranks_ended_by_their_own_fault_is_tried_alone() -> None:
    quarantine = Quarantine()
    assert quarantine.exited(["a", "b"], ["c"], own_fault=True) is None
    assert all(map(quarantine.suspects, "abc"))
    quarantine.try_alone("a")
    quarantine.begun("a")
    assert quarantine.cleared("a"), "it has said something: the next may be tried"
    assert not quarantine.suspects("a")
    quarantine.try_alone("b")
    quarantine.begun("b")
    assert quarantine.exited(["b"], [], own_fault=True) == "b"


def test_who_never_came_to_a_step_is_not_found_guilty() -> None:
    quarantine = Quarantine()
    for _ in range(9):
        assert quarantine.exited(["a"], [], own_fault=True) is None
        quarantine.try_alone("a")


def test_signals_must_meet_a_suspect_twice() -> None:
    quarantine = Quarantine()
    found = []
    for _ in range(4):
        found.append(quarantine.exited(["a"], ["b"], own_fault=False))
        if quarantine.suspects("a"):
            quarantine.try_alone("a")
            quarantine.begun("a")
    assert found == [None, None, None, "a"]
    assert not quarantine.suspects("b")


def test_while_one_is_tried_nobody_joins_it_and_no_other_suspect_runs() -> None:
    async def scenario() -> None:
        journal = Journal()
        waits = 0

        def over() -> None:
            nonlocal waits
            waits += 1

        journal.on_trial_over = over

        def opened(name: str) -> Entry:
            params = SamplingParams(max_tokens=8, seed=1)
            return journal.open(name, [1], params, (), lambda name: None)

        first, second = opened("a"), opened("b")
        assert journal.assign(first, [0]) == journal.assign(second, [0]) == 0
        assert journal.rank_exited(0, own_fault=True) is None
        for entry in (first, second):
            journal.release(entry.request.id)
        assert journal.assign(first, [0, 1]) == 0
        assert first.resume().on_trial
        assert journal.assign(second, [0, 1]) is None
        assert journal.assign(opened("c"), [0, 1]) == 1
        assert journal.assign(opened("d"), [0]) is None
        journal.publish(0, TokenEvent("a", 0, [5], None, None))
        assert waits == 1
        assert journal.assign(second, [0]) == 0
        assert second.resume().on_trial
        journal.close("b")
        assert waits == 2

    asyncio.run(scenario())


# ---- in a real service --------------------------------------------------------------------------

POISON = 2999  # a token that no other request has
SETTINGS: dict[str, Any] = {
    "cluster__ranks": 2,
    "cluster__restart_backoff": 0.1,
    "cluster__restart_limit": 20,
    "engine__deterministic": True,
    "engine__kv_memory": "32MiB",
}


@pytest.mark.slow
def test_a_rank_that_takes_long_to_exit_counts_as_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection has ended, its process is there for another second, and others end meanwhile:
    what it ended of is still known."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    async def scenario(head: Head) -> None:
        delayed: list[int] = []
        loop, exit_now = asyncio.get_running_loop(), head._on_exit

        def exit_late(rank: int, status: int, why: str) -> None:
            delayed.append(status)
            head._on_disconnected(rank)
            loop.call_later(1.0, exit_now, rank, status, why)

        assert head._launcher is not None
        monkeypatch.setattr(head._launcher, "_on_exit", exit_late)
        work = requests(4, tokens=200)
        others = asyncio.create_task(answer_all(head, work, clients=4))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) == 4)
        journal, victim = head._journal, 0
        ran = journal.of_rank(victim)
        assert ran
        planted = Fault(victim, "forward", action="fail").plant(tmp_path)
        await until(lambda: not planted.exists())
        await until(lambda: delayed)
        # another loss takes the place of the change that the first began
        Fault(1, "vote", action="kill").plant(tmp_path)
        await until(lambda: len(delayed) == 2)
        assert journal.of_rank(victim) == ran, "it is not gone yet"
        await until(lambda: not set(ran) & set(journal.of_rank(victim)))
        assert any(journal._quarantine.suspects(name) for name in ran)
        await others

    with running(**SETTINGS | {"cluster__ranks": 3}) as service:
        service.run(scenario(service.head))


@pytest.mark.slow
@pytest.mark.parametrize(("action", "ranks"), [("kill", 1), ("fail", 2)])
def test_a_request_that_ends_ranks_fails_and_the_others_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, action: Any
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))

    async def scenario(head: Head) -> None:
        work = requests(10, tokens=60)
        expected = await answer_all(head, work, clients=10)
        for _ in range(20):  # more than may strike
            for rank in range(2):
                Fault(rank, "forward", action=action, token=POISON).plant(tmp_path)
        others = asyncio.create_task(answer_all(head, work, clients=10))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 5)
        with pytest.raises(FlexpertError, match="not tried again"):
            await answer(head, [10, POISON], SamplingParams(max_tokens=4, temperature=0))
        # a rank that ends takes with it what the relay that faults need has not handed on: the
        # head may not have heard that the trial had begun, and tries once more
        struck = 40 - len(list(tmp_path.glob("*.json")))
        assert 2 <= struck <= 10
        assert await others == expected
        assert len(head._journal) == 0
        await until(lambda: active(head) == set(range(ranks)))
        assert await answer_all(head, work[:2], clients=2) == expected[:2]

    with running(**SETTINGS | {"cluster__ranks": ranks}) as service:
        service.run(scenario(service.head))
