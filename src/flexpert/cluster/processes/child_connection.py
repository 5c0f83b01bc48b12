"""A child process's end of its connection to the head: one half of a socket pair.

The pair is made by the head and handed over at the fork (`flexpert.forking.fork_server`). It has no
name, so nobody else can connect to either end, read from it or fill it.
"""

from __future__ import annotations

import collections
import socket
import threading

from flexpert.errors import FlexpertError
from flexpert.forking.framing import Deframer, frame

_CHUNK = 1 << 18
_MOST_UNSENT = 64 * 2**20  # bytes a head that does not read may leave in this process


class ConnectionEnded(FlexpertError):  # noqa: N818
    """The other end is closed, or does not read: the head is gone or wants nothing any more."""


class Connection:
    """Messages in order, both ways. `send` may be called from any thread, `receive` from one.

    A sender does not wait for the head: what the socket has no room for is sent by a thread that
    starts when it is first needed.
    """

    def __init__(self, end: socket.socket, most_unsent: int = _MOST_UNSENT) -> None:
        end.setblocking(True)
        self._socket = end
        self._deframer = Deframer()
        self._received: collections.deque[bytes] = collections.deque()
        self._most_unsent = most_unsent
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._unsent_bytes = 0
        self._sending = threading.Condition()
        self._sender: threading.Thread | None = None
        self._ended = False

    def send(self, message: bytes) -> None:
        """Raises: ConnectionEnded"""
        data = memoryview(frame(message))
        with self._sending:
            if self._ended:
                raise ConnectionEnded("the connection to the head has ended")
            if not self._unsent:
                data = data[self._send_now(data) :]
            if not data:
                return
            if self._unsent_bytes + len(data) > self._most_unsent:
                raise ConnectionEnded(
                    f"the head has left {self._unsent_bytes} bytes unread, it does not take more"
                )
            self._unsent.append(data)
            self._unsent_bytes += len(data)
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_rest, name="sender", daemon=True)
                self._sender.start()
            self._sending.notify_all()

    def receive(self) -> bytes:
        """The next message, however long that takes.

        Raises: ConnectionEnded
        """
        while not self._received:
            try:
                data = self._socket.recv(_CHUNK)
            except OSError:
                data = b""
            if not data:
                raise ConnectionEnded("the head has closed the connection")
            self._received.extend(self._deframer.feed(data))
        return self._received.popleft()

    def close(self, timeout_s: float = 1.0) -> None:
        """Send what is unsent, as far as the head takes it in time."""
        with self._sending:
            self._sending.wait_for(lambda: self._ended or not self._unsent, timeout_s)
            self._ended = True
            self._sending.notify_all()
        self._socket.close()

    def _send_now(self, data: memoryview) -> int:
        """Bytes that went without waiting."""
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._ended = True
            raise ConnectionEnded(f"the head cannot be told: {error.strerror}") from None

    def _send_rest(self) -> None:
        while True:
            with self._sending:
                self._sending.wait_for(lambda: self._unsent or self._ended)
                if self._ended:
                    return
                data = self._unsent[0]
            try:
                sent = self._socket.send(data, socket.MSG_NOSIGNAL)  # waits
            except OSError:
                sent = -1
            with self._sending:
                if sent < 0:
                    self._ended = True
                    self._unsent.clear()
                elif sent == len(data):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = data[sent:]
                self._unsent_bytes -= max(sent, 0)
                self._sending.notify_all()
                if self._ended:
                    return
