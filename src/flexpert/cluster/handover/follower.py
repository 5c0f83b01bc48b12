"""The side of a head that was taken over: its clients' connections go on with the other's answers.

Where that one ends as well, whoever goes on with the service is followed next.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.head_links import received, send
from flexpert.cluster.handover.messages import ConversationEnded
from flexpert.cluster.journal import TokenStream
from flexpert.cluster.views import Delta
from flexpert.errors import FlexpertError, RequestError, ServiceStopped
from flexpert.forking.framing import BadFrame, Piece

log = logging.getLogger("flexpert")

_TRY_AGAIN_S = 0.02
_GREET_S = 5.0
_STOPPED_S = 1.0


class LinkLost(Exception):  # noqa: N818
    """The head that was to answer has ended."""


@dataclass(slots=True)
class _Followed:
    """An answer. count: tokens of it that have come."""

    stream: TokenStream
    count: int


@dataclass(eq=False, slots=True)
class _Link:
    """answers: to requests, by their numbers; None: the link is lost."""

    messages: AsyncIterator[bytes]
    writer: asyncio.StreamWriter
    answers: dict[int, asyncio.Queue[hand.OfFollowed | None]] = field(default_factory=dict)
    moved: bool = False


class Follower:
    """Used on the event loop.

    Args:
        directory: of the state, where the head that goes on listens.
        answers: stream of each unfinished sequence → how many tokens of it have come.
        patience_s: for a head that goes on.
    """

    def __init__(
        self, directory: Path, answers: Mapping[TokenStream, int], patience_s: float
    ) -> None:
        self._path = str(directory / hand.HEAD_SOCKET)
        self._answers = {stream.id: _Followed(stream, n) for stream, n in answers.items()}
        self._patience_s = patience_s
        self._numbers = itertools.count(1)
        self._link: _Link | None = None
        self._links: set[_Link] = set()
        self._linked = asyncio.Event()
        self._lost: str | None = None  # nobody goes on: why
        self._waiting = 0  # requests that wait for a link
        self._kept: list[hand.KeptResponse] = []  # that nobody has been told yet
        self._running: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Answers and requests that are waited for."""
        linked = sum(len(link.answers) for link in self._links)
        return len(self._answers) + linked + self._waiting

    def start(self) -> None:
        self._running = asyncio.ensure_future(self._run())

    async def close(self, error: FlexpertError) -> None:
        """What is still waited for ends with this error."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._fail_all(error)
        for link in list(self._links):
            self._end(link)
        self._lost = self._lost or str(error)
        self._linked.set()  # who waits for a link hears that there will be none

    def cancel(self, sequence_id: str) -> None:
        """Nobody waits for it any more."""
        if self._answers.pop(sequence_id, None) is not None and self._link is not None:
            send(self._link.writer, hand.CancelAnswer(sequence_id))

    def keep(self, response: hand.KeptResponse) -> None:
        """The head that goes on has it from now on."""
        if self._link is not None:
            send(self._link.writer, response)
        else:
            self._kept.append(response)

    # ---- the link -------------------------------------------------------------------------------

    async def _run(self) -> None:
        reading: set[asyncio.Task[None]] = set()
        try:
            while (link := await self._connect()) is not None:
                self._link = link
                self._links.add(link)
                for response in self._kept:
                    send(link.writer, response)
                self._kept.clear()
                self._linked.set()
                over = asyncio.Event()
                task = asyncio.create_task(self._read(link, over))
                reading.add(task)
                task.add_done_callback(reading.discard)
                await over.wait()
        finally:
            for task in reading:
                task.cancel()

    async def _connect(self) -> _Link | None:
        """To whoever goes on; None: nobody does."""
        deadline = time.monotonic() + self._patience_s
        why = ""
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(_GREET_S):
                    return await self._greet()
            except (OSError, ConversationEnded, BadFrame, msgspec.MsgspecError) as error:
                why = str(error)
                if isinstance(error, FileNotFoundError):  # one that ends by itself takes it away
                    deadline = min(deadline, time.monotonic() + _STOPPED_S)
            except TimeoutError:
                why = "it does not answer"
            await asyncio.sleep(_TRY_AGAIN_S)
        log.error("no head goes on with the service: %s", why)
        self._lost = f"no head went on with the service within {self._patience_s:g} s"
        self._linked.set()
        self._fail_all(ServiceStopped(self._lost))
        return None

    async def _greet(self) -> _Link:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(channel, self._path)
            reader, writer = await asyncio.open_unix_connection(sock=channel)
        except BaseException:
            channel.close()
            raise
        try:
            counts = {name: one.count for name, one in self._answers.items()}
            send(writer, hand.Follow(counts))
            messages = received(reader)
            answer = hand.decode_greeting(await anext(messages, b""))
        except BaseException:
            writer.close()
            raise
        if isinstance(answer, hand.Declined):
            writer.close()
            raise ConversationEnded(answer.why)
        for name in counts.keys() - self._answers.keys():  # meanwhile
            send(writer, hand.CancelAnswer(name))
        return _Link(messages, writer)

    async def _read(self, link: _Link, over: asyncio.Event) -> None:
        """over: set when another link is needed."""
        try:
            async for message in link.messages:
                self._hear(link, hand.decode_followed(message))
                if link.moved:
                    over.set()
                    if not link.answers:
                        return
        except (OSError, BadFrame, msgspec.MsgspecError) as error:
            log.warning("the link to the head that goes on has failed: %s", error)
        finally:
            self._end(link)
            over.set()

    def _end(self, link: _Link) -> None:
        link.writer.close()
        self._links.discard(link)
        self._leave(link)
        for queue in link.answers.values():
            queue.put_nowait(None)

    def _leave(self, link: _Link) -> None:
        if self._link is link:
            self._link = None
            self._linked.clear()

    def _hear(self, link: _Link, message: hand.OfFollowed) -> None:
        match message:
            case hand.Grown(event):
                followed = self._answers.get(event.id)
                if followed is None:
                    return
                known = followed.count - event.position
                if known < 0:
                    raise BadFrame(f"tokens of {event.id} are missing")
                tokens = event.tokens[known:]
                if not tokens and event.finish is None:
                    return
                followed.count += len(tokens)
                if event.finish is not None:
                    del self._answers[event.id]
                followed.stream.put(
                    Delta(
                        tokens=tokens,
                        logprobs=event.logprobs and event.logprobs[known:],
                        finish=event.finish,
                        degraded=event.degraded,
                        prompt_logprobs=None if known else event.prompt_logprobs,
                        cached=0 if known else event.cached,
                    )
                )
            case hand.AnswerFailed(id, error, request):
                followed = self._answers.pop(id, None)
                if followed is not None:
                    followed.stream.put((RequestError if request else FlexpertError)(error))
            case hand.Moved():
                link.moved = True
                self._leave(link)
            case hand.AnswerStart(number) | hand.AnswerBody(number) | hand.AnswerEnd(number):
                if number in link.answers:
                    link.answers[number].put_nowait(message)

    def _fail_all(self, error: FlexpertError) -> None:
        for followed in self._answers.values():
            followed.stream.put(error)
        self._answers.clear()

    # ---- requests -------------------------------------------------------------------------------

    async def forward(
        self, scope: Mapping[str, Any], receive: Any, tell: Any, body: Sequence[Piece] | None = None
    ) -> None:
        """Have a request answered by the head that goes on; as ASGI. body: all of it, if it has
        been read here.

        Raises: LinkLost: before its answer was whole.
        """
        self._waiting += 1
        try:
            await self._linked.wait()
        finally:
            self._waiting -= 1
        link = self._link
        if link is None:
            raise LinkLost(self._lost or "the head that goes on has ended")
        number = next(self._numbers)
        queue = link.answers[number] = asyncio.Queue()
        client = scope.get("client")
        request = hand.Request(
            number,
            scope["method"],
            scope["scheme"],
            scope["http_version"],
            scope["path"],
            scope.get("raw_path") or b"",
            scope["query_string"],
            [(bytes(name), bytes(value)) for name, value in scope["headers"]],
            tuple(client) if client else None,
        )
        send(link.writer, request)
        if body is not None:
            for piece in body:
                send(link.writer, hand.RequestBody(number, bytes(piece), more=True))
            send(link.writer, hand.RequestBody(number, b"", more=False))
        bringing = asyncio.ensure_future(self._bring(link, number, receive))
        try:
            while not isinstance(message := await queue.get(), hand.AnswerEnd):
                match message:
                    case hand.AnswerStart(_, status, headers):
                        start = {"status": status, "headers": headers}
                        await tell({"type": "http.response.start", **start})
                    case hand.AnswerBody(_, data, more):
                        part = {"body": data, "more_body": more}
                        await tell({"type": "http.response.body", **part})
                    case _:
                        raise LinkLost("the head that goes on has ended")
        finally:
            bringing.cancel()
            del link.answers[number]
            if link.moved and not link.answers:
                link.writer.close()

    async def _bring(self, link: _Link, number: int, receive: Any) -> None:
        """What the client still sends, and that it has gone."""
        while True:
            message = await receive()
            if message["type"] != "http.request":
                send(link.writer, hand.RequestGone(number))
                return
            more = message.get("more_body", False)
            data = bytes(message.get("body", b""))
            send(link.writer, hand.RequestBody(number, data, more))
            await link.writer.drain()
