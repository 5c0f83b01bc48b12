"""What is done to a service in the middle of a load: spelled, checked, done, and reported."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.fake_service import CLUSTER, DONE, OPERATION, FakeService, GoingOn, answering

from flexpert.bench.load import LoadError
from flexpert.bench.timed_events import (
    EventOutcome,
    after_kill,
    check_events,
    kill_rank,
    parse_event,
)
from flexpert.cli.main import main
from flexpert.cluster.views import ClusterEvent, ClusterView, RankView
from flexpert.errors import ConfigError

VIEW = msgspec.convert(CLUSTER, ClusterView, strict=False)


@pytest.mark.parametrize(
    ("text", "at", "body", "killed"),
    [
        ("t=20 scale 4", 20.0, {"ranks": 4}, None),
        ("t=1m  remove 3 1", 60.0, {"add": 0, "remove": [1, 3]}, None),
        ("t=500ms rebalance", 0.5, {"rebalance": True}, None),
        ("t=0 kill 2", 0.0, None, 2),
    ],
)
def test_an_event_is_a_time_and_what_is_done(
    text: str, at: float, body: dict[str, Any] | None, killed: int | None
) -> None:
    event = parse_event(text)
    assert (event.at, event.body, event.killed) == (at, body, killed)


@pytest.mark.parametrize(
    "text",
    [
        *("", "scale 4", "t=20", "t=x scale 4", "t=-1 scale 4", "t=nan scale 1", "t=1 scale"),
        *("t=1 scale 0", "t=1 scale 2 3", "t=1 scale two", "t=1 remove", "t=1 remove 1 x"),
        *("t=1 kill", "t=1 kill 1 2", "t=1 rebalance 3", "t=1 reboot", "20 scale 4"),
    ],
)
def test_what_is_no_event_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--event .*t=20 scale 4"):
        parse_event(text)


def test_an_event_that_cannot_happen_is_refused_before() -> None:
    with pytest.raises(ConfigError, match="room for 4 ranks"):
        check_events([parse_event("t=1 scale 5")], VIEW)
    with pytest.raises(ConfigError, match="ranks run on h; "):
        check_events([parse_event("t=1 kill 0")], VIEW)
    check_events([parse_event("t=1 scale 4"), parse_event("t=1 remove 7")], VIEW)


def test_no_process_is_killed_that_flexpert_has_not_started() -> None:
    rank = RankView(id=0, state="active", host=socket.gethostname(), pid=os.getpid())
    with pytest.raises(LoadError, match="is none that flexpert started here"):
        kill_rank(rank)


def operation(purpose: str, created: float, **more: Any) -> dict[str, Any]:
    return DONE | {"id": purpose, "purpose": purpose, "created": created, **more}


def history(*events: tuple[str, float, dict[str, Any]]) -> list[ClusterEvent]:
    return [ClusterEvent(kind=kind, time=time, data=data) for kind, time, data in events]


KILL = EventOutcome(at_s=5.0, what="kill 1", state="failed", begun_s=5.0)


def test_after_a_kill_stands_what_the_service_did_about_it() -> None:
    """Times of the history are those of the wall clock; the load began at 100."""
    found = after_kill(
        KILL,
        1,
        history(
            ("epoch", 101.0, {"epoch": 2, "ranks": [0, 1], "desired": [0, 1]}),
            ("rank", 105.1, {"id": 1, "state": "gone"}),
            ("epoch", 105.2, {"epoch": 3, "ranks": [0], "desired": [0, 1]}),
            ("operation", 105.3, operation("recovery", 105.1, add=[], remove=[1])),
            ("epoch", 106.5, {"epoch": 4, "ranks": [0, 1], "desired": [0, 1]}),
            ("operation", 106.6, operation("restart", 105.4, add=[1], remove=[])),
            ("operation", 107.0, operation("restart", 106.9, add=[0], remove=[])),
            ("epoch", 108.0, {"epoch": 5, "ranks": [0, 1], "desired": [0, 1]}),
        ),
        wall=100.0,
    )
    assert found.state == "done"
    assert found.detected_s == pytest.approx(5.1)
    assert found.ended_s == pytest.approx(6.5)
    assert [view.purpose for view in found.operations] == ["recovery", "restart"]


def test_a_rank_that_does_not_come_back_is_told() -> None:
    found = after_kill(KILL, 1, history(("rank", 105.1, {"id": 1, "state": "gone"})), wall=100.0)
    assert found.state == "failed"
    assert found.error == "not all ranks were there again"


TOKEN = b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 1}}\n\n'


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    fake.replies |= {
        "POST /tokenize": (200, {"tokens": [*range(40)]}),
        "GET /v1/models": (200, {"data": [{"id": "tiny", "max_model_len": 700}]}),
        "POST /v1/completions": (200, TOKEN + USAGE + b"data: [DONE]\n\n"),
        "GET /cluster": [(200, CLUSTER), (200, CLUSTER), (200, CLUSTER | {"cursor": 1})],
        "GET /cluster/events?since=0": (
            200,
            GoingOn([b'id: 1\ndata: {"kind": "epoch", "time": 1, "data": {}, "number": 1}\n\n']),
        ),
        "POST /cluster/operations": (202, OPERATION),
        "GET /cluster/operations/op-1": (200, DONE),
    }
    with answering(fake):
        yield fake


def bench(monkeypatch: pytest.MonkeyPatch, service: FakeService, *arguments: str) -> int:
    command = ["flexpert", "bench", "serve", "--url", service.url, "--warmup", "0", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def asked(service: FakeService) -> list[Any]:
    return [body for what, body, _ in service.requests if what == "POST /v1/completions"]


def test_events_happen_under_the_load_and_are_in_the_report(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "report.json"
    status = bench(
        *(monkeypatch, service, "--ramp", "linear:20:60", "--num-prompts", "20"),
        *("--goodput", "ttft:60000", "e2el:60000", "--event", "t=100ms scale 3"),
        *("--event", "t=90 remove 1", "--output", str(output)),
    )
    assert status == 1  # the second event is not reached
    report = json.loads(output.read_text())
    done, never = report["events"]
    assert (done["state"], never["state"]) == ("done", "not reached")
    assert done["operations"][0]["phases"] == DONE["phases"]
    assert 0.1 <= done["begun_s"] <= done["ended_s"]
    assert ("POST /cluster/operations", {"ranks": 3}, None) in service.requests
    assert report["service"]["goodput"]["requests"] == 20
    assert sum(point["tokens_per_s"] for point in report["timeline"]) > 0
    printed = capsys.readouterr().out
    assert "1 scale 3, 2 remove 1" in printed
    assert "commit 0.010 s; pause 4.2 ms" in printed
    assert "100.0% kept to ttft:60000 e2el:60000" in printed


def test_a_trace_asks_for_its_lengths_and_leaves_out_what_is_too_long(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("Timestamp,Request tokens,Response tokens\n1,5,3\n2,690,30\n3,6,4\n")
    assert bench(monkeypatch, service, "--trace", str(trace), "--trace-speedup", "20") == 0
    bodies = sorted(asked(service), key=lambda body: len(body["prompt"]))
    assert [(len(b["prompt"]), b["max_tokens"]) for b in bodies] == [(5, 3), (6, 4)]
    assert "1 left out, 20 times as fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--event", "t=1 scale 9"], "room for 4 ranks"),
        (["--event", "t=1 jump"], "--event 't=1 jump'|--event t=1 jump"),
        (["--goodput", "speed:3"], "--goodput speed:3: one of"),
        (["--goodput", ""], "--goodput names no goal"),
        (["--ramp", "up:1:2"], "--ramp up:1:2: write"),
        (["--ramp", "linear:1:2", "--request-rate", "3"], "--request-rate and --ramp"),
        (["--burstiness", "2"], "--burstiness is of arrivals"),
        (["--trace", "/nowhere"], "cannot read the trace"),
        (["--trace-speedup", "2"], "--trace-speedup is of a --trace"),
        (["--against", "x", "--event", "t=1 scale 2"], "--against goes with no --event"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_asked(
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    arguments: list[str],
    says: str,
) -> None:
    assert bench(monkeypatch, service, *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert not asked(service)
    assert not [what for what, _, _ in service.requests if what == "POST /cluster/operations"]
