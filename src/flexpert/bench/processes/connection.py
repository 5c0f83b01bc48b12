"""Whole messages, in order, between two processes that share a socket pair."""

from __future__ import annotations

import select
import socket
import time
from collections import deque

from flexpert.errors import FlexpertError
from flexpert.forking.framing import BadFrame, Deframer, frame

_MOST = 1 << 28  # bytes of a message; the logits of a model are some megabytes
_PIECE = 1 << 18


class Closed(FlexpertError):  # noqa: N818 - says what happened
    """The other side is gone, or does not speak as it should."""


class StreamConnection:
    """One end. Not for several threads at once."""

    def __init__(self, end: socket.socket) -> None:
        """end: of a socket pair of streams; it belongs to the connection from now on."""
        self._socket = end
        self._deframer = Deframer(_MOST)
        self._received: deque[bytes] = deque()

    def send(self, packet: bytes) -> None:
        """Raises: Closed"""
        try:
            self._socket.sendall(frame(packet))
        except OSError as error:
            raise Closed(f"the other process is gone ({error.strerror})") from None

    def receive(self, timeout_s: float | None = None) -> bytes:
        """The next message. Raises: Closed; TimeoutError: what has come of it so far is kept."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._received:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not readable(self._socket, left_s):
                raise TimeoutError(f"no message within {timeout_s} s")
            self._fill()
        return self._received.popleft()

    def _fill(self) -> None:
        """Read what is there, at least a byte. Raises: Closed"""
        try:
            piece = self._socket.recv(_PIECE)
        except ConnectionError:  # it ended with messages unread
            piece = b""
        if not piece:
            raise Closed("the other process is gone")
        try:
            self._received.extend(self._deframer.feed(piece))
        except BadFrame as error:
            raise Closed(f"the other process does not speak as it should: {error}") from None

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def __enter__(self) -> StreamConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends. Neither is inherited by a program that is started, unless it is handed on."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def readable(end: socket.socket | int, timeout_s: float | None) -> bool:
    """Whether something, or the end, can be read within the time. Takes any descriptor number."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1e3))
