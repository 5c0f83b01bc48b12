"""Many changes leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pytest
from support.service import answer_all, change, requests, running

from flexpert.cluster.head import Head
from flexpert.engine.memory_plan import private_memory

pytestmark = pytest.mark.slow


TARGETS = ({"ranks": 3}, {"remove": [1]}, {"ranks": 4}, {"remove": [2, 3]})


@dataclass(frozen=True)
class Use:
    """What a process holds."""

    descriptors: int
    threads: int
    maps: int
    private_mib: float


def use(pid: int) -> Use:
    process = psutil.Process(pid)
    looks: list[tuple[int, int]] = []
    for _ in range(5):  # a process that looks at /proc for its statistics has a file open meanwhile
        looks.append((process.num_fds(), process.num_threads()))
        time.sleep(0.01)
    return Use(
        descriptors=min(descriptors for descriptors, _ in looks),
        threads=min(threads for _, threads in looks),
        maps=len(process.memory_maps(grouped=False)),
        private_mib=private_memory(pid=pid) / 2**20,
    )


def family() -> list[int]:
    return sorted(child.pid for child in psutil.Process().children(recursive=True))


@pytest.mark.timeout(300)
def test_many_changes_leave_nothing_behind(in_shm: Callable[[], set[str]]) -> None:
    async def scenario(head: Head) -> None:
        work = requests(8, tokens=20)

        async def rounds(count: int) -> None:
            for number in range(count):
                target = TARGETS[number % len(TARGETS)]
                traffic = asyncio.create_task(answer_all(head, work, clients=4))
                done = await change(head, **target)
                assert done.state == "done", done
                await traffic
            assert (await change(head, ranks=1)).state == "done"
            gc.collect()

        await rounds(8)  # pools, caches and allocators reach their working size
        survivor = head.cluster().ranks[0].pid
        before_head, before_rank = use(os.getpid()), use(survivor)
        processes, shared = family(), in_shm()
        await rounds(16)
        assert head.cluster().ranks[0].pid == survivor
        assert family() == processes
        assert in_shm() == shared
        for before, after in ((before_head, use(os.getpid())), (before_rank, use(survivor))):
            assert after.descriptors == before.descriptors
            assert after.threads == before.threads
            assert after.maps <= before.maps + 8, "an allocator may take another arena or two"
            assert after.private_mib < before.private_mib + 16

    with running(cluster__ranks=1, engine__kv_memory="16MiB") as service:
        service.run(scenario(service.head), timeout_s=280)
