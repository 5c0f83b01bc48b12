"""The head's end of the control messages: one ROUTER, for those who proved themselves."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from flexpert.cluster import messages as msg

log = logging.getLogger("flexpert")


class Transport:
    """Carries commands to ranks and brings their reports; see `messages` for the two sockets.

    on_report(rank, report) is called for authenticated ranks only. Anything else is dropped with a
    warning, undecoded.
    """

    def __init__(self, on_report: Callable[[int, msg.Report], None]) -> None:
        self._on_report = on_report
        self.token = secrets.token_hex(16)
        # an abstract address: no file to leave behind
        self.endpoint = f"ipc://@flexpert-{secrets.token_hex(8)}"
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.LINGER, 500)
        self._proven: set[bytes] = set()
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._router.bind(self.endpoint)
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def send(self, rank: int, command: msg.Command) -> None:
        """Queue a command; one for a rank that is gone is dropped, its end is told elsewhere."""
        sending = self._router.send_multipart([str(rank).encode(), msg.encode(command)])
        asyncio.ensure_future(sending).add_done_callback(_note_undelivered)

    def forget(self, rank: int) -> None:
        """The rank's process is gone: whoever comes under its id must prove itself again."""
        self._proven -= {str(rank).encode(), f"{rank}!".encode()}

    async def stop(self) -> None:
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._router.close()
        self._context.term()

    async def _read(self) -> None:
        while True:
            identity, *frames = await self._router.recv_multipart()
            try:
                self._receive(identity, frames)
            except msgspec.MsgspecError as error:
                log.warning("dropped a malformed message from %r: %s", identity, error)

    def _receive(self, identity: bytes, frames: list[bytes]) -> None:
        name = identity.removesuffix(b"!")
        if len(frames) != 1 or not name.isdigit():
            log.warning("dropped a message from an unknown sender %r", identity)
            return
        if identity in self._proven:
            self._on_report(int(name), msg.decode_report(frames[0]))
            return
        report = msg.decode_report(frames[0])
        token = report.token if isinstance(report, msg.Hello | msg.Unable) else ""
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            log.warning("dropped a message from %r, which has not proved itself", identity)
            return
        if isinstance(report, msg.Unable):
            self._on_report(int(name), report)
            return
        self._proven.add(identity)
        if {name, name + b"!"} <= self._proven:  # both routes are known
            self._on_report(int(name), report)


def _note_undelivered(future: asyncio.Future[Any]) -> None:
    if not future.cancelled() and isinstance(future.exception(), zmq.ZMQError):
        log.debug("a command was not delivered: %s", future.exception())
