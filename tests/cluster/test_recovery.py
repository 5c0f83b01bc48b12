"""Lost ranks come back by themselves, slow ones are waited for, and nobody outlives the head."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator

import psutil
import pytest
from support.service import Service, active, answer_all, change, requests, running, until
from support.waiting import wait_until

from flexpert.cluster.head import Head
from flexpert.errors import FlexpertError

pytestmark = pytest.mark.slow
SETTINGS = {"engine__deterministic": True, "engine__kv_memory": "32MiB"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(cluster__ranks=3, cluster__stall_timeout=1.0, **SETTINGS) as service:
        yield service


def pids(head: Head) -> dict[int, int]:
    return {rank.id: rank.pid for rank in head.cluster().ranks}


def test_a_rank_that_stops_while_nobody_works_is_ended_and_replaced(service: Service) -> None:
    async def scenario(head: Head) -> None:
        before = pids(head)
        os.kill(before[1], signal.SIGSTOP)
        await until(lambda: active(head) == {0, 1, 2} and pids(head)[1] != before[1])
        assert not psutil.pid_exists(before[1])
        assert {r: p for r, p in pids(head).items() if r != 1} == {0: before[0], 2: before[2]}

    service.run(scenario(service.head))


def test_a_rank_that_is_slow_is_waited_for(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(8)
        expected = await answer_all(head, work, clients=8)
        before, epoch = pids(head), head.cluster().epoch
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        for _ in range(8):
            os.kill(before[2], signal.SIGSTOP)
            await asyncio.sleep(0.3)
            os.kill(before[2], signal.SIGCONT)
            await asyncio.sleep(0.02)
        assert await traffic == expected
        assert (pids(head), head.cluster().epoch) == (before, epoch)

    service.run(scenario(service.head))


@pytest.mark.parametrize("victims", [(0, 1), (0, 1, 2)])
def test_several_at_once_and_all_of_them(service: Service, victims: tuple[int, ...]) -> None:
    async def scenario(head: Head) -> None:
        work = requests(16, tokens=60)
        expected = await answer_all(head, work, clients=16)
        before = pids(head)
        traffic = asyncio.create_task(answer_all(head, work, clients=16))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        for victim in victims:
            os.kill(before[victim], signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})
        assert head.cluster().down is None
        assert {r for r, pid in pids(head).items() if pid != before[r]} == set(victims)

    service.run(scenario(service.head))


def test_a_change_that_is_asked_for_goes_before_a_replacement(service: Service) -> None:
    async def scenario(head: Head) -> None:
        before = pids(head)
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: head.cluster().operation is not None)
        asked = await change(head, ranks=2)
        assert asked.state == "done"
        assert len(active(head)) == 2
        assert head.cluster().desired == sorted(active(head))
        assert (await change(head, ranks=3)).state == "done"

    service.run(scenario(service.head))


def test_a_change_that_waits_and_is_cancelled_is_told_like_any_other(service: Service) -> None:
    async def scenario(head: Head) -> None:
        over: list[tuple[str, str]] = []

        async def listen() -> None:
            async for event in head.events():
                if event.kind == "operation":
                    over.append((event.data["id"], event.data["state"]))

        listening = asyncio.create_task(listen())
        os.kill(pids(head)[0], signal.SIGKILL)
        await until(lambda: head.cluster().operation is not None)
        waits = head.begin_operation(ranks=1)
        assert head.cluster().operation != waits
        assert head.cancel_operation(waits.id).state == "cancelled"
        await until(lambda: (waits.id, "cancelled") in over)
        await until(lambda: active(head) == {0, 1, 2})
        listening.cancel()

    service.run(scenario(service.head))


def test_with_every_expert_twice_a_loss_loads_none() -> None:
    async def scenario(head: Head) -> None:
        copies = head.info.experts * head.info.moe_layers
        assert head.cluster().placement.replicas == 2 * copies
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        loaded: list[int] = []

        async def listen() -> None:
            async for event in head.events():
                if event.kind == "operation" and event.data["state"] == "done":
                    loaded.append(event.data["moved_experts"])

        listening = asyncio.create_task(listen())
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 6)
        os.kill(pids(head)[1], signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})
        await until(lambda: len(loaded) == 2)
        assert loaded[0] == 0  # the loss
        assert loaded[1] > 0  # the replacement
        assert head.cluster().placement.replicas == 2 * copies
        listening.cancel()

    with running(cluster__ranks=3, cluster__redundant_experts=16, **SETTINGS) as service:
        assert service.head.info.experts == 16
        service.run(scenario(service.head))


def test_with_never_the_others_go_on_alone_and_the_last_is_the_end() -> None:
    async def scenario(head: Head) -> None:
        work = requests(6)
        expected = await answer_all(head, work, clients=6)
        os.kill(pids(head)[0], signal.SIGKILL)
        await until(lambda: active(head) == {1})
        assert await answer_all(head, work, clients=6) == expected
        assert head.cluster().desired == [1]
        os.kill(pids(head)[1], signal.SIGKILL)
        await until(lambda: head.failure is not None)
        with pytest.raises(FlexpertError):
            await answer_all(head, work[:1], clients=1)

    with running(cluster__ranks=2, cluster__restart_policy="never", **SETTINGS) as service:
        service.run(scenario(service.head))


def test_an_error_in_any_thread_ends_the_process() -> None:
    program = """
import threading, time
from flexpert.cluster.processes.rank_process import end_with_any_thread
end_with_any_thread()
def work():
    raise MemoryError("no more")
threading.Thread(target=work, name="commands", daemon=True).start()
time.sleep(60)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert ended.returncode == 1
    assert "commands failed: MemoryError: no more" in ended.stderr


def test_nothing_outlives_a_head_that_is_killed(in_shm: Callable[[], set[str]]) -> None:
    command = [sys.executable, "-m", "flexpert", "serve", "--ranks", "2", "--port", "0"]
    shm = in_shm()
    for _ in range(2):  # and a new head on the same settings serves again
        head = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert head.stdout
            lines = iter(head.stdout.readline, "")
            url = next(m[1] for line in lines if (m := re.search(r"ready: (\S+)/v1", line)))
            with urllib.request.urlopen(f"{url}/health") as answer:
                assert answer.status == 200
            children = psutil.Process(head.pid).children(recursive=True)
            assert len(children) >= 3  # the fork server and two ranks
        finally:
            head.kill()
            head.wait()
            assert head.stdout
            head.stdout.close()
        wait_until(lambda left=children: not any(map(_lives, left)), timeout_s=20)
    assert in_shm() <= shm


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
