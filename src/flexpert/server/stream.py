"""Server-sent events without a framework between a token and the socket; clients that leave.

Each token of each stream comes by here. So nobody waits for it: what arrives is turned into events
and written by whoever the event loop calls for it, as long as the client reads. Where it does not,
a task waits for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexpert.server.http_errors import api_error
from flexpert.server.protocol import BODY_WRITER, BodyWriter

if TYPE_CHECKING:
    from flexpert.frontend.generation import Generation, Part

log = logging.getLogger("flexpert.server")

T = TypeVar("T")

# Key in the ASGI scope: the client went away before its answer was complete.
CLIENT_GONE = "flexpert.client_gone"

DONE = b"data: [DONE]\n\n"

_MOST_AT_ONCE = 2**16  # bytes of events, before it is looked whether the client still reads


class ClientGone(Exception):  # noqa: N818 - an event, not a failure
    """The client closed its connection before the answer was complete."""


def event(data: bytes, *, name: str | None = None, id: bytes = b"") -> bytes:
    """One event; data: a line of JSON. id: if it has one."""
    head = b"" if name is None else b"event: %b\n" % name.encode()
    if id:
        return b"%bid: %b\ndata: %b\n\n" % (head, id, data)
    return b"%bdata: %b\n\n" % (head, data)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientGone: it did; or its request failed (the cause), whose body nobody waited for.
    """
    watcher = asyncio.ensure_future(_gone(receive))
    worker = asyncio.ensure_future(work)
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone from watcher.exception()
        return worker.result()
    finally:
        watcher.cancel()
        if not worker.done():
            worker.cancel()
            await asyncio.wait((worker,))  # so that what it held is free when we return


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer of events, sent as they come; `_events` says how.

    Args:
        on_close: called at the end in any case, even if nothing was ever sent.
        headers: more of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        on_close: Callable[[], None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**own, **(headers or {})})
        del self.headers["content-length"]
        self._on_close = on_close
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(scope, send))
        except ClientGone:
            scope[CLIENT_GONE] = True
            if self._begun:  # it may be there yet, and its request wrong: its answer ends
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._on_close is not None:
                self._on_close()

    async def _send_all(self, scope: Scope, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        self._begun = True
        try:
            await self._send_events(scope, send)
        except Exception as error:
            # the status has been sent: an event is the only way left to tell the client
            log.exception("a stream of events failed")
            await _send_piece(send, event(api_error(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_events(self, scope: Scope, send: Send) -> None:
        raise NotImplementedError


class GeneratedEvents(EventStream):
    """Sends what a generator makes, each piece at once.

    Args:
        pieces: closed when the client goes away.
    """

    def __init__(self, pieces: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._pieces = pieces

    async def _send_events(self, scope: Scope, send: Send) -> None:
        async with aclosing(self._pieces) as pieces:
            async for piece in pieces:
                await _send_piece(send, piece)


class AnswerEvents(Protocol):
    """How an answer is told in events: each method returns some of them, or b""."""

    def begin(self) -> bytes: ...

    def show(self, parts: list[Part]) -> bytes:
        """What it has grown by; as `Generation.arrived`."""
        ...

    def end(self) -> bytes: ...

    def fail(self, error: Exception) -> bytes:
        """Instead of all that would follow; called where the error is handled."""
        ...


class AnswerStream(EventStream):
    """Sends an answer as it grows; what came in one step leaves in one piece.

    Args:
        generation: submitted; freed at the end, or when the client goes away.
    """

    def __init__(
        self,
        generation: Generation,
        events: AnswerEvents,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(generation.cancel, headers)
        self._generation = generation
        self._events = events
        self._shown = False  # its beginning
        self._complete = False
        self._writer: BodyWriter | None = None
        self._idle: asyncio.Future[None] | None = None  # the task waits, nothing is being sent

    async def _send_events(self, scope: Scope, send: Send) -> None:
        self._writer = scope.get(BODY_WRITER)
        loop = asyncio.get_running_loop()
        try:
            while not self._complete:
                if piece := self._read():
                    await _send_piece(send, piece)
                else:
                    self._idle = loop.create_future()
                    self._generation.when_arrived(self._arrived)
                    await self._idle
        finally:
            self._idle = None

    def _arrived(self) -> None:
        asyncio.get_running_loop().call_soon(self._pass_on)

    def _pass_on(self) -> None:
        """Write what has come, if the client reads; else the task sends it."""
        idle = self._idle
        if idle is None or idle.done():
            return  # the client is gone
        if self._writer is None or not self._writer.ready:
            idle.set_result(None)
            return
        try:
            if piece := self._read():
                self._writer.write(piece)
            if self._complete:
                idle.set_result(None)
            else:
                self._generation.when_arrived(self._arrived)
        except Exception as error:  # noqa: BLE001 - raised again where the answer is sent
            if not idle.done():
                idle.set_exception(error)

    def _read(self) -> bytes:
        """Events of all that has come, or of much of it; at the end all that ends them."""
        found: list[bytes] = []
        try:
            self._add_events(found)
        except Exception as error:  # noqa: BLE001 - the client is told of it
            self._complete = True
            found.append(self._events.fail(error))
        return b"".join(found)

    def _add_events(self, found: list[bytes]) -> None:
        if not self._shown:
            self._shown = True
            found.append(self._events.begin())
            return
        size = 0
        for parts in self._generation.arrived():
            piece = self._events.show(parts)
            found.append(piece)
            size += len(piece)
            if size > _MOST_AT_ONCE:
                return
        if self._generation.over:
            found.append(self._events.end())
            self._complete = True


async def _send_piece(send: Send, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})
