"""uvicorn's HTTP/1.1 with limits: on how clients send a request, and how they read an answer.

uvicorn itself waits forever for headers of any length, for a body, and for a client that does not
read; and it closes a connection while the client still sends, which resets it before the answer
could be read. Bodies are bounded by the gate, in front of the application.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import resource
import termios
from array import array
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, cast

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from flexpert.config import ServerConfig
from flexpert.server.http_errors import ApiError

log = logging.getLogger("flexpert.server")

# Key in the ASGI scope: the ApiError for which the rest of the body will not come.
BODY_FAILED = "flexpert.body_failed"

# Key in the ASGI scope: the BodyWriter of the answer.
BODY_WRITER = "flexpert.body_writer"

# After a last answer what the client still sends is read and dropped for so long, and so much of
# it, because closing at once would reset the connection and the answer would be lost with it.
LINGER_S = 10.0
LINGER_BYTES = 64 * 2**20

# Requests that one connection may send ahead of their answers.
MAX_PIPELINED = 16


class Expect(Enum):
    """What the client is to send next."""

    REQUEST = auto()  # a new one, when it likes
    HEADERS = auto()  # the rest of a request's headers
    BODY = auto()  # the rest of its body


class Door:
    """The transport as uvicorn sees it: closing goes through us, everything else past us."""

    def __init__(
        self,
        transport: asyncio.Transport,
        close: Callable[[], None],
        is_closing: Callable[[], bool],
    ) -> None:
        self._transport = transport
        self.close = close
        self.is_closing = is_closing
        self.write = transport.write  # on the way of every token: no call of ours between
        self.get_extra_info = transport.get_extra_info
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BodyWriter:
    """Writes pieces of a body without waiting, and without a coroutine for each; for who streams an
    answer that `send` has begun, and has no `send` under way. The end is sent as ever."""

    __slots__ = ("_cycle", "_flow")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow

    @property
    def ready(self) -> bool:
        """False: the client does not read, or is gone, or its answer is of another kind; `send`
        does what is right then."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding and not (self._flow.write_paused or cycle.disconnected))

    def write(self, piece: bytes) -> None:
        """piece: not empty."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))


class _Refused(Exception):  # noqa: N818 - ends the parser's work; `_error` says why
    pass


class BoundedProtocol(HttpToolsProtocol):
    """One connection; `bounded_protocol` makes a class of it for given settings."""

    limits: ServerConfig
    most_connections: int
    refused: Callable[[int], None]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._expect = Expect.REQUEST
        # Bytes read since a request began, its headers ended, or a piece of its body came. What one
        # read brings behind such a point is not counted: the limit is passed by a read at most.
        self._unparsed = 0
        self._running: RequestResponseCycle | None = None  # being answered
        self._error: ApiError | None = None  # why the parser was stopped
        self._offers_protocol = False  # the request whose headers have just been read
        self._deaf = False  # nothing the client sends is looked at any more
        self._lingering = False
        self._dropped = 0  # bytes that were not looked at
        self._unsent = 0  # bytes, at the last look
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None

    # ---- the connection ---------------------------------------------------------------------

    def connection_made(  # type: ignore[override]  # as uvicorn's own
        self, transport: asyncio.Transport
    ) -> None:
        self._wire = transport
        door = Door(transport, self._close, lambda: self._lingering or transport.is_closing())
        super().connection_made(cast(asyncio.Transport, door))
        self._limit_request(self.limits.header_timeout)
        if len(self.connections) > self.most_connections:
            self._refuse(
                ApiError(
                    503,
                    f"{self.most_connections} connections are open, the most this service keeps "
                    "(server.max_connections); try again later",
                    type="service_unavailable",
                    code="too_many_connections",
                    headers={"retry-after": "1"},
                ),
                linger=False,  # or those that are too many would stay
            )

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._request_timer, self._write_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        # uvicorn tells only the request that came last, which may be one that waits in the queue
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self._lingering:
            self._wire.abort()
        else:
            super().shutdown()

    def _close(self) -> None:
        """uvicorn closes: after the last answer, when idle for too long, or at the end."""
        if self._lingering or self._wire.is_closing():
            return
        if self._deaf or self._expect is Expect.BODY:
            self._linger()
            return
        self._wire.close()
        if self._wire.get_write_buffer_size():
            self._watch_writing()

    def _linger(self) -> None:
        self._lingering = self._deaf = True
        self._limit_request(None)
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        if self._wire.can_write_eof():
            self._wire.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_S, self._wire.abort)

    # ---- what the client sends --------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deaf:
            self._dropped += len(data)
            if self._dropped > LINGER_BYTES:
                self._wire.abort()
            return
        if self._expect is Expect.REQUEST:
            self._begin_headers()
        self._unparsed += len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self._fail(self._error or ApiError(400, "the request is not valid HTTP/1.1"))
        else:
            too_many = self._unparsed > self.limits.max_header_bytes
            if too_many and self._expect is not Expect.REQUEST:
                self._fail(self._headers_too_large())

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                if not self._offers_protocol:  # CONNECT, which is answered, and nothing after it
                    self._deaf = True
                    self.cycle.keep_alive = False
                    return
                self._offers_protocol = False
                data = data[offer.args[0] :]
                self._decline()

    def _decline(self) -> None:
        """Have the parser, which would read no body after it, read a request without its offer to
        speak another protocol: many clients that know HTTP/2 make it with their first request."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join([one for one in options if one.lower() != b"upgrade"])
            if name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _begin_headers(self) -> None:
        self._expect = Expect.HEADERS
        self._limit_request(self.limits.header_timeout)

    def on_message_begin(self) -> None:
        if self._expect is Expect.REQUEST:  # right behind another
            self._begin_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.max_header_bytes:
            self._error = self._headers_too_large()
        elif len(self.pipeline) >= MAX_PIPELINED:
            self._error = ApiError(400, f"more than {MAX_PIPELINED} requests wait for answers")
        if self._error is not None:
            raise _Refused
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._offers_protocol = True
            return
        super().on_headers_complete()
        self._unparsed = 0
        self._expect = Expect.BODY
        self._limit_request(None)
        if self._running is self.cycle:
            self._limit_request(self.limits.body_timeout)

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offers_protocol:
            return
        self._unparsed = 0
        self._expect = Expect.REQUEST
        self._limit_request(None)
        super().on_message_complete()

    def _limit_request(self, seconds: float | None) -> None:
        """What is expected must have come within so many seconds."""
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None
        if seconds is not None:
            self._request_timer = self.loop.call_later(seconds, self._on_late)

    def _on_late(self) -> None:
        self._request_timer = None
        if self._expect is Expect.REQUEST:
            self._close()  # it has asked for nothing: there is nothing to answer
        elif self._expect is Expect.HEADERS:
            limit = f"{self.limits.header_timeout:g} s (server.header_timeout)"
            self._fail(ApiError(408, f"the headers did not come within {limit}", code="timeout"))
        else:
            limit = f"{self.limits.body_timeout:g} s (server.body_timeout)"
            self._fail(ApiError(408, f"the body did not come within {limit}", code="timeout"))

    def _headers_too_large(self) -> ApiError:
        limit = f"{self.limits.max_header_bytes} bytes (server.max_header_bytes)"
        return ApiError(431, f"the headers exceed {limit}", code="headers_too_large")

    def _fail(self, error: ApiError) -> None:
        """The request cannot be read further; nothing that follows it can, either."""
        log.debug("%s: %s", self.client, error.detail)
        running = self._running
        if running is None or running.response_complete:
            self._refuse(error)
            return
        self._deaf = True
        self._limit_request(None)
        self.pipeline.clear()
        running.keep_alive = False
        if self._expect is Expect.BODY and self.cycle is running:
            # whoever reads the body is told, and answers; see `Gate`
            running.scope[BODY_FAILED] = error  # type: ignore[literal-required]
            running.message_event.set()

    def _refuse(self, error: ApiError, *, linger: bool = True) -> None:
        """Answer without the application, and end the connection."""
        if self._deaf or self._wire.is_closing():
            return
        type(self).refused(error.status_code)
        body = error.body
        lines = [STATUS_LINE[error.status_code]]
        headers = [
            *self.server_state.default_headers,
            *((name.encode(), value.encode()) for name, value in (error.headers or {}).items()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        lines += [name + b": " + value + b"\r\n" for name, value in headers]
        self._wire.write(b"".join([*lines, b"\r\n", body]))
        if linger:
            self._linger()
        else:
            self._close()

    # ---- the answer -------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        cycle.scope[BODY_WRITER] = BodyWriter(cycle)  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, app)
        if cycle is self.cycle and self._expect is Expect.BODY:  # it has waited for its turn
            self._limit_request(self.limits.body_timeout)

    def on_response_complete(self) -> None:
        answered, self._running = self._running, None
        if answered is not None and answered.more_body:  # who answered did not want the body
            self._close()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._unsent = self._unread()
        self._write_timer = self.loop.call_later(self.limits.write_timeout, self._look_at_writing)

    def _unread(self) -> int:
        """Bytes that the client's side has not taken: here, and in the queue of the system, which
        takes more only when much of it has gone."""
        queued = array("i", [0])
        with contextlib.suppress(OSError, ValueError):  # it is closed, or no socket of a system's
            fcntl.ioctl(self._wire.get_extra_info("socket").fileno(), termios.TIOCOUTQ, queued)
        return self._wire.get_write_buffer_size() + queued[0]

    def _look_at_writing(self) -> None:
        self._write_timer = None
        if not self._wire.get_write_buffer_size():
            return
        if self._unread() < self._unsent:
            self._watch_writing()
            return
        log.info(
            "%s has not read its answer for %g s (server.write_timeout); the connection is ended",
            self.client,
            self.limits.write_timeout,
        )
        self._wire.abort()


def bounded_protocol(
    limits: ServerConfig, refused: Callable[[int], None] = lambda status: None
) -> type[BoundedProtocol]:
    """The protocol class under these settings, for `uvicorn.Config(http=…)`.

    Args:
        refused: told the status of each answer that the application does not know of.
    """

    class Bounded(BoundedProtocol):
        pass

    Bounded.limits = limits
    Bounded.most_connections = most_connections(limits)
    Bounded.refused = staticmethod(refused)
    return Bounded


def most_connections(limits: ServerConfig) -> int:
    """As set; by default all but some of the files this process may have open, which it needs
    itself: for ranks, logs and checkpoints."""
    if limits.max_connections is not None:
        return limits.max_connections
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(files - 256, files // 4)
