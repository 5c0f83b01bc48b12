"""Below the ranks that have memory for all experts: requests wait, and it is said what for."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from support.service import active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.processes.model_opening import open_source
from flexpert.config import load_config
from flexpert.engine.memory_plan import planned_memory
from flexpert.moe.placement import replan

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "cluster__ranks": 3,
    "cluster__max_ranks": 4,
    "engine__kv_memory": "32MiB",
    "engine__max_tokens_per_step": 64,
}


def enough_for(ranks: int) -> int:
    """Bytes that each of so many ranks needs, and no more."""
    config = load_config(
        environment={}, overrides={k.replace("__", "."): v for k, v in SETTINGS.items()}
    )
    source = open_source(config)
    info = source.info
    placement = replan(None, range(ranks), experts=info.experts, layers=info.moe_layers)
    most = max(map(placement.count, placement.ranks))
    return planned_memory(source, config.engine, config.cluster.max_ranks, most, ranks).total


def pids(head: Head) -> dict[int, int]:
    return {rank.id: rank.pid for rank in head.cluster().ranks}


def kill(head: Head, rank: int) -> None:
    os.kill(pids(head)[rank], signal.SIGKILL)


def test_requests_wait_for_the_replacement_and_the_survivors_keep_what_they_hold() -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        before = pids(head)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        kill(head, 1)
        await until(lambda: head.cluster().down is not None)
        down = head.cluster().down or ""
        assert "rank 1 exited; ranks [0, 2] cannot hold all experts within" in down
        assert {rank.state for rank in head.cluster().ranks if rank.id != 1} == {"ready"}
        late = asyncio.create_task(answer_all(head, work[:3], clients=3))
        await until(lambda: active(head) == {0, 1, 2})
        assert head.cluster().down is None
        assert await traffic == expected
        assert await late == expected[:3]
        assert {r: p for r, p in pids(head).items() if r != 1} == {0: before[0], 2: before[2]}

    with running(
        engine__deterministic=True, cluster__memory_per_rank=enough_for(3), **SETTINGS
    ) as service:
        service.run(scenario(service.head))


def test_ranks_that_are_lost_while_the_others_wait_come_back_with_them() -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        kill(head, 1)
        await until(lambda: head.cluster().down is not None)
        kill(head, 0)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 8)
        kill(head, 1)
        await until(lambda: head.cluster().down is not None)
        for rank in (0, 2):
            kill(head, rank)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})

    with running(
        engine__deterministic=True, cluster__memory_per_rank=enough_for(3), **SETTINGS
    ) as service:
        service.run(scenario(service.head))


def test_if_nobody_comes_by_itself_it_says_so_and_a_person_can_help() -> None:
    async def scenario(head: Head) -> None:
        work = requests(6)
        expected = await answer_all(head, work, clients=6)
        kill(head, 2)
        await until(lambda: "no rank is started again by itself" in (head.cluster().down or ""))
        traffic = asyncio.create_task(answer_all(head, work, clients=6))
        await until(lambda: len(head._journal) == 6)
        assert (await change(head, ranks=3)).state == "done"
        assert head.cluster().down is None
        assert await traffic == expected
        assert active(head) == {0, 1, 2}

    with running(
        engine__deterministic=True,
        cluster__restart_policy="never",
        cluster__memory_per_rank=enough_for(3),
        **SETTINGS,
    ) as service:
        service.run(scenario(service.head))


def test_with_degrade_the_survivors_go_on_without_what_they_cannot_hold() -> None:
    async def scenario(head: Head) -> None:
        work = requests(6)
        held = head.cluster().placement.experts_per_rank["2"]
        kill(head, 2)
        await until(lambda: active(head) == {0, 1})
        degraded = await answer_all(head, work, clients=6)
        assert all(
            len(answer.tokens) == params.max_tokens
            for answer, (_, params) in zip(degraded, work, strict=True)
        )
        assert all(answer.degraded for answer in degraded)
        assert head.cluster().down is None
        assert head.cluster().placement.missing_experts == held
        assert (await change(head, ranks=3)).state == "done"
        assert head.cluster().placement.missing_experts == 0
        assert not any(answer.degraded for answer in await answer_all(head, work, clients=6))

    with running(
        cluster__restart_policy="never",
        cluster__on_missing_expert="degrade",
        cluster__memory_per_rank=enough_for(3),
        **SETTINGS,
    ) as service:
        service.run(scenario(service.head))
