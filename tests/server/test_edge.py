"""Promises to and about clients that are slow, greedy, or do not speak HTTP well."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from support.fake_head import Behaviour
from support.raw import (
    Answer,
    answers,
    ask,
    completion,
    connection,
    read_all,
    request,
    seconds_until_closed,
)
from support.served_head import Running

from flexpert.config import ServerConfig
from flexpert.server import protocol
from flexpert.server.protocol import most_connections

LIMITS = ServerConfig(
    header_timeout=0.3,
    body_timeout=0.4,
    write_timeout=0.4,
    max_header_bytes=4096,
    max_body=2**20,
    max_requests_per_key=2,
    max_connections=6,
)
CLOSE = {"connection": "close"}


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    running = Running(LIMITS, send_buffer=2**13)
    yield running
    running.close()


@pytest.fixture
def strict(shared: Running) -> Iterator[Running]:
    """With small limits; nothing of a test is left in it."""
    shared.call(lambda: setattr(shared.head, "behaviour", Behaviour()))
    shared.call(shared.head.cancelled.clear)
    yield shared
    shared.until(lambda: not shared.head.running)
    assert ask(shared.url, completion(max_tokens=1, stream=False) + request("GET", "/x", **CLOSE))


def one(found: list[Answer]) -> Answer:
    assert len(found) == 1
    assert found[0].headers["connection"] == "close"
    return found[0]


# ---- requests that do not come ------------------------------------------------------------------


def test_headers_that_do_not_come_are_408(strict: Running) -> None:
    answer = one(ask(strict.url, b"GET /health HTTP/1.1\r\nhost: x\r\n"))
    assert answer.status == 408
    counted = httpx.get(f"{strict.url}/metrics").text
    assert 'http_requests_total{method="",path="unmatched",status="408"}' in counted
    assert "header_timeout" in answer.error["message"]


def test_headers_that_trickle_are_408(strict: Running) -> None:
    with connection(strict.url) as raw:
        over = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                raw.sendall(b"GET /health HTTP/1.1\r\nx: ")
                while not over.wait(0.02):
                    raw.sendall(b"y")

        thread = threading.Thread(target=trickle)
        thread.start()
        found = answers(read_all(raw))
        over.set()
        thread.join()
    assert one(found).status == 408


def test_the_time_for_headers_begins_anew_with_each_request(strict: Running) -> None:
    with connection(strict.url) as raw:
        raw.sendall(request("GET", "/health") + b"GET /health HT")
        first, second = answers(read_all(raw))
    assert (first.status, second.status) == (200, 408)


def test_who_says_nothing_is_let_go_without_an_answer(strict: Running) -> None:
    with connection(strict.url) as raw:
        assert read_all(raw) == b""
    with connection(strict.url) as raw:  # line ends before a request are no request
        raw.sendall(b"\r\n\r\n")
        assert seconds_until_closed(raw) < 5


@pytest.mark.parametrize("how", ["length", "chunked"])
def test_a_body_that_does_not_come_is_408(strict: Running, how: str) -> None:
    if how == "length":
        start = request("POST", "/v1/completions", content_length="100") + b"{"
    else:
        start = request("POST", "/v1/completions", transfer_encoding="chunked") + b"1\r\n{\r\n"
    answer = one(ask(strict.url, start))
    assert answer.status == 408
    assert "body_timeout" in answer.error["message"]


def test_a_body_that_nobody_wants_does_not_hold_the_connection(
    strict: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    for path in ("/health", "/cluster", "/no-such-path"):
        with connection(strict.url) as raw:
            raw.sendall(request("GET", path, content_length="1000") + b"x")
            assert seconds_until_closed(raw) < 5


def test_a_stream_is_refused_whose_request_is_broken(
    strict: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = request("GET", "/cluster/events", transfer_encoding="chunked")
    assert one(ask(strict.url, head + b"zz\r\n")).status == 400
    assert not caplog.records


def test_a_stream_ends_whose_request_has_a_body_without_end(
    strict: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "LINGER_S", 0.2)
    with connection(strict.url) as raw:
        raw.sendall(request("GET", "/cluster/events", content_length="1000") + b"x")
        assert seconds_until_closed(raw) < 5
    strict.until(lambda: strict.head.listening == 0)
    assert not caplog.records


# ---- requests that are too large ----------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        request("GET", "/health", x="y" * 5000),
        request("GET", "/" + "x" * 5000),
        request("GET", "/health?" + "x" * 5000),
        b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
        b"GET /health HTTP/1.1\r\nx: " + b"y" * 5000,  # and the line does not end
        b"GET /" + b"x" * 5000,
        request("POST", "/v1/completions", transfer_encoding="chunked")
        + b"1\r\n{\r\n0\r\nx: "
        + b"y" * 10**6,
        request("POST", "/v1/completions", transfer_encoding="chunked") + b"1;x=" + b"y" * 10**6,
    ],
)
def test_headers_that_are_too_large_are_431(strict: Running, start: bytes) -> None:
    answer = one(ask(strict.url, start))
    assert (answer.status, answer.error["code"]) == (431, "headers_too_large")


def test_headers_within_the_limit_are_taken(strict: Running) -> None:
    answer = one(ask(strict.url, request("GET", "/health", x="y" * 4000, **CLOSE)))
    assert answer.status == 200


@pytest.mark.parametrize("how", ["length", "chunked", "unauthorised"])
def test_the_answer_to_a_refused_body_can_be_read_after_all_was_sent(
    server: Running, closed_server: Running, how: str
) -> None:
    size = 30 * 2**20
    body = b"x" * size
    if how == "chunked":
        head = request("POST", "/v1/completions", transfer_encoding="chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    else:
        head = request("POST", "/v1/completions", content_length=str(size))
    url = (closed_server if how == "unauthorised" else server).url
    answer = one(ask(url, head + body))
    status = {"length": 413, "chunked": 413, "unauthorised": 401}[how]
    assert answer.status == status
    assert "content-length" in answer.headers


def test_who_sends_without_end_after_a_refusal_is_cut_off(
    strict: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "LINGER_BYTES", 2**21)
    head = request("POST", "/v1/completions", content_length=str(2**40))
    with connection(strict.url) as raw:
        raw.sendall(head)
        with pytest.raises(ConnectionError):
            raw.sendall(b"x" * 2**26)


def test_a_refused_body_is_not_asked_for(strict: Running) -> None:
    head = request("POST", "/v1/completions", content_length=str(2**30), expect="100-continue")
    with connection(strict.url) as raw:
        raw.sendall(head)
        received = read_all(raw)
    assert b"100 Continue" not in received
    assert one(answers(received)).status == 413


def test_a_body_that_is_asked_for_is_taken(strict: Running) -> None:
    head, _, body = completion(max_tokens=1).partition(b"\r\n\r\n")
    with connection(strict.url) as raw:
        raw.sendall(head + b"\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 100 Continue")
        raw.sendall(body)
        assert one(answers(read_all(raw))).status == 200


# ---- too many -----------------------------------------------------------------------------------


def test_requests_at_once_are_limited_for_each_key(strict: Running) -> None:
    strict.head.behaviour.gap_s = 30
    with contextlib.ExitStack() as opened:
        for _ in range(2):
            raw = opened.enter_context(connection(strict.url))
            raw.sendall(completion(max_tokens=5))
        strict.until(lambda: len(strict.head.running) == 2)
        refused = httpx.post(f"{strict.url}/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
        assert refused.headers["retry-after"] == "1"
        body = b"x" * 10**7  # more than both ends keep; it is refused unread
        assert one(ask(strict.url, request("POST", "/v1/completions", body))).status == 429
        # those who watch and scale are not kept out by it
        assert httpx.get(f"{strict.url}/health").status_code == 200
        assert httpx.get(f"{strict.url}/cluster").status_code == 200
    strict.until(lambda: not strict.head.running)
    strict.head.behaviour.gap_s = 0
    assert httpx.post(f"{strict.url}/v1/completions", json={"prompt": "x"}).status_code == 200


def test_connections_beyond_the_limit_are_refused(strict: Running) -> None:
    with contextlib.ExitStack() as opened:
        for _ in range(6):
            opened.enter_context(connection(strict.url))
        answer = one(ask(strict.url, b""))
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
    strict.until(lambda: len(strict.connections) == 0)


def test_connections_leave_files_for_the_service_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for files, connections in ((64, 16), (1024, 768), (2**20, 2**20 - 256)):
        monkeypatch.setattr("resource.getrlimit", lambda what, n=files: (n, n))
        assert most_connections(ServerConfig()) == connections
    assert most_connections(ServerConfig(max_connections=3)) == 3


# ---- answers that are not read ------------------------------------------------------------------


@pytest.fixture
def long_answers(strict: Running) -> Iterator[Running]:
    """As long as desired, in pieces of 10 kB."""
    info = strict.head.info
    strict.head.info = replace(info, max_model_len=10**9)
    letter = strict.head.tokenizer.convert_tokens_to_ids("a")
    strict.head.behaviour = Behaviour(per_delta=10_000, answer=[letter])
    strict.call(strict.app.state.preprocessors.restart)  # they know the context
    yield strict
    strict.head.info = info
    strict.call(strict.app.state.preprocessors.restart)


def test_who_does_not_read_a_stream_loses_the_connection(long_answers: Running) -> None:
    with connection(long_answers.url, receive_buffer=4096) as raw:
        raw.sendall(completion(max_tokens=10**8, stream=True))
        long_answers.until(lambda: len(long_answers.head.running) == 1)
        long_answers.until(lambda: not long_answers.connections, 20)
        long_answers.until(lambda: len(long_answers.head.cancelled) == 1)


def test_who_does_not_read_a_whole_answer_loses_the_connection(long_answers: Running) -> None:
    with connection(long_answers.url, receive_buffer=4096) as raw:
        raw.sendall(completion(max_tokens=10**6))
        long_answers.until(lambda: len(long_answers.head.running) == 1)
        long_answers.until(lambda: not long_answers.connections, 20)


def test_who_does_not_read_the_end_of_an_answer_loses_the_connection(strict: Running) -> None:
    """After the last write, when nobody waits to write more."""
    with connection(strict.url, receive_buffer=4096) as raw:
        raw.sendall(request("GET", "/openapi.json", **CLOSE))
        strict.until(lambda: len(strict.connections) == 1)
        strict.until(lambda: not strict.connections)
        whole = len(httpx.get(f"{strict.url}/openapi.json").content)
        assert len(read_all(raw)) < whole  # the rest was given up


def test_a_slow_reader_keeps_its_connection(
    long_answers: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes longer than the limit, but never stands still for so long."""
    caplog.set_level(logging.INFO)  # why a connection was ended
    with connection(long_answers.url, receive_buffer=2**16) as raw:
        raw.sendall(completion(max_tokens=10**8, stream=True))
        for _ in range(5):
            threading.Event().wait(0.1)  # the reader's slowness; nothing is waited for
            received = 0
            while received < 2**18:  # more than both ends keep: the service must have written
                part = raw.recv(2**18)
                assert part, "the service has ended the connection"
                received += len(part)
        assert len(long_answers.connections) == 1


# ---- one request behind another -----------------------------------------------------------------


def test_requests_sent_ahead_are_answered_in_order(strict: Running) -> None:
    ahead = [completion(max_tokens=3), request("GET", "/health"), request("GET", "/x", **CLOSE)]
    assert [a.status for a in ask(strict.url, b"".join(ahead))] == [200, 200, 404]


def test_a_client_that_leaves_frees_its_sequence_whatever_it_sent_ahead(strict: Running) -> None:
    strict.head.behaviour.gap_s = 0.01
    with connection(strict.url) as raw:
        raw.sendall(completion(max_tokens=120, stream=True) + request("GET", "/health"))
        assert raw.recv(10)
    strict.until(lambda: len(strict.head.cancelled) == 1 and not strict.head.running, 1)


def test_too_many_requests_ahead_end_the_connection(strict: Running) -> None:
    found = ask(strict.url, request("GET", "/health") * 100)
    assert found[0].status == 200
    assert len(found) < 20


def test_what_is_no_http_behind_a_request_does_not_spoil_its_answer(strict: Running) -> None:
    strict.head.behaviour.gap_s = 0.01
    (answer,) = ask(strict.url, completion(max_tokens=20, stream=True) + b"\0garbage\r\n\r\n")
    assert answer.status == 200
    assert answer.body.endswith(b"data: [DONE]\n\n")


def test_another_protocol_is_not_spoken_and_the_request_is_answered(strict: Running) -> None:
    head = request("GET", "/health", connection="Upgrade", upgrade="websocket")
    assert one(ask(strict.url, head + b"more")).status == 200


@pytest.mark.parametrize("late", [False, True])
def test_who_offers_another_protocol_with_a_body_is_answered_as_usual(
    strict: Running, late: bool
) -> None:
    """As curl --http2 and Java's HttpClient do with their first request."""
    body = b'{"prompt": "x", "max_tokens": 2}'
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2_settings": "AAMAAA"}
    whole = request("POST", "/v1/completions", body, content_type="application/json", **offer)
    with connection(strict.url) as raw:
        at = len(whole) - len(body) if late else len(whole)
        raw.sendall(whole[:at])
        if late:
            strict.until(lambda: any(one.cycle for one in strict.connections))
            raw.sendall(whole[at:])
        raw.sendall(request("GET", "/health", connection="close"))
        found = answers(read_all(raw))
    assert [answer.status for answer in found] == [200, 200]
    assert json.loads(found[0].body)["usage"]["completion_tokens"] == 2


def test_a_change_of_ranks_takes_few_bytes(strict: Running) -> None:
    """It is parsed on the event loop."""
    body = b'{"a": [' + b"[]," * 30_000 + b"[]]}"
    refused = httpx.post(f"{strict.url}/cluster/operations", content=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
    most = json.dumps({"remove": list(range(4096))})
    headers = {"content-type": "application/json"}
    taken = httpx.post(f"{strict.url}/cluster/operations", content=most, headers=headers)
    assert taken.status_code < 413


def test_a_service_ends_though_connections_linger() -> None:
    running = Running(ServerConfig(max_body=1024))
    with connection(running.url) as raw:
        raw.sendall(request("POST", "/v1/completions", content_length="5000") + b"x")
        assert b" 413 " in raw.recv(1000)
        running.close()
        raw.shutdown(socket.SHUT_WR)
