"""With on_missing_expert=degrade nobody waits for lost experts, and an answer says what it is."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import msgspec
import pytest
from support.service import active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.views import OperationView

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    "cluster__ranks": 3,
    "cluster__on_missing_expert": "degrade",
    "engine__kv_memory": "32MiB",
}


def kill(head: Head, rank: int) -> None:
    os.kill(next(r.pid for r in head.cluster().ranks if r.id == rank), signal.SIGKILL)


def counted(head: Head, name: str) -> float:
    return head.registry.get_sample_value(f"flexpert_{name}_total") or 0.0


async def operations(head: Head, begun: list[OperationView], over: list[OperationView]) -> None:
    """Keeps the lists of all that begin and end from now on."""
    async for event in head.events():
        if event.kind == "operation":
            view = msgspec.convert(event.data, OperationView)
            if view.id not in {other.id for other in begun}:
                begun.append(view)
            if view.state not in ("preparing", "committing"):
                over.append(view)


def test_survivors_go_on_at_once_then_load_what_is_missing_then_the_replacement_joins() -> None:
    async def scenario(head: Head) -> None:
        work = requests(16, tokens=120)
        clean = await answer_all(head, work, clients=16)
        assert not any(answer.degraded for answer in clean)
        assert head.cluster().placement.missing_experts == 0

        over: list[OperationView] = []
        listening = asyncio.create_task(operations(head, [], over))
        traffic = asyncio.create_task(answer_all(head, work, clients=16))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 12)
        held = head.cluster().placement.experts_per_rank["1"]
        kill(head, 1)
        answers = await traffic
        await until(lambda: active(head) == {0, 1, 2})
        assert [len(a.tokens) for a in answers] == [len(a.tokens) for a in clean]
        assert all(answer.finish == "length" for answer in answers)

        # evidence that comes before the news of the end makes a recovery that another takes over
        loss, restoring, replacing = (view for view in over if view.state == "done")
        assert str(loss.reason).startswith("rank 1 exited")
        assert (loss.moved_experts, loss.remove) == (0, [1])
        assert restoring.reason == f"loads {held} experts that were lost"
        assert (restoring.moved_experts, restoring.target) == (held, [0, 2])
        assert replacing.reason == "replaces rank 1"
        assert head.cluster().placement.missing_experts == 0

        degraded = [answer for answer in answers if answer.degraded]
        assert degraded
        assert counted(head, "degraded_sequences") == len(degraded)
        assert len(degraded) <= counted(head, "degraded_tokens")
        again = await answer_all(head, work, clients=16)
        assert not any(answer.degraded for answer in again)
        listening.cancel()

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


@pytest.mark.parametrize("target", [1, 2])
def test_a_change_that_is_asked_for_waits_until_the_experts_are_loaded(target: int) -> None:
    async def scenario(head: Head) -> None:
        begun: list[OperationView] = []
        over: list[OperationView] = []
        listening = asyncio.create_task(operations(head, begun, over))
        kill(head, 0)
        await until(lambda: begun and str(begun[-1].reason).startswith("loads "))
        assert head.cluster().placement.missing_experts > 0
        assert (await change(head, ranks=target)).state == "done"
        assert head.cluster().placement.missing_experts == 0
        restoring = next(view for view in over if str(view.reason).startswith("loads "))
        assert restoring.state == "done"
        assert len(active(head)) == target
        assert head.cluster().desired == sorted(active(head))
        listening.cancel()

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))
