"""Server-sent events without a framework between a token and the socket; clients that leave."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexpert.server.http_errors import api_error

log = logging.getLogger("flexpert.server")

T = TypeVar("T")

# Key in the ASGI scope: the client went away before its answer was complete.
CLIENT_GONE = "flexpert.client_gone"

DONE = b"data: [DONE]\n\n"


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
    """Sends chunks as they come, each at once.

    Starlette's own streaming response would do the same through a task group and a wrapper per
    chunk; the head shares its cores with the ranks, so a token's way out is kept short.

    Args:
        chunks: an async generator; closed when the client goes away.
        on_close: called at the end in any case, even if the first chunk was never asked for.
        headers: more of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        on_close: Callable[[], None] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        own = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers={**own, **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._on_close = on_close
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send_all(send))
        except ClientGone:
            scope[CLIENT_GONE] = True
            if self._begun:  # it may be there yet, and its request wrong: its answer ends
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._on_close is not None:
                self._on_close()

    async def _send_all(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        self._begun = True
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            # the status has been sent: an event is the only way left to tell the client
            log.exception("a stream of events failed")
            last = event(api_error(error).body)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
