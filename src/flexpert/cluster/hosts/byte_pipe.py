"""One end of a rank's socket pair on an asyncio loop: its bytes, both ways, without waiting."""

from __future__ import annotations

import asyncio
import collections
import socket
from collections.abc import Callable

from flexpert.cluster.hosts.curve_socket import PIECE

_MOST_UNSENT = 64 * 2**20


class BytePipe:
    """on_data(bytes): something was read. on_end(): the other end is closed, or does not read."""

    def __init__(
        self, end: socket.socket, on_data: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        end.setblocking(False)
        self._end = end
        self._on_data = on_data
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._unsent: collections.deque[memoryview] = collections.deque()
        self._unsent_bytes = 0
        self._closes = False
        self._loop.add_reader(end, self._readable)

    def write(self, data: bytes) -> None:
        if self._closed or self._closes:
            return
        self._unsent.append(memoryview(data))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > _MOST_UNSENT:
            self._finish()
            return
        self._writable()

    def close(self) -> None:
        """Nothing is read any more; what was written still goes out. Idempotent."""
        self._closes = True
        if not self._closed:
            self._loop.remove_reader(self._end)
        if not self._unsent:
            self._shut()

    @property
    def drained(self) -> bool:
        """Whether all that was written has gone out, or will never."""
        return self._closed or not self._unsent

    @property
    def _closed(self) -> bool:
        return self._end.fileno() < 0

    def _readable(self) -> None:
        try:
            data = self._end.recv(PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._on_data(data)
        else:
            self._finish()

    def _writable(self) -> None:
        while self._unsent:
            data = self._unsent[0]
            try:
                sent = self._end.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._loop.add_writer(self._end, self._writable)
                return
            except OSError:
                self._unsent.clear()
                break
            self._unsent_bytes -= sent
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = data[sent:]
        self._unsent_bytes = 0
        self._loop.remove_writer(self._end)
        if self._closes:
            self._shut()

    def _finish(self) -> None:
        self._shut()
        self._on_end()

    def _shut(self) -> None:
        if not self._closed:
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
            self._end.close()
        self._unsent.clear()
