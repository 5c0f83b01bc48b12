"""The end of the fork server, and of every rank with it, costs nobody an answer."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest
from support.service import active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.errors import FlexpertError

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "cluster__ranks": 2,
    "engine__deterministic": True,
    "engine__kv_memory": "32MiB",
}


def server(head: Head) -> int:
    """Pid of the fork server."""
    assert head._launcher is not None
    assert head._launcher._process is not None
    return head._launcher._process.pid


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_requests_wait_for_a_new_fork_server_and_its_ranks() -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        old, ranks = server(head), {rank.pid for rank in head.cluster().ranks}
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        os.kill(old, signal.SIGKILL)
        await until(lambda: head.cluster().down is not None)
        assert "the fork server ended (SIGKILL)" in (head.cluster().down or "")
        # the head has waited for the rank whose loss it told first, and waits for the others
        await until(lambda: not any(lives(pid) for pid in (old, *ranks)))
        late = asyncio.create_task(answer_all(head, work[:3], clients=3))
        assert await asyncio.wait_for(traffic, 60) == expected
        assert await late == expected[:3]
        await until(lambda: active(head) == {0, 1})
        assert head.cluster().down is None
        assert (await change(head, ranks=3)).state == "done"
        os.kill(server(head), signal.SIGKILL)
        assert await asyncio.wait_for(answer_all(head, work, clients=12), 60) == expected
        await until(lambda: active(head) == {0, 1, 2})

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_one_that_ends_again_and_again_ends_the_service_and_says_why() -> None:
    async def scenario(head: Head) -> None:
        waiting = asyncio.create_task(answer_all(head, requests(2, tokens=1500), clients=2))
        killed = set()
        while head.failure is None:
            if server(head) not in killed:
                killed.add(server(head))
                os.kill(server(head), signal.SIGKILL)
            await asyncio.sleep(0.01)
        assert 2 <= len(killed) <= 4
        assert "the fork server ended" in str(head.failure)
        assert "no rank is started again" in str(head.failure)
        with pytest.raises(FlexpertError, match="the fork server ended"):
            await waiting

    with running(cluster__restart_limit=2, cluster__restart_backoff=0.1, **SETTINGS) as service:
        service.run(scenario(service.head))


def test_a_service_that_stops_waits_for_no_fork_server() -> None:
    async def scenario(head: Head) -> None:
        old = server(head)
        os.kill(old, signal.SIGKILL)
        await until(lambda: server(head) != old)
        new = server(head)
        await asyncio.wait_for(head.stop(), 5)
        assert not lives(new)

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))
