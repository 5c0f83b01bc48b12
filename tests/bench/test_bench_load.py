"""The streaming client against bytes, and against a small server; the two ways of offering load."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.bench.load import (
    HttpReply,
    LoadError,
    Target,
    call,
    closed_loop,
    complete,
    completion_body,
    events_so_far,
    open_loop,
    parse_completion,
    parse_reply,
    server_events,
)
from flexpert.errors import ConfigError

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


EVENTS = [
    token("In"),
    token(""),
    token(" the\n\n"),
    token("", "length"),
    event(choices=[], usage={"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}),
    b"data: [DONE]\n\n",
]


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@given(st.lists(st.integers(0, 800)))
def test_an_answer_is_the_same_however_it_is_cut_into_pieces(cuts: list[int]) -> None:
    data = HEAD + chunked(EVENTS)
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [
        (float(number), data[begin:end])
        for number, (begin, end) in enumerate(itertools.pairwise(places))
    ]
    answer = parse_completion(0.0, parse_reply(pieces))
    assert answer.error is None
    assert (answer.text, answer.tokens, answer.finish) == ("In the\n\n", 4, "length")
    assert len(answer.times) == 2
    assert answer.times == sorted(answer.times)


def test_an_event_has_the_time_of_the_piece_that_completed_it() -> None:
    first = b"b\r\ndata: {}\n\n\n\r\n"
    pieces = [(1.0, HEAD + first[:5]), (2.0, first[5:]), (3.0, b"b\r\ndata: []\n\n\n\r\n0\r\n\r\n")]
    found = list(server_events(parse_reply(pieces).chunks))
    assert [time for time, _ in found] == [2.0, 3.0]


def test_the_events_of_a_stream_that_goes_on_are_those_that_are_whole() -> None:
    data = HEAD + chunked(EVENTS[:3])[:-5] + b'40\r\ndata: {"choices"'
    pieces = [(1.0, data[:90]), (2.0, data[90:])]
    assert len(list(events_so_far(pieces))) == 3


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_stream_that_ends_early_is_no_whole_answer(kept: int) -> None:
    answer = parse_completion(0.0, HttpReply(200, [(1.0, b"".join(EVENTS[:kept]))]))
    assert answer.error == "the stream ended before the answer was complete"


def test_a_connection_cut_in_the_middle_is_an_error() -> None:
    with pytest.raises(LoadError, match="middle"):
        parse_reply([(0.0, HEAD + chunked(EVENTS)[:-9])])
    with pytest.raises(LoadError, match="before an answer"):
        parse_reply([])
    with pytest.raises(LoadError, match="middle"):
        parse_reply([(0.0, b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc")])


def test_an_error_in_the_stream_and_a_refusal_are_told() -> None:
    broken = event(error={"message": "rank 3 is gone", "type": "server_error"})
    answer = parse_completion(0.0, HttpReply(200, [(1.0, EVENTS[0] + broken + EVENTS[-1])]))
    assert answer.error == "rank 3 is gone"
    refusal = msgspec.json.encode({"error": {"message": "too long", "type": "x"}})
    assert parse_completion(0.0, HttpReply(400, [(1.0, refusal)])).error == "HTTP 400: too long"


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://a:port"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Target.parse(url)


def test_addresses() -> None:
    assert Target.parse("localhost:9000") == Target("localhost", 9000)
    assert Target.parse("https://a/b/") == Target("a", 443, "/b", tls=True)
    message = Target.parse("http://[::1]:5", "secret").message("GET", "/cluster")
    assert b"host: [::1]:5\r\n" in message
    assert b"authorization: Bearer secret\r\n" in message


Handler = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def served(handler: Handler) -> Any:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        await handler(request, writer)
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield Target("127.0.0.1", server.sockets[0].getsockname()[1])


def test_a_stream_is_read_as_it_comes() -> None:
    seen: list[int] = []

    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for part in EVENTS:
            writer.write(chunked([part])[: -len(b"0\r\n\r\n")])
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def run() -> None:
        async with served(answer) as target:
            request = target.message("POST", "/v1/completions", completion_body("x"))
            found = await complete(target, request, on_tokens=seen.append)
        assert found.whole
        assert found.text == "In the\n\n"
        assert found.gaps_s[0] >= 0.009  # two waits of 5 ms lie between
        assert found.first_token_s is not None
        assert 0 < found.first_token_s < found.total_s
        assert sum(seen) == len(EVENTS)

    asyncio.run(run())


def test_silence_and_nobody_there_are_answers_with_an_error() -> None:
    async def silent(_: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1)

    async def run() -> None:
        async with served(silent) as target:
            found = await complete(target, target.message("GET", "/"), stall_s=0.05)
            assert found.error == "nothing came for 0.05 s"
        found = await complete(target, target.message("GET", "/"))
        assert found.error is not None
        assert found.error.startswith(f"no connection to 127.0.0.1:{target.port}")

    asyncio.run(run())


def test_a_call_gives_status_and_json() -> None:
    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        body = b'{"path": "%s"}' % request.split(b" ")[1]
        writer.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()

    async def run() -> None:
        async with served(answer) as target:
            assert await call(target, "GET", "/cluster") == (202, {"path": "/cluster"})

    asyncio.run(run())


def test_a_closed_loop_keeps_its_clients_busy_and_never_more() -> None:
    running, most = 0, 0

    async def send(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return number

    assert sorted(asyncio.run(closed_loop(send, 20, 4))) == list(range(20))
    assert most == 4


def test_an_open_loop_sends_at_its_times_whatever_is_unanswered() -> None:
    async def run() -> None:
        release = asyncio.Event()
        begun: list[int] = []

        async def send(number: int) -> int:
            begun.append(number)
            if number == 2:
                release.set()
            await release.wait()
            return number

        assert await open_loop(send, [0.0, 0.001, 0.002]) == [0, 1, 2]
        assert begun == [0, 1, 2]

    asyncio.run(run())
