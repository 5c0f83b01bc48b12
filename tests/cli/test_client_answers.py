"""Whatever answers at the address of a service, the command line says one clear line about it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flexpert.cli import client as client_module
from flexpert.cli.client import Client, ClientError

KNOWN = [
    *(b"data: ", b"[DONE]", b"\n\n", b'{"choices":[{"text":"x"}]}', b'{"error":{"message":"no"}}'),
    *(b'{"error":', b'{"choices":', b"[", b"]", b"{", b"}", b"null", b"1e999", b'"\xed\xa0\x80"'),
    *(b'{"epoch":1,"ranks":[]}', b"\x1b[2J", b"[" * 5000),
]
BODIES = st.lists(st.sampled_from(KNOWN) | st.binary(max_size=40), max_size=12).map(b"".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
LESS = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Anything:
    """A server that answers every connection with `said`, and closes it."""

    def __init__(self) -> None:
        self.said = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, suppress(OSError):  # who asked may have heard enough
                if not self.said:
                    return
                asked = connection.recv(1 << 16)
                while b"\r\n\r\n" not in asked and (more := connection.recv(1 << 16)):
                    asked += more
                connection.sendall(self.said)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # to close before it is read would reset it
                    pass

    def close(self) -> None:
        self.said = b""
        socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()
        self._listener.close()


@pytest.fixture(scope="module")
def anything() -> Iterator[Anything]:
    server = Anything()
    yield server
    server.close()


@contextmanager
def one_clear_line() -> Iterator[None]:
    """If it fails, then so."""
    said = "-"
    try:
        yield
    except ClientError as error:
        said = str(error)
    assert said.isprintable()
    assert 0 < len(said) < 700


CALLS: list[Callable[[Client], Any]] = [
    lambda client: client.cluster(),
    lambda client: client.begin({"ranks": 2}),
    lambda client: list(client.stream("/v1/completions", {})),
]


@pytest.mark.parametrize("call", CALLS)
@LESS
@given(body=BODIES, status=st.sampled_from([200, 200, 302, 404, 401, 500]))
def test_any_body_gives_an_answer_or_one_line(
    anything: Anything, call: Callable[[Client], Any], body: bytes, status: int
) -> None:
    anything.said = b"HTTP/1.1 %d Any\r\nconnection: close\r\n\r\n" % status + body
    with one_clear_line(), Client(anything.url, None) as client:
        call(client)


@LESS
@example(value="\n", wrapped=True, kind=(500, ""), call=CALLS[0])
@given(
    value=JSON,
    wrapped=st.booleans(),
    kind=st.sampled_from([(200, "data: "), (200, ""), (500, "")]),
    call=st.sampled_from(CALLS),
)
def test_any_json_gives_an_answer_or_one_line(
    anything: Anything,
    value: object,
    wrapped: bool,
    kind: tuple[int, str],
    call: Callable[[Client], Any],
) -> None:
    status, prefix = kind
    text = json.dumps({"error": value, "choices": value} if wrapped else value)
    said = f"HTTP/1.1 {status} Any\r\nconnection: close\r\n\r\n{prefix}{text}\n\n"
    anything.said = said.encode()
    with one_clear_line(), Client(anything.url, None) as client:
        call(client)


HEADERS = [
    b"content-encoding: gzip",
    b"content-type: text/plain; charset=no-such",
    b"content-length: -1",
    b"transfer-encoding: chunked",
    b"set-cookie: \xff=\x00; expires=never",
    b"location: http://[",
]


@LESS
@given(
    first=st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.1 99", b"SSH-2.0-x", b"HTTP/1.1 401 \xff"]),
    headers=st.lists(st.sampled_from(HEADERS) | st.binary(max_size=20), max_size=4),
    body=BODIES,
    call=st.sampled_from(CALLS),
)
def test_what_is_no_http_gives_one_line(
    anything: Anything,
    first: bytes,
    headers: list[bytes],
    body: bytes,
    call: Callable[[Client], Any],
) -> None:
    anything.said = b"\r\n".join([first, *headers, b"", body])
    with one_clear_line(), Client(anything.url, None, timeout_s=5) as client:
        call(client)


@LESS
@given(url=st.text(max_size=30) | st.sampled_from(["http://[", "http://a:b", "http://\u2603.x:1"]))
def test_what_is_no_address_gives_one_line(url: str) -> None:
    with pytest.raises(ClientError), Client(f"http://127.0.0.1:1/{url}\x00", None) as client:
        client.cluster()


@pytest.mark.parametrize("url", ["http://[", "http://a:b", "http://\u2603", "ftp://x", "", "\x00"])
def test_a_wrong_address_is_said(url: str) -> None:
    with pytest.raises(ClientError), Client(url, None, timeout_s=1) as client:
        client.cluster()


@pytest.mark.parametrize("key", ["clé", "two\nlines", "\ud800", "\x00"])
def test_a_key_that_no_header_can_have_is_said(anything: Anything, key: str) -> None:
    anything.said = b"HTTP/1.1 401 No\r\nconnection: close\r\n\r\n"
    with pytest.raises(ClientError), Client(anything.url, key) as client:
        client.cluster()


def test_an_answer_without_end_is_not_read_on(
    anything: Anything, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MOST_BYTES", 1 << 20)
    anything.said = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"x" * (1 << 20) + b"yy"
    for call in CALLS:
        with pytest.raises(ClientError, match="MiB"), Client(anything.url, None) as client:
            call(client)
