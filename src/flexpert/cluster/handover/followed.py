"""The side of the head that has taken over: one link to a head that was taken over.

It gets what its clients wait for, and its clients' next requests are answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.head_links import received, send
from flexpert.cluster.journal import TokenStream
from flexpert.engine.request import TokenEvent
from flexpert.errors import FlexpertError, RequestError

log = logging.getLogger("flexpert")

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class Adopter(Protocol):
    """The head."""

    handed: asyncio.Event

    def adopt(self, sequence_id: str) -> TokenStream | None:
        """The answer of a sequence that was taken over, from its beginning; once."""
        ...

    def keep(self, response: hand.KeptResponse) -> None:
        """Of a head that was taken over."""
        ...

    async def application(self) -> App:
        """The ASGI application, when it is there."""
        ...


class FollowedLink:
    """busy: whether requests that it has been given are being answered."""

    def __init__(
        self, owner: Adopter, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._owner, self._reader, self._writer = owner, reader, writer
        self._streams: dict[str, TokenStream] = {}
        self._requests: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> bool:
        return bool(self._requests)

    @property
    def follows(self) -> frozenset[str]:
        """Ids of the answers that go out here."""
        return frozenset(self._streams)

    async def serve(self, follow: hand.Follow) -> None:
        """Until the other side goes."""
        for name, count in follow.answers.items():
            stream = self._owner.adopt(name)
            if stream is None:
                error = f"request {name} is not known to the head that has taken over"
                send(self._writer, hand.AnswerFailed(name, error, request=False))
                continue
            self._streams[name] = stream
            self._do(self._tell(stream, count))
        try:
            async for message in received(self._reader):
                self._hear(hand.decode_follower(message))
        finally:
            for task in self._tasks:
                task.cancel()
            if not self._owner.handed.is_set():
                for stream in self._streams.values():
                    stream.cancel()

    def move(self) -> None:
        """Yet another head has taken over."""
        send(self._writer, hand.Moved())

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hear(self, message: hand.OfFollower) -> None:
        match message:
            case hand.CancelAnswer(id):
                stream = self._streams.pop(id, None)
                if stream is not None:
                    stream.cancel()
            case hand.KeptResponse():
                self._owner.keep(message)
            case hand.Request():
                queue = self._requests[message.number] = asyncio.Queue()
                self._do(self._answer(message, queue))
            case hand.RequestBody(number, data, more):
                if (queue_ := self._requests.get(number)) is not None:
                    queue_.put_nowait({"type": "http.request", "body": data, "more_body": more})
            case hand.RequestGone(number):
                if (queue_ := self._requests.get(number)) is not None:
                    queue_.put_nowait({"type": "http.disconnect"})

    async def _tell(self, stream: TokenStream, has: int) -> None:
        """has: how many of its tokens are there already."""
        name, position = stream.id, 0
        try:
            async for delta in stream:
                end = position + len(delta.tokens)
                if end > has or delta.finish is not None:
                    event = TokenEvent(
                        name,
                        position,
                        delta.tokens,
                        delta.logprobs,
                        delta.finish,
                        delta.degraded,
                        delta.prompt_logprobs,
                        delta.cached,
                    )
                    send(self._writer, hand.Grown(event))
                    await self._drain()
                position = end
                if delta.finish is not None:
                    self._streams.pop(name, None)
        except FlexpertError as error:
            request = isinstance(error, RequestError)
            send(self._writer, hand.AnswerFailed(name, str(error), request=request))
            self._streams.pop(name, None)

    async def _drain(self) -> None:
        with contextlib.suppress(ConnectionError):  # as reading tells
            await self._writer.drain()

    async def _answer(self, asked: hand.Request, queue: asyncio.Queue[dict[str, Any]]) -> None:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": asked.http_version,
            "method": asked.method,
            "scheme": asked.scheme,
            "path": asked.path,
            "raw_path": asked.raw_path,
            "query_string": asked.query_string,
            "root_path": "",
            "headers": asked.headers,
            "client": asked.client,
            "server": None,
            "state": {},
        }
        number = asked.number

        async def tell(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
                send(self._writer, hand.AnswerStart(number, message["status"], headers))
            elif message["type"] == "http.response.body":
                data, more = bytes(message.get("body", b"")), message.get("more_body", False)
                send(self._writer, hand.AnswerBody(number, data, more))
            await self._drain()

        try:
            app = await self._owner.application()
            await app(scope, queue.get, tell)
        except Exception:
            log.exception("a forwarded request failed: %s %r", asked.method, asked.path)
        finally:
            self._requests.pop(number, None)
            send(self._writer, hand.AnswerEnd(number))
