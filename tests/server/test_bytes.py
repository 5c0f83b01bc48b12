"""Whatever bytes a client sends: an answer below 500 or the end of its connection, and no more.

Each example goes through a socket of its own to a server with short limits; nothing may be logged
as a warning or an error, and the server serves on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.raw import answers, completion, connection, request
from support.served_head import Running

from flexpert.config import ServerConfig

PATHS = (
    *("/health", "/version", "/metrics", "/openapi.json", "/v1/models", "/v1/completions"),
    *("/v1/chat/completions", "/tokenize", "/detokenize", "/cluster", "/cluster/operations"),
    *(
        "/cluster/events",
        "/cluster/operations/x",
        "/scale_elastic_ep",
        "/is_scaling_elastic_ep",
        "/docs",
    ),
)
BODY = b'{"prompt":"x","max_tokens":2}'


KEY = "ключ"
LIMITS = {
    "header_timeout": 0.15,
    "body_timeout": 0.15,
    "write_timeout": 1,
    "max_header_bytes": 2**14,
    "max_body": 2**16,
}


class Log(logging.Handler):
    """What is logged as a warning or worse."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture(scope="module")
def log() -> Iterator[Log]:
    log = Log()
    logging.getLogger().addHandler(log)
    yield log
    logging.getLogger().removeHandler(log)


@pytest.fixture(scope="module")
def servers(log: Log) -> Iterator[tuple[Running, Running]]:
    """One open, one with a key."""
    both = Running(ServerConfig(**LIMITS)), Running(ServerConfig(api_key=KEY, **LIMITS))
    yield both
    for running in both:
        running.close()
    assert not log.lines  # of what was at work when its client had gone


def some(*parts: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(parts)


# what a proxy, a fuzzer or an attacker puts where text is expected
odd = st.one_of(
    st.binary(max_size=30),
    some(
        *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\0", b"\xff\xfe", "ключ".encode(), b"\x7f\x1b[2J"),
        *(b"%", b"%0", b"%zz", b"%00", b"%ED%A0%80", b"%FF", b"%2e%2e/", b"..", b"//", b"?", b"#"),
        *(b"%25" * 50, b"a" * 5000, b"a" * 20_000, b"/" * 3000, b"\\", b"{}", b"\r", b"\t", b" "),
    ),
)
known = st.sampled_from(PATHS).map(str.encode)
target = st.one_of(
    known,
    st.tuples(st.sampled_from(PATHS).map(str.encode), some(b"", b"/", b"?", b"%"), odd).map(
        b"".join
    ),
    odd.map(lambda raw: b"/" + raw),
    some(b"*", b"", b"http://x/health", b"http://[::1/health", b"//x:99999/", b"x:y", b"http:///"),
)
method = st.one_of(
    some(*b"GET POST DELETE PUT PATCH HEAD OPTIONS TRACE CONNECT M-SEARCH PRI".split()),
    some(b"get", b"X" * 50, b"", b"\0", b"G\xff"),
)
length = st.one_of(
    st.integers(-3, 2**17).map(lambda n: str(n).encode()),
    some(b"+5", b"0x5", b"5 5", b"5,5", b"", b"1e3", b"9" * 30, b"9" * 5000, "٣".encode(), b"5\0"),
)
header = st.one_of(
    st.tuples(some(b"x", b"host", b"accept", b"cookie", b"x\0", b"\xff", b""), odd),
    st.tuples(some(b"content-type"), some(b"application/json", b"text/plain; charset=\xff", b";=")),
    st.tuples(
        some(b"authorization"), st.tuples(some(b"Bearer ", b"Basic ", b""), odd).map(b"".join)
    ),
    st.tuples(some(b"authorization"), some("Bearer ключ".encode())),
    st.tuples(some(b"content-length"), length),
    st.tuples(
        some(b"transfer-encoding"), some(b"chunked", b"gzip", b"chunked, chunked", b"x\0", b"")
    ),
    st.tuples(some(b"connection"), some(b"close", b"keep-alive", b"upgrade", b"\xff")),
    st.tuples(some(b"upgrade"), some(b"websocket", b"h2c", b"\0")),
    st.tuples(some(b"expect"), some(b"100-continue", b"200-ok", b"\xff")),
)
chunk = st.one_of(
    some(b"5\r\nhello\r\n", b"0\r\n\r\n", b"%x\r\n%b\r\n" % (len(BODY), BODY)),
    some(
        b"-1\r\nx\r\n",
        b"zz\r\n",
        b"fffffffffffffffff\r\n",
        b"5;a=b\r\nhello\r\n",
        b"5\r\nhelloworld",
    ),
    some(b"0\r\nx: y\r\n\r\n", b"0\r\ntransfer-encoding: chunked\r\n\r\n", b"\0", b"1" * 3000),
)
content = st.one_of(some(b"", BODY, b"[" * 5000, b"x" * 70_000), odd, st.lists(chunk).map(b"".join))


PLACES = ("method", "target", "version", "headers", "length", "chunks", "content", "end")


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request that is right but for one or two places, so that most go deep."""
    spoiled = draw(st.sets(st.sampled_from(PLACES), max_size=2))
    verb = draw(method if "method" in spoiled else some(b"GET", b"POST", b"POST", b"DELETE"))
    where = draw(target if "target" in spoiled else known)
    version = b"HTTP/1.1"
    if "version" in spoiled:
        version = draw(some(b"HTTP/1.0", b"HTTP/9.9", b"", b"X", b"HTTP/1.1 "))
    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    headers.append((b"authorization", b"Bearer " + KEY.encode()))
    if "headers" in spoiled:
        headers += draw(st.lists(header, min_size=1, max_size=4))
    body = draw(content) if "content" in spoiled else BODY
    if "chunks" in spoiled:
        headers.append((b"transfer-encoding", b"chunked"))
        body = b"".join(draw(st.lists(chunk, max_size=4)))
    elif "length" in spoiled:
        headers.append((b"content-length", draw(length)))
    else:
        headers.append((b"content-length", str(len(body)).encode()))
    end = draw(some(b"\n", b"\r", b"\r\r\n", b" \r\n ")) if "end" in spoiled else b"\r\n"
    lines = [b" ".join((verb, where, version)), *(b": ".join(pair) for pair in headers)]
    return end.join([*lines, b"", b""]) + body


def send(url: str, data: bytes) -> bytes:
    """What is answered until the connection ends or nothing more comes."""
    received = b""
    with connection(url) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(data)
        try:
            while piece := raw.recv(2**16):
                received += piece
                raw.settimeout(0.1)  # what is answered at all is answered at once
        except TimeoutError:
            assert received, "neither an answer nor an end"
        except ConnectionError:
            pass
    return received


@pytest.mark.slow
@given(st.lists(requests(), min_size=1, max_size=3).map(b"".join), st.booleans())
@example(completion(max_tokens=2) + b"\0", False)
@example(request("GET", "/%ED%A0%80?%FF=\0"), False)
@example(request("POST", "/v1/completions", BODY, content_type="application/json"), True)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_any_bytes_are_answered_below_500_or_end_the_connection(
    servers: tuple[Running, Running], log: Log, data: bytes, closed: bool
) -> None:
    url = servers[closed].url
    received = send(url, data)
    assert not log.lines
    heads = [line for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert not received or heads
    assert not [line for line in heads if line.split()[1] >= b"500"]
    (health,) = answers(send(url, request("GET", "/health", connection="close")))
    assert health.status == 200
