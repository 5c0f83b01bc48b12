"""Where a head that serves is asked for its service, and by heads before it for their answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from flexpert.cluster.handover import messages as hand
from flexpert.cluster.handover.messages import Conversation, ConversationEnded
from flexpert.forking.framing import BadFrame

log = logging.getLogger("flexpert")

_PATIENCE_S = 5.0

OnAsk = Callable[[Conversation], Awaitable[None]]
OnFollow = Callable[[asyncio.StreamReader, asyncio.StreamWriter, hand.Follow], Awaitable[None]]


class HeadSocket:
    """In the state directory, for processes of the same user.

    on_ask: the next head; the conversation is closed when it returns. on_follow: a head that was
    taken over; likewise.

    Raises: OSError: it cannot be made.
    """

    def __init__(self, directory: Path, on_ask: OnAsk, on_follow: OnFollow) -> None:
        self._path = directory / hand.HEAD_SOCKET
        self._on_ask, self._on_follow = on_ask, on_follow
        self._tasks: set[asyncio.Task[None]] = set()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(self._path))  # nobody else comes into the directory
            self._listener.listen(16)
            self._listener.setblocking(False)
        except OSError:
            self._listener.close()
            raise
        self._accepting = asyncio.ensure_future(self._accept())

    def close(self, *, remove: bool) -> None:
        """Nobody else comes; those who are there stay. remove: the socket, too. Idempotent."""
        if self._accepting.cancelled() or self._listener.fileno() < 0:
            return
        self._accepting.cancel()
        self._listener.close()
        if remove:
            with contextlib.suppress(OSError):
                self._path.unlink()

    async def end(self) -> None:
        """Who is there is let go, too."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                channel, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # no descriptors are left
                log.error("a head cannot be heard: %s", error.strerror)
                await asyncio.sleep(1.0)
                continue
            if not hand.same_user(channel):
                channel.close()
                continue
            task = asyncio.create_task(self._hear(channel))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _hear(self, channel: socket.socket) -> None:
        conversation = Conversation(channel, _PATIENCE_S)
        try:
            first = hand.decode_first(await asyncio.to_thread(conversation.receive))
            if isinstance(first, hand.Ask):
                log.info("a head of flexpert %s asks for the service", first.version)
                await self._on_ask(conversation)
                return
            await asyncio.to_thread(conversation.send, hand.Following())
            channel.setblocking(False)
            reader, writer = await asyncio.open_unix_connection(sock=channel)
            try:
                await self._on_follow(reader, writer, first)
            finally:
                writer.close()
        except (ConversationEnded, TimeoutError, ConnectionError):
            pass  # it has gone
        except (BadFrame, msgspec.MsgspecError) as error:
            log.warning("another head was refused: %s", error)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(conversation.send, hand.Declined(str(error)))
        except Exception:
            log.exception("another head could not be answered")
        finally:
            conversation.close()


def readable(channel: socket.socket) -> asyncio.Future[None]:
    """Done when something has come, or the other side has gone."""
    loop = asyncio.get_running_loop()
    descriptor = os.dup(channel.fileno())
    future: asyncio.Future[None] = loop.create_future()

    def come() -> None:
        if not future.done():
            future.set_result(None)

    def over(_: object) -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)

    loop.add_reader(descriptor, come)
    future.add_done_callback(over)
    return future
