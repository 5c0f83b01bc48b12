"""Promises of what `/health` is told: ready through every change, and the reason when not."""

from __future__ import annotations

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest
from support.service import change, running, until

from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.head import Head
from flexpert.cluster.membership import Do, EventKind, MembershipEvent
from flexpert.cluster.operation import Operation
from flexpert.cluster.phase_clock import CHANGES
from flexpert.cluster.views import Readiness
from flexpert.config import Config
from flexpert.engine.request import SamplingParams
from flexpert.errors import FlexpertError


@pytest.fixture
def head() -> Head:
    """As if one rank were up."""
    head = Head(Config())
    head._serving = True
    rank = SimpleNamespace(waiting=0)
    head._coordinator = SimpleNamespace(
        down=None, admitting={0}, recovering=False, ranks=lambda: [rank]
    )
    return head


def test_a_head_with_a_rank_is_ready(head: Head) -> None:
    assert head.readiness() == Readiness(live=True, ready=True, reason=None)


def test_a_head_that_has_not_started_is_alive_and_not_ready() -> None:
    before = Head(Config()).readiness()
    assert (before.live, before.ready) == (True, False)
    assert before.reason


def test_without_ranks_it_is_not_ready_and_says_why(head: Head) -> None:
    head._coordinator.down = "all ranks were lost"
    lost = Readiness(ready=False, reason="all ranks were lost", state="down")
    assert head.readiness() == lost
    head._coordinator.down = None
    head._coordinator.admitting = frozenset()
    assert head.readiness() == Readiness(ready=False, reason="no rank is up", state="down")


def test_a_service_that_does_nothing_of_its_work_is_told_from_a_busy_one(head: Head) -> None:
    (rank,) = head._coordinator.ranks()
    rank.waiting = 3
    assert head.readiness() == Readiness(state="busy")
    head._journal.open("seq-1", [1], SamplingParams(), (), lambda _: None)
    head._progress._latest -= head.config.cluster.wedged_timeout + 1
    wedged = head.readiness()
    assert (wedged.state, wedged.ready, wedged.live) == ("wedged", False, True)
    assert "no step" in (wedged.reason or "")
    head._coordinator.recovering = True  # it has limits of its own
    assert head.readiness() == Readiness(state="recovering")
    head._coordinator.recovering = False
    assert head.readiness() == Readiness(state="busy")


def test_who_owns_a_task_can_say_that_it_is_not_well(head: Head) -> None:
    head.impaired["tokenizer"] = "its worker starts again"
    head.impaired["control socket"] = "closed"
    said = head.readiness()
    assert (said.live, said.ready) == (True, False)
    assert said.reason == "control socket: closed; tokenizer: its worker starts again"
    head.impaired.clear()
    assert head.readiness().ready


def test_a_head_that_failed_is_not_alive(head: Head) -> None:
    failures: list[FlexpertError] = []
    head.on_failure = failures.append
    head.service_lost("rank 0 is gone")
    said = head.readiness()
    assert (said.live, said.ready, said.reason) == (False, False, str(failures[0]))


@pytest.mark.slow
def test_it_is_ready_through_changes_and_says_so_when_all_ranks_are_lost() -> None:
    async def watched(head: Head, work: asyncio.Task[object]) -> set[Readiness]:
        seen = set()
        while not work.done():
            seen.add(head.readiness())
            await asyncio.sleep(0)
        await work
        return seen

    async def during_changes(head: Head) -> set[Readiness]:
        async def changes() -> None:
            for ranks in (2, 1):
                assert (await change(head, ranks=ranks)).state == "done"

        return await watched(head, asyncio.ensure_future(changes()))

    async def during_loss(head: Head) -> set[Readiness]:
        async def loss() -> None:
            (rank,) = head.cluster().ranks
            async with asyncio.timeout(60):
                os.kill(rank.pid, signal.SIGKILL)
                while head.readiness().ready:
                    await asyncio.sleep(0.001)
                while not head.readiness().ready:
                    await asyncio.sleep(0.001)

        return await watched(head, asyncio.ensure_future(loss()))

    with running(cluster__ranks=1, cluster__max_ranks=2, engine__kv_memory="32MiB") as service:
        during = service.run(during_changes(service.head))
        assert {(state.live, state.ready) for state in during} == {(True, True)}
        seen = service.run(during_loss(service.head))
        assert all(state.live for state in seen)
        assert any("lost" in (state.reason or "") for state in seen if not state.ready)


def test_a_timer_that_fails_is_logged_and_said_until_a_change_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = Head(Config())
    source = SimpleNamespace(experts=16, moe_layers=4)
    coordinator = Coordinator(head.config, source, head, SimpleNamespace())

    def deadline() -> None:
        raise RuntimeError("no such phase")

    coordinator._clock.expire = deadline

    async def scenario() -> None:
        coordinator._clock.start(0.0)
        await until(lambda: head.impaired)

    asyncio.run(scenario())
    assert "no such phase" in head.impaired[CHANGES]
    (record,) = caplog.records
    assert record.exc_info
    coordinator.close()  # nothing is to follow
    coordinator._cluster.operation = Operation(frozenset(), frozenset({0}), 0)
    coordinator._actions.carry_out([Do.FINISH], MembershipEvent(EventKind.EXITED))
    assert head.impaired == {}


def test_an_end_of_a_rank_that_cannot_be_handled_is_logged_and_said(
    head: Head, caplog: pytest.LogCaptureFixture
) -> None:
    def on_exit(rank: int, status: int, why: str) -> None:
        raise KeyError(rank)

    head._coordinator.on_exit = on_exit
    head._on_exit(3, 0, "")
    assert "KeyError(3)" in (head.readiness().reason or "")
    (record,) = caplog.records
    assert record.exc_info
