"""What `/metrics` shows: under our names and vLLM's, to dashboards, alerts and tools of others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.served import Served, served
from support.waiting import wait_until

from flexpert.cluster.kept_counters import continued, kept
from flexpert.cluster.request_times import RequestTimes, spans
from flexpert.cluster.slow_ranks import WINDOW_S, SlowRanks, WaitedFor
from flexpert.server.http_metrics import GAP_S, ServerMetrics
from flexpert.server.metrics_text import MetricsText
from flexpert.server.vllm_metrics import VLLM_NAMES, named

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "examples" / "monitoring"
PAGE = ROOT / "docs" / "metrics.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
NAME = re.compile(r"\b(?:flexpert_\w+|vllm:\w+|process_\w+)")


def counted(value: int = 3) -> CollectorRegistry:
    registry = CollectorRegistry()
    ends = Counter("flexpert_sequences", "ends", ["outcome"], registry=registry)
    ends.labels("cancelled").inc(value)
    Histogram("flexpert_request_queue_seconds", "q", registry=registry, buckets=(1, 2)).observe(1.5)
    Counter("flexpert_moved_experts", "only ours", registry=registry)
    return registry


def shown(families: Iterator[Metric]) -> dict[str, float]:
    """Series as they are written → value."""
    return {
        s.name + json.dumps(dict(sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
        if not s.name.endswith("_created")
    }


def test_gaps_are_shown_as_prometheus_client_shows_a_histogram() -> None:
    ours, theirs = ServerMetrics(), CollectorRegistry()
    text = "Between two tokens of a sequence"
    known = Histogram("flexpert_inter_token_seconds", text, registry=theirs, buckets=GAP_S)
    ours.first_token(1.0)
    for gap_s, count in ((2**-12, 1), (0.5, 1), (0.5, 4), (5.0, 1), (8.0, 1), (0.375, 3)):
        ours.next_tokens(gap_s, count)
        for _ in range(count):
            known.observe(gap_s / count)
    shown = MetricsText().of(one for one in ours.registry.collect() if "inter_token" in one.name)
    when = rb"(?<=_created )\S+"  # each was made at its own time
    assert re.sub(when, b"", shown) == re.sub(when, b"", generate_latest(theirs))
    assert len(ours.take_window().gaps_s) == 11


def test_vllms_names_show_the_same_figures_with_its_labels() -> None:
    both = shown(named(counted().collect(), "m", "both"))
    end = '{"engine": "0", "finished_reason": "abort", "model_name": "m"}'
    assert both[f"vllm:request_success_total{end}"] == 3
    assert both['flexpert_sequences_total{"outcome": "cancelled"}'] == 3
    bucket = '_bucket{"engine": "0", "le": "2.0", "model_name": "m"}'
    assert both[f"vllm:request_queue_time_seconds{bucket}"] == 1


@pytest.mark.parametrize("names", ["flexpert", "vllm", "both"])
def test_names_are_those_that_were_asked_for(names: str) -> None:
    found = {s.partition("{")[0] for s in shown(named(counted().collect(), "m", names))}
    assert ("flexpert_sequences_total" in found) == (names != "vllm")
    assert ("vllm:request_success_total" in found) == (names != "flexpert")
    assert "flexpert_moved_experts_total" in found  # vLLM has nothing like it


def test_it_is_written_as_the_client_library_writes_it() -> None:
    registry = counted()
    Info("flexpert_build", "with a \\ and\na line", registry=registry).info(
        {"b": "x", "a": 'a"\n\\'}
    )
    large = Gauge("flexpert_large", "", ["of"], registry=registry)
    values = (0, 3, -1, 0.1, 1e-7, 999_999, 1e6, 1234567.5, 1e15, 1e17, -1e7, inf, -inf, nan)
    for number, value in enumerate(values):
        large.labels(str(number)).set(value)
    text = MetricsText()
    assert text.of(registry.collect()) == generate_latest(registry)
    registry._names_to_collectors["flexpert_sequences"].labels("cancelled").inc()
    again = text.of(registry.collect())
    assert again == generate_latest(registry)
    assert b'flexpert_sequences_total{outcome="cancelled"} 4.0\n' in again


def test_counters_of_the_head_before_go_on() -> None:
    before = kept(counted(value=5).collect())
    registry = CollectorRegistry()
    ends = Counter("flexpert_sequences", "ends", ["outcome"], registry=registry)
    ends.labels("cancelled").inc(2)
    ends.labels("stop").inc()
    Histogram("flexpert_request_queue_seconds", "q", registry=registry, buckets=(1, 2)).observe(0.5)
    after = shown(continued(registry.collect(), before))
    assert after['flexpert_sequences_total{"outcome": "cancelled"}'] == 7
    assert after['flexpert_sequences_total{"outcome": "stop"}'] == 1
    assert after['flexpert_request_queue_seconds_bucket{"le": "1.0"}'] == 1
    assert after['flexpert_request_queue_seconds_bucket{"le": "2.0"}'] == 2
    assert after["flexpert_request_queue_seconds_sum{}"] == 2.0


def test_the_spans_of_a_request_add_up_to_its_latency() -> None:
    times = RequestTimes(opened=10.0, assigned=10.5)
    times.begun(13.0, waited=1.0)
    found = spans(times, 15.0)
    assert (found.queue, found.prefill, found.decode, found.total) == (1.5, 1.5, 2.0, 5.0)
    times.waited = 9.0  # a clock that runs fast on another host
    assert spans(times, 15.0).total == 5.0


def looked(waits: dict[int, dict[int, float]], running: dict[int, int]) -> list[tuple[int, bool]]:
    """What is said of ranks that wait for each other so many seconds of each, three times."""
    ranks, found = SlowRanks(), []
    for look in range(4):
        seen = {
            rank: WaitedFor(f"i{rank}", {p: look * s for p, s in of.items()}, running[rank])
            for rank, of in waits.items()
        }
        found += [(one.rank, one.slow) for one in ranks.look(look * WINDOW_S, seen)]
    return found


def test_a_rank_that_holds_the_others_up_is_named_once() -> None:
    waits = {0: {1: 3.0, 2: 0.1}, 1: {0: 0.1, 2: 0.1}, 2: {0: 0.1, 1: 3.0}}
    assert looked(waits, dict.fromkeys(range(3), 4)) == [(1, True)]


def test_a_rank_that_is_waited_for_because_it_has_more_to_do_is_not_slow() -> None:
    waits = {0: {1: 3.0, 2: 0.1}, 1: {0: 0.1, 2: 0.1}, 2: {0: 0.1, 1: 3.0}}
    assert looked(waits, {0: 4, 1: 9, 2: 4}) == []


def test_ranks_that_all_wait_alike_are_not_slow() -> None:
    waits = {rank: {peer: 3.0 for peer in range(3) if peer != rank} for rank in range(3)}
    assert looked(waits, dict.fromkeys(range(3), 4)) == []


# ---- a service ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    """It has answered requests, changed, and lost a rank."""
    with served() as service:
        body = {"prompt": "In the beginning", "max_tokens": 8, "temperature": 0}
        for _ in range(3):
            assert service.http("POST", "/v1/completions", body).status_code == 200
        stopped = {"prompt": [20, 30], "max_tokens": 64, "temperature": 0, "stop": ["e", "a"]}
        assert service.http("POST", "/v1/completions", stopped).status_code == 200
        assert service.scale(3)["state"] == "done"
        os.kill(service.ranks()[1], signal.SIGKILL)
        wait_until(lambda: series(service).get("flexpert_recovery_seconds_count{}"), 90)
        yield service


def text(service: Served) -> str:
    return service.http("GET", "/metrics").text


def series(service: Served) -> dict[str, float]:
    return shown(text_string_to_metric_families(text(service)))


def names_of(service: Served) -> set[str]:
    return {name.partition("{")[0] for name in series(service)}


@pytest.mark.slow
def test_every_series_that_dashboard_and_alerts_ask_for_is_there(service: Served) -> None:
    board = json.loads((MONITORING / "grafana.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    asked = [t["expr"] for panel in board["panels"] for t in panel.get("targets", ())]
    asked += [one["expr"] for one in board["annotations"]["list"]]
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    wanted = {name for expression in asked for name in NAME.findall(expression)}
    assert len(wanted) > 30
    assert wanted - names_of(service) == set()


@pytest.mark.slow
def test_what_happened_is_counted(service: Served) -> None:
    found = series(service)
    assert found['flexpert_sequences_total{"outcome": "length"}'] == 3
    assert found['flexpert_sequences_total{"outcome": "stop"}'] == 1  # a stop text is no abort
    assert found["flexpert_request_latency_seconds_count{}"] == 4
    assert found["flexpert_prefix_cache_queries_total{}"] > 0
    assert found['flexpert_faults_total{"kind": "killed"}'] == 1
    assert found["flexpert_fault_detection_seconds_count{}"] == 1
    assert found['flexpert_operations_total{"state": "done"}'] >= 3  # the first, a scale, a loss
    assert found['flexpert_rank_exchanges_total{"rank": "0"}'] > 0
    assert any(name.startswith("flexpert_rank_peer_wait_seconds_total") for name in found)
    for latency in ("queue", "prefill", "decode"):
        assert found[f"flexpert_request_{latency}_seconds_count{{}}"] == 4


@pytest.mark.slow
def test_vllmstat_reads_it(service: Served) -> None:
    """As `vllmstat --once --json --url` does, while a request runs."""
    body = {"prompt": [20, 30], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    command = (sys.executable, "-m", "vllmstat", "--once", "--json", "--no-gpu")
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60):
        wait_until(lambda: series(service)["flexpert_requests_running{}"], 20)
        ran = subprocess.run(
            [*command, "--url", service.url], capture_output=True, text=True, timeout=60, check=True
        )
    told = json.loads(ran.stdout)
    assert told["model_names"] == ["tiny"]
    assert (told["running"], told["waiting"], told["engine_count"]) == (1, 0, 1)
    assert told["kv_usage"] > 0
    assert told["kv_capacity_tokens"] == 3 * 1024 * 16  # of all ranks
    for latency in ("ttft", "tpot", "e2e", "queue", "prefill", "decode"):
        assert told[latency]["p50"] > 0, latency
    assert told["finish_reasons"]["length"] > 0


# ---- the page -------------------------------------------------------------------------------


def table(written: str) -> str:
    """Every family that a service shows; written: what `/metrics` says."""
    theirs: dict[str, list[str]] = {}
    for name in VLLM_NAMES:
        theirs.setdefault("flexpert_" + name.ours, []).append(f"`vllm:{name.vllm}`")
    rows = ["| name | type | what it says | vLLM's name |\n|---|---|---|---|\n"]
    for family in sorted(text_string_to_metric_families(written), key=lambda one: one.name):
        if not family.name.startswith("flexpert_") or family.name.endswith("_created"):
            continue
        cells = (
            f"`{family.name}`",
            family.type,
            family.documentation,
            ", ".join(theirs.get(family.name, ())),
        )
        rows.append("| " + " | ".join(cells) + " |\n")
    return BEGIN + "".join(rows).replace("|  |", "| |") + END


@pytest.mark.slow
def test_the_page_has_every_family(service: Served) -> None:
    missing = set(table(text(service)).splitlines()) - set(PAGE.read_text().splitlines())
    assert missing == set(), "PYTHONPATH=tests python tests/server/test_metrics.py writes it"


@pytest.mark.slow
def test_every_name_of_vllm_shows_something(service: Served) -> None:
    found = {name.removesuffix("_total").removesuffix("_count") for name in names_of(service)}
    assert {f"vllm:{name.vllm}" for name in VLLM_NAMES} - found == set()


if __name__ == "__main__":
    with served() as one:
        one.answer()
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + table(text(one)) + rest.partition(END)[2])
