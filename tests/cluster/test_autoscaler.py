"""Goals in words, latencies from histograms, and a service that is scaled by what clients get."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client import Histogram as Counted
from support.served import served
from support.waiting import wait_until

from flexpert.cluster.autoscale_policy import Goals
from flexpert.cluster.autoscaler import (
    ENDED,
    Autoscaler,
    Histogram,
    Increase,
    load_policy,
    parse_goals,
)
from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.views import ClusterView, PlacementView, RankView
from flexpert.errors import ConfigError
from flexpert.server.autoscaling import AutoscaleTask
from flexpert.server.http_metrics import ServerMetrics


def test_goals_are_read_from_words() -> None:
    said = "min=2, max=6, ttft_p99=500ms, itl_p99=0.05, kv=0.9, settle=1m, every=1s"
    assert parse_goals(said, 8) == Goals(
        min=2, max=6, ttft_p99_s=0.5, itl_p99_s=0.05, kv=0.9, settle_s=60, every_s=1
    )
    assert parse_goals("", 8) == Goals(max=8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mx=3", "'mx=3' is none of min, max"),
        ("max", "write min=1,max=8"),
        ("max=9", "exceeds the capacity of 8"),
        ("min=5,max=3", "1 ≤ min ≤ max"),
        ("min=0", "1 ≤ min ≤ max"),
        ("ttft_p99=fast", "no duration"),
        ("kv=2", "between 0 and 1"),
        ("max=-1", "no number of ranks"),
        ("ttft_p99=nan", "no duration"),
    ],
)
def test_wrong_goals_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_goals(text, 8)


def test_a_policy_is_a_function_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from flexpert.cluster.autoscale_policy import Decision\n\n\n"
        "def always(goals, samples, attempts):\n"
        "    return Decision(ranks=goals.max, why='as many as there may be')\n"
    )
    step = Autoscaler(Goals(max=3), load_policy(f"{file}:always")).look(view(1), [], 0.0)
    assert (step.begin, step.decision.why) == (3, "as many as there may be")
    with pytest.raises(ConfigError, match="no function decide in it"):
        load_policy(str(file))
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        load_policy(str(tmp_path / "none.py"))
    file.write_text("def decide(:\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        load_policy(str(file))


def test_the_p99_is_that_of_the_latest_interval() -> None:
    registry = CollectorRegistry()
    counted = Counted("waited", "", registry=registry, buckets=(0.1, 0.2, 0.4))
    seen = Histogram("waited")
    assert seen.p99(registry.collect()) is None
    for _ in range(100):
        counted.observe(0.15)
    assert seen.p99(registry.collect()) == pytest.approx(0.199)
    assert seen.p99(registry.collect()) is None
    counted.observe(0.3)
    assert seen.p99(registry.collect()) == pytest.approx(0.398)
    counted.observe(9.0)
    assert seen.p99(registry.collect()) == 0.4, "more than that is not known"
    fresh = CollectorRegistry()
    Counted("waited", "", registry=fresh, buckets=(0.1, 0.2, 0.4)).observe(0.05)
    assert seen.p99(fresh.collect()) == pytest.approx(0.099), "another process counts from 0"


def test_what_has_ended_is_counted_from_look_to_look() -> None:
    registry = CollectorRegistry()
    counted = Counter(ENDED, "", ["outcome"], registry=registry)
    seen = Increase(ENDED)
    counted.labels("stop").inc(5)
    assert seen.of(registry.collect()) is None, "it may have been long ago"
    counted.labels("stop").inc(2)
    counted.labels("failed").inc()
    assert seen.of(registry.collect()) == 3
    assert seen.of(registry.collect()) == 0
    assert seen.of(CollectorRegistry().collect()) is None, "another process counts from 0"


def view(ranks: int, **more: Any) -> ClusterView:
    return ClusterView(
        epoch=1,
        model="tiny",
        max_ranks=8,
        ranks=[RankView(id=n, state="active", host="h", pid=1, running=40) for n in range(ranks)],
        placement=PlacementView(layers=1, experts=1, replicas=1, experts_per_rank={}),
        operation=None,
        **more,
    )


def test_one_change_at_a_time_and_none_while_the_service_is_down() -> None:
    scaler = Autoscaler(Goals(min=2, max=3))
    assert scaler.look(view(1, down="all are lost"), [], 0.0).begin is None
    assert scaler.look(view(1), [], 1.0).begin == 2
    scaler.asked("op-1", 2, 1.0)
    assert scaler.look(view(1), [], 2.0).begin is None
    scaler.ended(4.0, done=False)
    assert scaler.look(view(1), [], 5.0).begin is None, "it has just failed"
    assert scaler.look(view(1), [], 30.0).begin == 2


@pytest.mark.slow
def test_a_service_grows_under_load_and_shrinks_when_it_is_over() -> None:
    goals = "min=1,max=2,ttft_p99=50ms,settle=2s,every=0.2s"
    with served("--ranks", "1", "--max-running", "2", "--autoscale", goals) as service:
        over = threading.Event()
        refused: list[int] = []

        def ask() -> None:
            body = {"prompt": "In the beginning", "max_tokens": 40, "ignore_eos": True}
            while not over.is_set():
                answer = service.http("POST", "/v1/completions", body)
                if answer.status_code != 200:
                    refused.append(answer.status_code)

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: len(service.ranks()) == 2, 60, 0.1)
        finally:
            over.set()
            for client in clients:
                client.join()
        assert refused == []
        wait_until(lambda: len(service.ranks()) == 1, 60, 0.1)
        assert "flexpert_autoscale_target_ranks 1.0" in service.http("GET", "/metrics").text
        assert service.stop() == 0
        said = service.log.read_text()
    assert "autoscaler: 1 → 2 ranks: " in said
    assert "would have done for 2 s" in said


def test_it_ends_when_another_head_has_the_service() -> None:
    class HandedOver:
        registry = CollectorRegistry()

        def cluster(self) -> ClusterView:
            raise ServiceHandedOver

    scaler = Autoscaler(Goals(max=2, every_s=0.01))
    head: Any = HandedOver()
    asyncio.run(
        asyncio.wait_for(AutoscaleTask(head, ServerMetrics(), scaler, dry_run=False).run(), 10)
    )


def test_wrong_goals_are_told_before_anything_starts() -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "flexpert", "serve", "--autoscale", "max=20", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "exceeds the capacity of 8" in done.stderr
