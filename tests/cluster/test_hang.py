"""A rank whose step loop hangs while its process goes on saying that it lives is replaced."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.service import Service, active, answer_all, requests, running, until

from flexpert.cluster.head import Head

pytestmark = pytest.mark.slow
STALL_S = 2.0
CONTINUE, SEIZE, INTERRUPT, ANY_THREAD = 7, 0x4206, 0x4207, 0x40000000  # ptrace(2), waitpid(2)


def waits_for_main_thread(pid: int) -> bool:
    """Whether other threads of the process ask for Python's lock all the time."""

    def switches() -> int:
        return sum(
            int(line.split()[1])
            for task in Path(f"/proc/{pid}/task").iterdir()
            if int(task.name) != pid
            for line in (task / "status").read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    before = switches()
    time.sleep(0.1)
    return switches() - before >= 10  # every 5 ms


@contextmanager
def hung_main_thread(pid: int, with_lock: bool | None = None) -> Iterator[None]:
    """Stops a process's main thread and no other until the process ends: wherever it is, or while
    it has Python's lock, or has not."""
    libc = ctypes.CDLL(None, use_errno=True)
    stopped, refused = threading.Event(), []

    def hold() -> None:  # all calls come from the thread that traces
        for request in (SEIZE, INTERRUPT):
            if libc.ptrace(request, pid, None, None) != 0:
                refused.append(os.strerror(ctypes.get_errno()))
                stopped.set()
                return
        _, status = os.waitpid(pid, ANY_THREAD)
        while with_lock is not None and waits_for_main_thread(pid) != with_lock:
            libc.ptrace(CONTINUE, pid, None, None)
            time.sleep(0.003)
            libc.ptrace(INTERRUPT, pid, None, None)
            _, status = os.waitpid(pid, ANY_THREAD)
        stopped.set()
        while os.WIFSTOPPED(status):
            _, status = os.waitpid(pid, ANY_THREAD)  # else its parent does not hear of its end

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert stopped.wait(20)
    if refused:
        pytest.skip(f"ptrace: {refused[0]}")
    yield
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(
        cluster__ranks=3,
        cluster__stall_timeout=STALL_S,
        engine__deterministic=True,
        engine__kv_memory="32MiB",
    ) as service:
        yield service


def pids(head: Head) -> dict[int, int]:
    return {rank.id: rank.pid for rank in head.cluster().ranks}


@pytest.mark.parametrize(
    ("busy", "with_lock"),
    [(True, True), (True, False), (False, None)],
    ids=["with Python's lock", "under load", "idle"],
)
def test_a_rank_whose_step_loop_hangs_is_replaced_within_the_stall_limit(
    service: Service, busy: bool, with_lock: bool | None
) -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=200)
        expected = await answer_all(head, work, clients=12)
        before = pids(head)
        traffic = asyncio.create_task(answer_all(head, work if busy else [], clients=12))
        if busy:
            await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        with hung_main_thread(before[1], with_lock):
            began = time.monotonic()
            await until(lambda: pids(head).get(1) != before[1])
            took = time.monotonic() - began
            await until(lambda: active(head) == {0, 1, 2})
        assert took < 2 * STALL_S, "an exchange that times out takes a minute"
        assert await traffic == (expected if busy else [])
        assert {r: p for r, p in pids(head).items() if r != 1} == {0: before[0], 2: before[2]}

    service.run(scenario(service.head))
