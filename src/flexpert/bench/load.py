"""A cheap HTTP client for streams, and the two ways of offering load.

The client shares its cores with the server it measures. So while an answer streams in, it only
notes what came and when; the bytes are taken apart once the answer is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import msgspec

from flexpert.errors import ConfigError, FlexpertError

T = TypeVar("T")

Pieces = list[tuple[float, bytes]]

_DATA = b"data: "
_DONE = b"[DONE]"


class LoadError(FlexpertError):
    """The server could not be reached, or answered with something that is not HTTP."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. prefix: path before /v1; key: bearer token."""

    host: str
    port: int
    prefix: str = ""
    key: str | None = None
    tls: bool = False

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Target:
        """Raises ConfigError if it is no http(s) URL."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"{url!r} is no address; write for example http://127.0.0.1:8000")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/"), key, tls)

    @property
    def url(self) -> str:
        """Of its root, without the key."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"

    def message(self, method: str, path: str, body: object = None) -> bytes:
        """The bytes of one request."""
        content = b"" if body is None else msgspec.json.encode(body)
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [
            f"{method} {self.prefix}{path} HTTP/1.1",
            f"host: {host}:{self.port}",
            "connection: close",
            f"content-length: {len(content)}",
        ]
        if body is not None:
            lines.append("content-type: application/json")
        if self.key:
            lines.append(f"authorization: Bearer {self.key}")
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


class _Exchange(asyncio.Protocol):
    """One connection, one request, one answer."""

    def __init__(
        self, request: bytes, done: asyncio.Future[Pieces], on_data: Callable[[bytes], None] | None
    ) -> None:
        self._request = request
        self._done = done
        self._on_data = on_data
        self._pieces: Pieces = []
        self.latest = perf_counter()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's are no subclass

    def data_received(self, data: bytes) -> None:
        self.latest = perf_counter()
        self._pieces.append((self.latest, data))
        if self._on_data:
            self._on_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done.done():
            return
        if error is not None:
            self._done.set_exception(LoadError(f"the connection broke: {error}"))
        else:
            self._done.set_result(self._pieces)


async def exchange(
    target: Target,
    request: bytes,
    *,
    stall_s: float = 60.0,
    on_data: Callable[[bytes], None] | None = None,
) -> Pieces:
    """Send a request; what came back, each piece with the `perf_counter` time of its arrival.

    Args:
        stall_s: longest silence.
        on_data: sees every piece as it comes.

    Raises:
        LoadError: no connection, a broken one, or a longer silence.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Pieces] = loop.create_future()
    try:
        transport, protocol = await asyncio.wait_for(
            loop.create_connection(
                lambda: _Exchange(request, done, on_data),
                target.host,
                target.port,
                ssl=ssl.create_default_context() if target.tls else None,
            ),
            stall_s,
        )
    except (OSError, TimeoutError) as error:
        raise LoadError(
            f"no connection to {target.host}:{target.port}: {error or 'timed out'}"
        ) from None
    try:
        while True:
            wait_s = protocol.latest + stall_s - perf_counter()
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(done), max(wait_s, 0.0))
            if perf_counter() - protocol.latest >= stall_s:
                raise LoadError(f"nothing came for {stall_s:g} s")
    finally:
        if not done.done():
            done.cancel()
        transport.abort()


@dataclass(slots=True)
class HttpReply:
    """An answer taken apart. chunks: the body, each part with the time it was complete."""

    status: int
    chunks: Pieces

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.chunks)


def parse_reply(pieces: Pieces) -> HttpReply:
    """The HTTP answer in what was received until the connection closed.

    Raises:
        LoadError: it is none, or not whole.
    """
    head, body = _split_head(pieces)
    lines = head.decode("latin-1").split("\r\n")
    try:
        status = int(lines[0].split(" ", 2)[1])
    except (IndexError, ValueError):
        raise LoadError(f"no HTTP answer: {lines[0][:80]!r}") from None
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines[1:])
    }
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return HttpReply(status, list(_dechunk(body)))
    desired = headers.get("content-length")
    if desired is not None and sum(len(data) for _, data in body) < int(desired):
        raise LoadError("the connection closed in the middle of the answer")
    return HttpReply(status, body)


def _split_head(pieces: Pieces) -> tuple[bytes, Pieces]:
    head = b""
    for place, (time, data) in enumerate(pieces, 1):
        head += data
        if b"\r\n\r\n" in head:
            head, _, rest = head.partition(b"\r\n\r\n")
            return head, [(time, rest), *pieces[place:]]
    raise LoadError("the connection closed before an answer came")


def events_so_far(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """`server_events` of an answer in chunks that goes on."""
    _, body = _split_head(pieces)
    with contextlib.suppress(LoadError):  # its end is missing
        yield from server_events(_dechunk(body))


def _dechunk(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    buffer = b""
    for time, data in pieces:
        buffer += data
        while True:
            size_line, found, rest = buffer.partition(b"\r\n")
            if not found:
                break
            size = int(size_line.split(b";")[0], 16)
            if size == 0:
                return
            if len(rest) < size + 2:
                break
            yield time, rest[:size]
            buffer = rest[size + 2 :]
    raise LoadError("the connection closed in the middle of the answer")


def server_events(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The `data:` of each server-sent event, with the time it was complete."""
    buffer = b""
    for time, data in chunks:
        buffer += data
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            lines = [line[len(_DATA) :] for line in event.split(b"\n") if line.startswith(_DATA)]
            if lines:
                yield time, b"\n".join(lines)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True)
class ClientAnswer:
    """What became of one completion; times are `perf_counter` seconds.

    times: when each event with text or tokens came. tokens, prompt_tokens, cached_tokens: as the
    server counts them. token_ids: where they were asked for. error: why there is no whole answer;
    the rest is what came before.
    """

    sent: float
    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None

    @property
    def whole(self) -> bool:
        return self.error is None

    @property
    def first_token_s(self) -> float | None:
        return self.times[0] - self.sent if self.times else None

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in itertools.pairwise(self.times)]

    @property
    def total_s(self) -> float:
        return self.ended - self.sent


def completion_body(prompt: str | list[int], **params: Any) -> dict[str, Any]:
    """The body of a streamed `/v1/completions` that ends with the token counts."""
    return {
        "prompt": prompt,
        "stream": True,
        "stream_options": {"include_usage": True},
        **params,
    }


async def complete(
    target: Target,
    request: bytes,
    *,
    stall_s: float = 60.0,
    on_tokens: Callable[[int], None] | None = None,
) -> ClientAnswer:
    """Stream one completion; what goes wrong is in the answer, never raised.

    Args:
        request: `target.message("POST", "/v1/completions", completion_body(...))`.
        on_tokens: told how many events have come, as they come.
    """
    on_data = None
    if on_tokens is not None:
        tell = on_tokens

        def on_data(data: bytes) -> None:
            tell(data.count(_DATA))

    sent = perf_counter()
    try:
        pieces = await exchange(target, request, stall_s=stall_s, on_data=on_data)
        return parse_completion(sent, parse_reply(pieces))
    except LoadError as error:
        return ClientAnswer(sent, error=str(error), ended=perf_counter())


def parse_completion(sent: float, reply: HttpReply) -> ClientAnswer:
    """The answer in a streamed completion."""
    answer = ClientAnswer(sent, ended=reply.chunks[-1][0] if reply.chunks else sent)
    if reply.status != 200:
        answer.error = f"HTTP {reply.status}: {error_message(reply.body)}"
        return answer
    texts: list[str] = []
    done = False
    for time, data in server_events(reply.chunks):
        if data == _DONE:
            done = True
            break
        try:
            chunk = _decode_chunk(data)
        except msgspec.MsgspecError as error:
            answer.error = f"an event that is no completion: {error}"
            return answer
        if chunk.error is not None:
            answer.error = chunk.error.message
        if chunk.usage is not None:
            usage = chunk.usage
            answer.tokens, answer.prompt_tokens = usage.completion_tokens, usage.prompt_tokens
            if usage.prompt_tokens_details:
                answer.cached_tokens = usage.prompt_tokens_details.cached_tokens
        for choice in chunk.choices:
            if choice.text or choice.token_ids:
                texts.append(choice.text)
                answer.token_ids += choice.token_ids or ()
                answer.times.append(time)
            answer.finish = choice.finish_reason or answer.finish
    answer.text = "".join(texts)
    if answer.error is None and (not done or answer.finish is None):
        answer.error = "the stream ended before the answer was complete"
    return answer


def error_message(body: bytes) -> str:
    """What an OpenAI-shaped error says, or the beginning of whatever else it is."""
    try:
        error = msgspec.json.decode(body, type=_Chunk).error
    except msgspec.MsgspecError:
        error = None
    return error.message if error else body[:200].decode("utf-8", "replace").strip()


async def call(
    target: Target, method: str, path: str, body: object = None, *, timeout_s: float = 30.0
) -> tuple[int, Any]:
    """A request that is answered at once: status and decoded JSON.

    Raises:
        LoadError
    """
    pieces = await exchange(target, target.message(method, path, body), stall_s=timeout_s)
    reply = parse_reply(pieces)
    try:
        return reply.status, msgspec.json.decode(reply.body) if reply.body else None
    except msgspec.DecodeError:
        return reply.status, reply.body.decode("utf-8", "replace")


# ---- the two ways of offering load ------------------------------------------------------------


async def closed_loop(
    send: Callable[[int], Awaitable[T]], count: int | Iterable[int], concurrency: int
) -> list[T]:
    """`concurrency` clients, each with its next request as soon as its last is answered.

    Results come in the order of their completion.
    """
    jobs = iter(range(count) if isinstance(count, int) else count)
    results: list[T] = []

    async def client() -> None:
        for job in jobs:
            results.append(await send(job))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return results


async def open_loop(send: Callable[[int], Awaitable[T]], arrivals: Sequence[float]) -> list[T]:
    """Requests at their times, whatever became of those before."""
    start = perf_counter()

    async def one(number: int) -> T:
        while (left := start + arrivals[number] - perf_counter()) > 0:
            await asyncio.sleep(left)  # uvloop's timers are whole milliseconds, and may be early
        return await send(number)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number)) for number in range(len(arrivals))]
    return [task.result() for task in tasks]
