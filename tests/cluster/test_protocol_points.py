"""Promises 1, 3, 5 at every point of the protocol: whoever ends there costs no answer.

One service for the whole table. In each case a rank ends or stops itself exactly at a point, under
traffic, and mostly in the middle of a change that replaces one member by a newcomer.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from support.service import (
    Answer,
    Service,
    active,
    answer,
    answer_all,
    change,
    requests,
    running,
    until,
)

from flexpert.cluster.head import Head
from flexpert.engine import rank_protocol as msg
from flexpert.engine.faults import POINTS, VARIABLE, Fault, Point

pytestmark = pytest.mark.slow

CLIENTS = 4
WORK = requests(12, tokens=30)

Who = Literal["member", "leaver", "newcomer", "other"]
Action = Literal["kill", "stop", "starve"]
Ends = Literal["as before", "as desired"]


@dataclass(frozen=True)
class Strike:
    who: Who
    point: Point
    count: int = 1
    action: Action = "kill"


@dataclass(frozen=True)
class Case:
    """strikes: on whom, where. change: whether a leaver makes place for a newcomer meanwhile.

    ends: with the members there were, or those that were asked for.
    """

    strikes: tuple[Strike, ...]
    change: bool
    ends: Ends

    def __str__(self) -> str:
        names = [
            f"{s.who}-{s.point}" + ("" if s.action == "kill" else f"-{s.action}")
            for s in self.strikes
        ]
        return "+".join(names)


def in_a_step(point: Point, count: int = 3, action: Action = "kill") -> Case:
    return Case((Strike("member", point, count, action),), change=False, ends="as before")


def in_a_change(
    who: Who, point: Point, ends: Ends, count: int = 1, action: Action = "kill"
) -> Case:
    return Case((Strike(who, point, count, action),), change=True, ends=ends)


def in_a_recovery(point: Point) -> Case:
    """One is lost in a step, and another while the others go on without it."""
    strikes = (Strike("member", "dispatch_wait", 3), Strike("other", point))
    return Case(strikes, change=False, ends="as before")


TABLE = [
    # one step
    in_a_step("vote"),
    in_a_step("vote_wait"),
    in_a_step("dispatch_send"),
    in_a_step("dispatch_wait"),
    in_a_step("combine_send"),
    in_a_step("combine_wait"),
    in_a_step("forward"),
    in_a_step("publish"),
    in_a_step("published"),
    in_a_step("vote", action="stop"),
    in_a_step("dispatch_wait", action="stop"),
    in_a_step("vote", action="starve"),
    in_a_step("dispatch_wait", action="starve"),
    # prepare: withdrawn, whoever ends
    in_a_change("newcomer", "spawn", "as before"),
    in_a_change("newcomer", "connect", "as before"),
    in_a_change("newcomer", "load", "as before", count=2),
    in_a_change("newcomer", "load", "as before", action="stop"),
    in_a_change("newcomer", "warm_up", "as before"),
    in_a_change("newcomer", "prepared", "as before"),
    in_a_change("member", "connect", "as before"),
    in_a_change("member", "load", "as before", count=2),
    in_a_change("member", "prepared", "as before"),
    in_a_change("leaver", "prepared", "as before"),
    in_a_change("leaver", "offer", "as before"),
    in_a_change("newcomer", "fetch", "as before"),
    # commit: it cannot be withdrawn any more
    in_a_change("member", "armed", "as desired"),
    in_a_change("leaver", "armed", "as desired"),
    in_a_change("newcomer", "armed", "as desired"),
    in_a_change("member", "switch", "as desired"),
    in_a_change("newcomer", "switch", "as desired"),
    in_a_change("member", "first_vote", "as desired"),
    in_a_change("newcomer", "first_vote", "as desired"),
    in_a_change("member", "switched", "as desired"),
    in_a_change("newcomer", "switched", "as desired"),
    in_a_change("leaver", "hand_over", "as desired"),
    in_a_change("leaver", "handed_over", "as desired"),
    # release
    in_a_change("newcomer", "adopt", "as desired"),
    in_a_change("leaver", "release", "as desired"),
    # while the others recover from a loss
    in_a_recovery("connect"),
    in_a_recovery("load"),
    in_a_recovery("prepared"),
    in_a_recovery("armed"),
    in_a_recovery("switch"),
    in_a_recovery("first_vote"),
    in_a_recovery("switched"),
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        with running(
            cluster__ranks=3,
            cluster__max_ranks=4,
            cluster__stall_timeout=0.5,
            cluster__restart_backoff=0,
            cluster__restart_limit=1000,
            engine__deterministic=True,
            engine__kv_memory="32MiB",
        ) as service:
            yield service


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[Answer]:
    return service.run(answer_all(service.head, WORK, CLIENTS))


@asynccontextmanager
async def traffic(head: Head, undisturbed: list[Answer]) -> AsyncIterator[None]:
    """Clients ask while the block lasts; each answer must be the undisturbed one, and whole."""
    over = asyncio.Event()

    async def client(number: int) -> None:
        while not over.is_set():
            number = (number + CLIENTS + 1) % len(WORK)
            assert await answer(head, *WORK[number]) == undisturbed[number], f"request {number}"

    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(client(number))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= CLIENTS // 2)
        try:
            yield
        finally:
            over.set()


def processes(head: Head) -> set[tuple[int, int]]:
    """Id and pid of each rank."""
    return {(rank.id, rank.pid) for rank in head.cluster().ranks}


def test_no_point_is_left_out() -> None:
    assert {strike.point for case in TABLE for strike in case.strikes} == set(POINTS)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_rank_that_ends_at_any_point_costs_no_answer(
    service: Service, folder: Path, undisturbed: list[Answer], case: Case
) -> None:
    async def scenario(head: Head) -> None:
        for left in folder.iterdir():  # of a case that failed
            left.unlink()
        await until(lambda: len(active(head)) == 3)
        before = active(head)
        leaver, member, other = sorted(before)
        newcomer = min({0, 1, 2, 3} - before)
        ids = {"leaver": leaver, "member": member, "other": other, "newcomer": newcomer}
        struck = {ids[strike.who] for strike in case.strikes}
        doomed = {process for process in processes(head) if process[0] in struck}
        desired = before - {leaver} | {newcomer} if case.ends == "as desired" else before
        async with traffic(head, undisturbed):
            planted = [
                Fault(ids[s.who], s.point, s.count, s.action).plant(folder) for s in case.strikes
            ]
            if case.change:
                await change(head, add=1, remove=[leaver])
            await until(lambda: not any(path.exists() for path in planted))
            await until(lambda: not doomed & processes(head))
            await until(lambda: active(head) == desired)
            assert set(head.cluster().desired) == desired
            assert head.cluster().down is None
            if case.change:
                return  # that another can be made, the next case shows
            further = await change(head, add=1, remove=[min(desired)])
            assert further.state == "done", further
            assert active(head) == set(further.target)

    service.run(scenario(service.head))


def test_a_rank_and_a_head_that_do_not_hear_each_other_for_long_both_wait(
    service: Service, folder: Path, undisturbed: list[Answer]
) -> None:
    """Longer than the stall timeout: the process works, and slow is not dead."""

    async def scenario(head: Head, patch: pytest.MonkeyPatch) -> None:
        await until(lambda: len(active(head)) == 3)
        before, epoch = processes(head), head.cluster().epoch
        victim = min(active(head))
        heard: list[float] = []
        coordinator = head._need_coordinator()
        listen = coordinator.on_report

        def note(rank: int, report: msg.Report) -> None:
            if rank == victim:
                heard.append(head.now())
            listen(rank, report)

        patch.setattr(coordinator, "on_report", note)
        async with traffic(head, undisturbed):
            Fault(victim, "vote", action="cut", seconds=1.2).plant(folder)
            await until(lambda: any(b - a > 1.0 for a, b in itertools.pairwise(heard)))
            assert (processes(head), head.cluster().epoch) == (before, epoch)

    with pytest.MonkeyPatch.context() as patch:
        service.run(scenario(service.head, patch))


def test_a_rank_that_is_not_heard_and_does_not_work_is_ended(
    service: Service, folder: Path, undisturbed: list[Answer]
) -> None:
    async def scenario(head: Head) -> None:
        await until(lambda: len(active(head)) == 3)
        before, desired = processes(head), active(head)
        victim = min(desired)
        async with traffic(head, undisturbed):
            Fault(victim, "vote", action="cut", seconds=60).plant(folder)
            Fault(victim, "vote", count=2, action="stop").plant(folder)
            await until(lambda: active(head) == desired and len(processes(head) - before) == 1)
            assert {rank for rank, _ in before - processes(head)} == {victim}

    service.run(scenario(service.head))
