"""Experts move between ranks that serve: answers stay what they are, and any other change wins."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from support.service import Service, active, answer_all, change, requests, running, until

from flexpert.cluster.balance_policy import Measured
from flexpert.cluster.balancer import Balancer
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.expert_recovery import ExpertRecovery
from flexpert.cluster.head import Head
from flexpert.cluster.views import OperationView
from flexpert.errors import OperationConflict
from flexpert.moe.placement import Placement

CLIENTS = 6


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rebalance moves all experts: each rank gets what the one before it has held."""
    planned = ClusterState.plan

    def plan(self: ClusterState, target: Iterable[int], loads: Any = None) -> Placement:
        ids = frozenset(target)
        if loads is None or self.placement is None or ids != self.members:
            return planned(self, ids, loads)
        ranks = sorted(ids)
        before = dict(zip(ranks, [*ranks[1:], ranks[0]], strict=True))
        layers = [{rank: held[before[rank]] for rank in ranks} for held in self.placement.layers]
        return Placement(self.placement.experts, layers)

    monkeypatch.setattr(ClusterState, "plan", plan)


@pytest.fixture
def service(turning: None) -> Iterator[Service]:
    with running(
        cluster__ranks=3,
        cluster__max_ranks=5,
        cluster__redundant_experts=2,
        cluster__stall_timeout=20.0,
        engine__kv_memory="32MiB",
        engine__deterministic=True,
    ) as found:
        yield found


async def rebalance(head: Head) -> OperationView:
    operation = head.rebalance()
    return await head.wait_operation(operation.id)


@pytest.mark.slow
def test_answers_are_the_same_through_rebalances_joins_and_losses(service: Service) -> None:
    head, work = service.head, requests(16, tokens=60)

    async def disturbed() -> list[str]:
        ended = [(await rebalance(head)).state for _ in range(3)]
        await change(head, ranks=4)
        ended.append((await rebalance(head)).state)
        for rank in sorted(active(head))[:2]:  # one that is told to load, one that is to switch
            operation = head.rebalance()
            pid = next(found.pid for found in head.cluster().ranks if found.id == rank)
            os.kill(pid, signal.SIGKILL)
            ended.append((await head.wait_operation(operation.id)).state)
            await until(lambda: len(active(head)) == 4, 60)
        ended.append((await rebalance(head)).state)
        await change(head, ranks=2)
        return ended

    async def both() -> tuple[Any, Any, list[str]]:
        undisturbed = await answer_all(head, work, CLIENTS)
        answers, ended = await asyncio.gather(answer_all(head, work, CLIENTS), disturbed())
        return undisturbed, answers, ended

    undisturbed, answers, ended = service.run(both(), 240)
    assert [a.finish for a in answers] == ["length"] * len(work)
    assert [a.tokens for a in answers] == [a.tokens for a in undisturbed]
    assert ended[:4] == ["done"] * 4
    assert set(ended[4:6]) <= {"done", "failed"}
    assert ended[6] == "done"
    assert head.cluster().placement.missing_experts == 0


def test_a_rebalance_makes_way_and_can_be_cancelled(service: Service) -> None:
    head = service.head
    cluster = head._need_coordinator()._cluster
    slow = cluster.config.cluster.model_copy(update={"balance_bandwidth": 2**16})
    cluster.config = cluster.config.model_copy(update={"cluster": slow})

    async def cancelled() -> OperationView:
        head.rebalance("mine")
        assert head.rebalance().id == "mine", "the same is asked for"
        with pytest.raises(OperationConflict):
            head.rebalance("another")
        await until(lambda: head.operation("mine").phase == "load")
        await asyncio.sleep(0.1)
        head.cancel_operation("mine")
        return await head.wait_operation("mine")

    async def joined() -> tuple[OperationView, OperationView]:
        first = head.rebalance()
        await until(lambda: head.operation(first.id).phase == "load")
        second = await change(head, ranks=4)
        return await head.wait_operation(first.id), second

    epoch = head.cluster().epoch
    before = head.cluster().placement
    assert service.run(cancelled()).state == "cancelled"
    assert head.cluster().epoch == epoch
    assert head.cluster().placement == before
    assert head.rebalance("mine").state == "cancelled", "asked again, it is the same operation"
    first, second = service.run(joined())
    assert first.state == "cancelled"
    assert second.state == "done"
    assert active(head) == {0, 1, 2, 3}


@pytest.mark.slow
def test_experts_move_by_themselves_and_the_head_goes_on_while_it_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread, threads = ExpertRecovery.spread, set[int]()

    def noted(*args: Any, loads: Any = None, **more: Any) -> Placement:
        if loads is not None:
            threads.add(threading.get_ident())
        return spread(*args, loads=loads, **more)

    monkeypatch.setattr(ExpertRecovery, "spread", noted)
    # so small a model's experts take too little of the time for their load to matter
    measured = Measured(choices_per_s=1e4, choice_s=0.0, per_expert=1e3, parallel=3.0)
    monkeypatch.setattr(Balancer, "_measured", lambda self: measured)
    with running(
        cluster__ranks=3,
        cluster__redundant_experts=2,
        cluster__balance="every=1s",
        cluster__stall_timeout=20.0,
        engine__kv_memory="32MiB",
    ) as service:
        head = service.head
        loop = service.run(_thread())
        threads.clear()
        work = requests(24, tokens=80)

        async def balanced() -> int:
            answers = asyncio.ensure_future(answer_all(head, work, CLIENTS))
            await until(lambda: head.cluster().balance.rebalances > 0, 60)
            ended = await answers
            assert [answer.finish for answer in ended] == ["length"] * len(work)
            await until(lambda: head.cluster().epoch > 1 and head.cluster().operation is None, 30)
            return head.cluster().placement.missing_experts

        assert service.run(balanced(), 120) == 0
        assert head.cluster().balance.verdict in ("interval", "balanced", "busy", "rest", "idle")
    assert threads
    assert loop not in threads


async def _thread() -> int:
    return threading.get_ident()


def test_loads_are_told_and_shown(service: Service) -> None:
    head = service.head
    service.run(answer_all(head, requests(8, tokens=80), CLIENTS))

    async def told() -> None:
        await answer_all(head, requests(2, tokens=80), 2)
        await until(lambda: any(map(any, head.proposed_rebalance().expert_loads)), 10)

    service.run(told())
    view = head.proposed_rebalance()
    info = head.info
    assert len(view.expert_loads) == info.moe_layers
    for layer in view.expert_loads:
        assert len(layer) == info.experts
        assert sum(layer) == pytest.approx(1.0, abs=1e-3)
    balance = head.cluster().balance
    assert balance.verdict == "off"
    assert balance.imbalance > 1
    assert set(balance.rank_loads) == {0, 1, 2}
    assert sum(balance.rank_loads.values()) == pytest.approx(3, abs=1e-2)
    assert len(balance.imbalance_by_layer) == info.moe_layers
