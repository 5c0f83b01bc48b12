"""Promises of traces: what is told of a request and of a change, and that they cost no request."""

from __future__ import annotations

import ast
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.collector import Collector, told
from support.fake_head import Behaviour, FakeHead
from support.served_head import Running
from support.waiting import wait_until

from flexpert.cluster.membership import Phase
from flexpert.cluster.operation import Operation
from flexpert.cluster.saved_state import Purpose
from flexpert.config import ClusterConfig, Config, ServerConfig, load_config
from flexpert.errors import ConfigError
from flexpert.server import trace_settings
from flexpert.server.service_process import EXIT_WRONG_SETTINGS, serve
from flexpert.server.trace_settings import check_tracing
from flexpert.server.tracing.otlp_export import OtlpExport
from flexpert.server.tracing.service_tracing import ServiceTracing
from flexpert.server.tracing.span_attributes import OPERATION_SPANS

CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


class Traced:
    """A fake head whose spans stay here. running: served."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.running = Running(ServerConfig(), tracing=self._tracing)

    def _tracing(self, head: FakeHead) -> ServiceTracing:
        self.tracing = ServiceTracing(self.provider, head.model_name, lambda: head.epoch)
        return self.tracing

    def post(self, path: str, body: dict[str, Any], traceparent: str | None = None) -> Any:
        headers = {} if traceparent is None else {"traceparent": traceparent}
        return httpx.post(self.running.url + path, json=body, headers=headers, timeout=20)

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def request(self) -> ReadableSpan:
        """The span of the only request there was, once it is there."""
        wait_until(lambda: any(span.kind is SpanKind.SERVER for span in self.spans()))
        (found,) = [span for span in self.spans() if span.kind is SpanKind.SERVER]
        return found

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """In order of their begin."""
        assert parent.context
        found = [s for s in self.spans() if s.parent and s.parent.span_id == parent.context.span_id]
        return sorted(found, key=lambda span: span.start_time or 0)


@pytest.fixture(scope="module")
def traced_server() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.running.close()


@pytest.fixture
def traced(traced_server: Traced) -> Traced:
    """As new."""

    def fresh() -> None:
        traced_server.running.head.behaviour = Behaviour()
        traced_server.running.head.serving = True

    traced_server.running.call(fresh)
    traced_server.exporter.clear()
    return traced_server


def about(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


# ---- requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_of_its_callers_trace(traced: Traced, stream: bool) -> None:
    body = CHAT | {"temperature": 0.5, "top_p": 0.75, "seed": 3, "stream": stream}
    assert traced.post("/v1/chat/completions", body, TRACEPARENT).status_code == 200
    span = traced.request()
    assert span.context
    assert span.parent
    assert f"{span.context.trace_id:032x}" == CALLER_TRACE
    assert f"{span.parent.span_id:016x}" == CALLER_SPAN
    assert span.name == "chat fake"
    found = about(span)
    prompt = found.pop("gen_ai.usage.input_tokens")
    assert prompt == found.pop("gen_ai.usage.prompt_tokens") > 0
    assert found.pop("gen_ai.request.id").startswith("chatcmpl-")
    assert found.pop("gen_ai.response.id").startswith("chatcmpl-")
    ttft, e2e = (found.pop(f"gen_ai.latency.{n}") for n in ("time_to_first_token", "e2e"))
    assert 0 < ttft <= e2e
    spent = {n: found.pop(f"gen_ai.latency.time_in_{n}") for n in ("queue", "model_prefill")}
    spent["decode"] = found.pop("gen_ai.latency.time_in_model_decode")
    inference = found.pop("gen_ai.latency.time_in_model_inference")
    assert inference == pytest.approx(spent["model_prefill"] + spent["decode"])
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "flexpert",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.75,
        "gen_ai.request.n": 1,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": stream,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.completion_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.num_sequences": 1,
        "flexpert.ranks": (0,),
        "flexpert.epochs": (traced.running.head.epoch,),
        "flexpert.moves": 0,
        "flexpert.ranks_lost": 0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert [one.name for one in traced.below(span)] == ["preprocess", "queue", "prefill", "decode"]
    assert [event.name for event in span.events] == ["first token"]
    assert span.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 3}, "text_completion fake"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 16}, "chat fake"),
        ("/v1/messages", {"model": "fake", **CHAT}, "chat fake"),
    ],
)
def test_every_api_that_answers_is_traced(
    traced: Traced, path: str, body: dict[str, Any], name: str
) -> None:
    answered = traced.post(path, body)
    assert answered.status_code == 200, answered.text
    span = traced.request()
    assert span.name == name
    assert span.parent is None
    assert about(span)["gen_ai.response.id"] == answered.json()["id"]


@pytest.mark.parametrize("value", ["", "00-0-0-01", "hello", f"ff-{CALLER_TRACE}-{CALLER_SPAN}-01"])
def test_a_wrong_traceparent_begins_a_trace(traced: Traced, value: str) -> None:
    assert traced.post("/v1/completions", {"prompt": "x"}, value).status_code == 200
    assert traced.request().parent is None


def test_a_caller_who_does_not_sample_leaves_no_span(traced: Traced) -> None:
    unsampled = TRACEPARENT[:-2] + "00"
    assert traced.post("/v1/completions", {"prompt": "x"}, unsampled).status_code == 200
    assert traced.post("/v1/completions", {"prompt": "x"}, TRACEPARENT).status_code == 200
    traced.request()  # the second is there, and was the only one


def test_each_of_several_choices_has_its_own_stages(traced: Traced) -> None:
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 3}
    assert traced.post("/v1/completions", body).status_code == 200
    span = traced.request()
    found = about(span)
    assert found["gen_ai.usage.num_sequences"] == 4
    assert found["gen_ai.usage.output_tokens"] == 12
    assert found["gen_ai.request.choice.count"] == 2
    assert found["gen_ai.response.finish_reasons"] == ("length",) * 4
    choices = [one for one in traced.below(span) if one.name != "preprocess"]
    assert [one.name for one in choices] == [f"choice {number}" for number in range(4)]
    for choice in choices:
        assert [one.name for one in traced.below(choice)] == ["queue", "prefill", "decode"]
        assert [event.name for event in choice.events] == ["first token"]


def test_a_stream_that_fails_is_an_error_though_its_status_was_sent(traced: Traced) -> None:
    traced.running.head.behaviour = Behaviour(fail_after=2)
    body = {"prompt": "x", "max_tokens": 5, "stream": True}
    assert traced.post("/v1/completions", body).status_code == 200
    span = traced.request()
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "rank 3 is gone"
    assert about(span)["error.type"] == "sequence_failed"


def test_who_is_refused_has_made_no_error_of_ours(traced: Traced) -> None:
    assert traced.post("/v1/completions", {"prompt": "x", "n": 0}).status_code == 400
    span = traced.request()
    assert about(span)["http.response.status_code"] == 400
    assert "gen_ai.usage.input_tokens" not in about(span)
    assert [one.name for one in traced.below(span)] == ["preprocess"]
    assert span.status.status_code is StatusCode.UNSET


def test_a_service_that_does_not_serve_is_an_error(traced: Traced) -> None:
    traced.running.head.serving = False
    assert traced.post("/v1/completions", {"prompt": "x"}).status_code == 503
    span = traced.request()
    assert span.status.status_code is StatusCode.ERROR
    assert about(span)["error.type"] == "503"


def test_a_client_that_goes_away_is_told(traced: Traced) -> None:
    traced.running.head.behaviour = Behaviour(gap_s=0.02)
    body = {"prompt": "x", "max_tokens": 100, "stream": True}
    url = f"{traced.running.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=20) as answered:
        next(answered.iter_lines())
    span = traced.request()
    assert about(span)["flexpert.client_gone"] is True
    assert "gen_ai.response.finish_reasons" not in about(span)
    assert about(span)["gen_ai.usage.output_tokens"] >= 1


def test_what_generates_nothing_is_not_traced(traced: Traced) -> None:
    assert traced.post("/tokenize", {"prompt": "x"}).status_code == 200
    assert httpx.get(f"{traced.running.url}/v1/models").status_code == 200
    assert httpx.get(f"{traced.running.url}/v1/completions").status_code == 405
    assert traced.spans() == []


# ---- changes ------------------------------------------------------------------------------------


def changed(purpose: Purpose, phases: list[str], state: str = "done") -> Operation:
    operation = Operation(frozenset({0, 1}), frozenset({0}), 4, "why", purpose)
    for phase in phases:
        operation.enter(phase)
        time.sleep(0.002)
    operation.end(state, "it broke" if state == "failed" else None)  # type: ignore[arg-type]
    return operation


@pytest.mark.parametrize(
    ("purpose", "name"),
    [
        (Purpose.REQUEST, "scale"),
        (Purpose.RECOVERY, "recovery"),
        (Purpose.REBALANCE, "rebalance"),
        (Purpose.RESTART, "restart"),
        (Purpose.RELOAD, "reload"),
    ],
)
def test_an_operation_has_a_span_with_its_phases(
    traced: Traced, purpose: Purpose, name: str
) -> None:
    operation = changed(purpose, ["spawn", "load", "load", "commit"])
    traced.tracing.operation_over(operation)
    (span,) = [one for one in traced.spans() if one.parent is None]
    assert span.name == name
    found = about(span)
    assert found["flexpert.operation.id"] == operation.id
    assert found["flexpert.ranks.before"] == (0, 1)
    assert found["flexpert.ranks.after"] == (0,)
    assert found["flexpert.operation.reason"] == "why"
    phases = traced.below(span)
    assert [one.name for one in phases] == ["spawn", "load", "commit"]
    assert phases[0].start_time == span.start_time
    assert phases[0].end_time == phases[1].start_time
    assert phases[-1].end_time == span.end_time
    assert span.status.status_code is StatusCode.UNSET


def test_a_failed_operation_is_an_error(traced: Traced) -> None:
    traced.tracing.operation_over(changed(Purpose.REQUEST, ["spawn", "undo"], "failed"))
    (span,) = [one for one in traced.spans() if one.parent is None]
    assert span.status.status_code is StatusCode.ERROR
    assert span.status.description == "it broke"


def test_an_operation_without_a_phase_has_no_span(traced: Traced) -> None:
    traced.tracing.operation_over(changed(Purpose.REQUEST, []))
    assert traced.spans() == []


def test_an_operation_belongs_to_the_trace_of_who_asked_for_it(traced: Traced) -> None:
    answered = traced.post("/cluster/operations", {"ranks": 1}, TRACEPARENT)
    assert answered.status_code == 202
    operation = changed(Purpose.REQUEST, ["spawn"])
    operation.id = answered.json()["id"]
    traced.tracing.operation_over(operation)
    (span,) = [one for one in traced.spans() if one.name == "scale"]
    assert span.parent
    assert f"{span.parent.span_id:016x}" == CALLER_SPAN
    traced.tracing.operation_over(operation)
    assert traced.spans()[-1].parent is None, "it is forgotten when it is over"
    wait_until(lambda: traced.running.head.operation(operation.id).state == "done")


def test_epochs_that_begin_meanwhile_are_events_of_a_request(traced: Traced) -> None:
    traced.running.head.behaviour = Behaviour(gap_s=0.05)
    operation = changed(Purpose.RECOVERY, ["recover", "commit"])
    operation.pause_ms = 12.5
    traced.tracing.epoch_began(2, None)  # before
    with httpx.stream(
        "POST",
        f"{traced.running.url}/v1/completions",
        json={"prompt": "x", "max_tokens": 8, "stream": True},
        timeout=20,
    ) as answered:
        lines = answered.iter_lines()
        next(lines)
        traced.running.call(lambda: traced.tracing.epoch_began(7, operation.view()))
        list(lines)
    span = traced.request()
    traced.tracing.epoch_began(8, None)  # afterwards
    assert about(span)["flexpert.epochs"] == (traced.running.head.epoch, 7)
    assert about(span)["flexpert.operations"] == (operation.id,)
    assert about(span)["flexpert.pause_ms"] == 12.5
    (event,) = [one for one in span.events if one.name == "epoch began"]
    assert dict(event.attributes or {}) == {
        "flexpert.epoch": 7,
        "flexpert.operation.id": operation.id,
        "flexpert.operation.purpose": "recovery",
        "flexpert.pause_ms": 12.5,
    }


def test_the_page_names_every_attribute_and_span() -> None:
    root = Path(__file__).parents[2]
    name = re.compile(r"\b(?:gen_ai|flexpert|http|error)\.[a-z0-9_.]*[a-z]\b")
    sources = [path.read_text() for path in (root / "src/flexpert/server/tracing").glob("*.py")]
    said = {
        found
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in [node.value]
        if name.fullmatch(found) and found != "flexpert.server"
    }
    page = (root / "docs/tracing.md").read_text()
    assert said == set(name.findall(page))
    spans = {"preprocess", "choice N", "queue", "prefill", "decode", "chat MODEL"}
    spans |= {OPERATION_SPANS.get(one.value, one.value) for one in Purpose} | {"waiting"}
    spans |= {phase.value for phase in Phase} - {"idle", "lost"}
    assert spans <= set(re.findall(r"`([^`\n]+)`", page))


# ---- settings, and the way to the collector -----------------------------------------------------


def endpoint(url: str) -> str | None:
    return load_config(
        environment={}, overrides={"server.otlp_traces_endpoint": url}
    ).server.otlp_traces_endpoint


def test_a_collector_without_a_path_gets_that_of_the_protocol() -> None:
    assert endpoint("http://jaeger:4318") == "http://jaeger:4318/v1/traces"
    assert endpoint("https://jaeger/") == "https://jaeger/v1/traces"
    assert endpoint("http://[::1]:4318/otlp/v1/traces") == "http://[::1]:4318/otlp/v1/traces"


@pytest.mark.parametrize(
    "url", ["jaeger:4318", "localhost", "ftp://x", "http://", "http://x:port", "http://x y", ""]
)
def test_a_wrong_url_is_refused_with_a_right_one(url: str) -> None:
    with pytest.raises(ConfigError, match=r"no URL of a collector; write http://localhost:4318"):
        endpoint(url)


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(otlp_traces_endpoint="http://localhost:4318")
    check_tracing(config, {})

    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(trace_settings, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'flexpert\[otel\]'"):
        check_tracing(config, {})
    check_tracing(ServerConfig(), {})


def test_another_protocol_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(server=ServerConfig(port=0, otlp_traces_endpoint="http://localhost:4318"))
    check_tracing(config.server, {"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"})
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc")
    assert serve(config, head=FakeHead) == EXIT_WRONG_SETTINGS
    assert "TRACES_PROTOCOL=grpc: traces are sent by http/protobuf" in capsys.readouterr().err


class Served:
    """`serve` with a fake head in the main thread; it is asked `requests` times, then stopped."""

    def __init__(self, url: str, capture: pytest.CaptureFixture[str], requests: int) -> None:
        self._capture = capture
        self._requests = requests
        self.statuses: list[int] = []
        self.config = Config(
            server=ServerConfig(port=0, otlp_traces_endpoint=url),
            cluster=ClusterConfig(shutdown_timeout=5),
        )

    def run(self) -> int:
        thread = threading.Thread(target=self._ask)
        thread.start()
        code = serve(self.config, head=FakeHead)
        thread.join(10)
        return code

    def _ask(self) -> None:
        output = ""
        try:
            while "ready: " not in output:
                time.sleep(0.01)
                output += self._capture.readouterr().out
            url = output.split("ready: ")[1].split()[0]
            for _ in range(self._requests):
                body = {"prompt": "x", "max_tokens": 3}
                self.statuses.append(httpx.post(f"{url}/completions", json=body).status_code)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_what_has_not_been_sent_is_sent_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    collector = Collector()
    served = Served(collector.url, capsys, requests=2)
    try:
        assert served.run() == 0
    finally:
        collector.close()
    assert served.statuses == [200, 200]
    assert collector.services == {"flexpert"}
    requests = [span for span in collector.spans if span.name == "text_completion fake"]
    assert len(requests) == 2
    assert {told(span)["gen_ai.usage.output_tokens"] for span in requests} == {3}


def test_a_collector_that_is_down_is_told_of_once_and_when_it_is_there_again(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.5")  # one more try, and its reason
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    export = OtlpExport(f"http://user:secret@127.0.0.1:{port}/v1/traces")
    tracer = export.provider.get_tracer("test")

    def said() -> list[str]:
        return [r.getMessage() for r in caplog.records if "traces" in r.getMessage()]

    with caplog.at_level(logging.INFO):
        for _ in range(5):  # a batch each, most likely
            tracer.start_span("lost").end()
            time.sleep(0.1)
        wait_until(said)
        collector = Collector(port)

        def arrives() -> bool:
            tracer.start_span("sent").end()
            return bool(collector.spans)

        wait_until(arrives, interval_s=0.05)
        export.close()
        collector.close()
    down, up = said()
    assert down.startswith(f"traces do not reach http://127.0.0.1:{port}/v1/traces and are dropped")
    assert "refused" in down
    assert up == f"traces reach http://127.0.0.1:{port}/v1/traces again"
    assert "secret" not in caplog.text


def test_a_collector_that_does_not_answer_holds_up_the_end_for_no_longer_than_it_may() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        export = OtlpExport(f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        export.provider.get_tracer("test").start_span("x").end()
        began = time.monotonic()
        export.close(0.3)
        assert 0.3 <= time.monotonic() - began < 2


def test_settings_that_the_sdk_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(ConfigError, match="max_queue_size must be"):
        OtlpExport("http://127.0.0.1:1/v1/traces")


def test_the_service_is_named_by_the_environment_else_after_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def named() -> object:
        export = OtlpExport("http://127.0.0.1:1/v1/traces")
        export.close()
        return export.provider.resource.attributes["service.name"]

    assert named() == "flexpert"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=theirs")
    assert named() == "theirs"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert named() == "mine"
