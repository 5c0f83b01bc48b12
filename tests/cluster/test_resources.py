"""What the machine refuses, the change that desired it reports; nothing else notices."""

from __future__ import annotations

import asyncio
import os
import resource
from typing import Any

import psutil
import pytest
from support.service import Answer, active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.errors import OperationRefused

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "cluster__ranks": 2,
    "engine__deterministic": True,
    "engine__kv_memory": "32MiB",
}


def fork_server(head: Head) -> int:
    assert head._launcher is not None
    assert head._launcher._process is not None
    return head._launcher._process.pid


async def refused(head: Head, *words: str) -> None:
    """A scale-up fails with the reason, while requests are answered as ever."""
    work = requests(6, tokens=40)
    expected: list[Answer] = await answer_all(head, work, clients=6)
    traffic = asyncio.create_task(answer_all(head, work, clients=6))
    done = await change(head, ranks=3)
    assert done.state == "failed"
    for word in words:
        assert word in (done.error or "")
    assert await traffic == expected
    assert active(head) == {0, 1}


def test_without_descriptors_in_the_fork_server_a_scale_up_fails_and_later_succeeds() -> None:
    async def scenario(head: Head) -> None:
        pid = fork_server(head)
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # the lowest free number: not even the connection of the new rank can be received
        free = min(set(range(1024)) - set(map(int, os.listdir(f"/proc/{pid}/fd"))))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free, limits[1]))
        await refused(head, "no process can be started", "ulimit -n")
        # one more: the process can be forked, but not watched
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free + 1, limits[1]))
        await refused(head, "no process can be started", "ulimit -n")
        assert fork_server(head) == pid
        assert len(psutil.Process(pid).children()) == 2, "the child that could not be watched"
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert (await change(head, ranks=3)).state == "done"

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_without_descriptors_in_the_head_a_scale_up_fails_and_later_succeeds() -> None:
    async def scenario(head: Head) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = sorted(set(range(4096)) - set(map(int, os.listdir("/proc/self/fd"))))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (free[0], hard))
            try:
                done = await change(head, ranks=3)
                state, why = done.state, done.error or ""
            except OperationRefused as error:  # not even the free memory could be read
                state, why = "refused", str(error)
            assert state in ("failed", "refused")
            assert "open files" in why
            assert await answer_all(head, requests(2, tokens=9), clients=2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (await change(head, ranks=3)).state == "done"

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_a_rank_that_gets_no_memory_fails_its_change_with_the_reason() -> None:
    async def scenario(head: Head) -> None:
        pid = fork_server(head)
        limits = resource.prlimit(pid, resource.RLIMIT_AS)
        mapped = psutil.Process(pid).memory_info().vms
        resource.prlimit(pid, resource.RLIMIT_AS, (mapped + (4 << 20), limits[1]))
        await refused(head, "rank 2 exited")
        resource.prlimit(pid, resource.RLIMIT_AS, limits)
        await until(lambda: active(head) == {0, 1})
        assert (await change(head, ranks=3)).state == "done"

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_a_member_that_gets_no_memory_for_its_window_fails_the_change_and_goes_on() -> None:
    """Shared memory may not grow (RLIMIT_FSIZE counts for memfds, too): a place for a newcomer is
    refused to a member while it serves."""

    async def scenario(head: Head) -> None:
        (pid,) = [rank.pid for rank in head.cluster().ranks if rank.id == 1]
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        await refused(head, "rank 1", "no place of a window", "File too large")
        assert [rank.pid for rank in head.cluster().ranks if rank.id == 1] == [pid]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert (await change(head, ranks=3)).state == "done"

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_a_newcomer_that_gets_no_memory_for_its_kv_cache_says_so() -> None:
    async def scenario(head: Head) -> None:
        pid = fork_server(head)
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # of 32 MiB
        await refused(head, "rank 2 exited", "File too large")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert (await change(head, ranks=3)).state == "done"

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))
