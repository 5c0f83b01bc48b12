"""Spare ranks: a change takes them over, and what becomes of one disturbs nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from support.service import active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.processes.spare_ranks import SpareRanks, next_ids
from flexpert.engine import rank_protocol as msg

SETTINGS: dict[str, Any] = {
    "cluster__ranks": 1,
    "cluster__max_ranks": 4,
    "cluster__spare_ranks": 1,
    "engine__kv_memory": "32MiB",
}


def hello(pid: int) -> msg.Hello:
    return msg.Hello(pid, "host", b"", b"", b"")


def test_spares_have_the_ids_that_join_next() -> None:
    assert next_ids({0, 2}, 5, 2) == [1, 3]
    assert next_ids({0, 1}, 2, 1) == []


class Processes:
    def __init__(self, count: int = 2, **limits: float) -> None:
        self.started: list[int] = []
        self.stopped: list[int] = []
        self.taken: set[int] | None = {0}
        self.spares = SpareRanks(
            count,
            4,
            taken=lambda: self.taken,
            start=self.started.append,
            stop=self.stopped.append,
            **limits,
        )


def test_one_after_the_other_and_none_while_ranks_change() -> None:
    async def scenario() -> None:
        processes = Processes()
        spares = processes.spares
        processes.taken = None
        spares.run()
        await asyncio.sleep(0.7)
        assert processes.started == []
        processes.taken = {0}
        await until(lambda: processes.started == [1])
        await asyncio.sleep(0.7)
        assert processes.started == [1], "the other waits until the first is ready"
        spares.on_report(1, hello(7))
        await until(lambda: processes.started == [1, 2])
        assert [(view.id, view.ready) for view in spares.views()] == [(1, True), (2, False)]
        with pytest.raises(msg.Contradiction):
            spares.on_report(1, msg.Halted(3))
        spares.close()
        assert processes.stopped == [1, 2]

    asyncio.run(scenario())


def test_a_change_takes_one_that_is_ready_starting_or_about_to_be_gone() -> None:
    async def scenario() -> None:
        processes = Processes()
        spares = processes.spares
        spawned: list[int] = []
        assert spares.take(1, lambda: spawned.append(1)) == (False, None)
        spares.run()
        await until(lambda: processes.started == [1])
        spares.on_report(1, hello(7))
        await until(lambda: processes.started == [1, 2])
        assert spares.take(1, lambda: spawned.append(1)) == (True, hello(7))
        assert spares.take(2, lambda: spawned.append(2)) == (True, None)
        assert 1 not in spares
        assert 2 not in spares
        processes.taken = {0}
        await until(lambda: processes.started == [1, 2, 1])
        spares.on_disconnected(1)
        assert spares.take(1, lambda: spawned.append(1)) == (True, None)
        assert spawned == []
        spares.on_exit(1, "SIGKILL")
        assert spawned == [1]
        spares.close()

    asyncio.run(scenario())


def test_a_change_that_is_over_hears_of_the_exit_it_waited_for() -> None:
    async def scenario() -> None:
        processes = Processes()
        spares = processes.spares
        spawned: list[int] = []
        spares.run()
        await until(lambda: processes.started == [1])
        spares.on_disconnected(1)
        spares.take(1, lambda: spawned.append(1))
        spares.withdraw(1)
        assert spares.on_exit(1, "SIGKILL")
        assert spawned == []
        await until(lambda: processes.started == [1, 1])
        spares.on_disconnected(1)
        spares.take(1, lambda: spawned.append(1))
        spares.close()
        assert not spares.on_exit(1, "SIGKILL")
        assert spawned == [], "nothing is started while the service stops"

    asyncio.run(scenario())


@pytest.mark.parametrize("greets", [False, True])
def test_a_silent_one_is_replaced(*, greets: bool) -> None:
    async def scenario() -> None:
        processes = Processes(1, start_timeout_s=0.2, stall_timeout_s=0.2)
        spares = processes.spares
        spares.run()
        await until(lambda: processes.started == [1])
        if greets:
            spares.on_report(1, hello(7))
        await until(lambda: processes.stopped[:1] == [1])
        assert not spares.on_exit(1, "SIGKILL")
        await until(lambda: processes.started.count(1) == 2)
        spares.close()

    asyncio.run(scenario())


def test_one_whose_id_would_not_join_next_makes_room() -> None:
    async def scenario() -> None:
        processes = Processes()
        processes.taken = {0, 1}
        spares = processes.spares
        spares.run()
        for rank in (2, 3):
            await until(lambda rank=rank: processes.started[-1:] == [rank])
            spares.on_report(rank, hello(rank))
        processes.taken = {1}
        await until(lambda: processes.stopped == [3])
        spares.on_exit(3, "")
        await until(lambda: processes.started == [2, 3, 0])
        spares.close()

    asyncio.run(scenario())


async def ready(head: Head, rank: int) -> int:
    """Pid of the spare with that id, once it is there."""
    await until(lambda: [s.id for s in head.cluster().spares if s.ready] == [rank], 30)
    return head.cluster().spares[0].pid


@pytest.mark.slow
def test_a_join_takes_the_process_that_waits_and_another_one_takes_its_place() -> None:
    async def scenario(head: Head) -> None:
        waits = await ready(head, 1)
        work = requests(8, tokens=60)
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        assert (await change(head, ranks=2)).state == "done"
        pids = {rank.id: rank.pid for rank in head.cluster().ranks}
        assert pids[1] == waits
        await ready(head, 2)
        assert (await change(head, remove=[0])).state == "done"
        await ready(head, 0)
        assert (await change(head, ranks=3)).state == "done", "one spare, and one that is none"
        assert [len(a.tokens) for a in await traffic] == [p.max_tokens for _, p in work]
        await ready(head, 3)

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


@pytest.mark.slow
def test_the_end_of_a_spare_disturbs_nobody() -> None:
    async def scenario(head: Head) -> None:
        first = await ready(head, 1)
        os.kill(first, signal.SIGKILL)
        await until(lambda: head.cluster().spares and head.cluster().spares[0].pid != first, 30)
        os.kill(await ready(head, 1), signal.SIGKILL)
        joined = await change(head, ranks=2)  # its end is seen before, meanwhile or after
        if joined.state != "done":
            assert "rank 1" in (joined.error or "")
            assert (await change(head, ranks=2)).state == "done"
        assert active(head) == {0, 1}
        work = requests(4, tokens=10)
        answers = await answer_all(head, work, clients=4)
        assert [len(answer.tokens) for answer in answers] == [p.max_tokens for _, p in work]

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


@pytest.mark.slow
def test_a_lost_rank_comes_back_though_a_spare_waits() -> None:
    async def scenario(head: Head) -> None:
        await ready(head, 2)
        victim = next(rank.pid for rank in head.cluster().ranks if rank.id == 0)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: {r.id: r.pid for r in head.cluster().ranks}.get(0, victim) != victim)
        await until(lambda: active(head) == {0, 1})
        await ready(head, 2)

    with running(**{**SETTINGS, "cluster__ranks": 2}) as service:
        service.run(scenario(service.head))
