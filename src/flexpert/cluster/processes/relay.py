"""A connection between a rank and the head that can be cut on purpose; see `engine/faults.py`.

It stands in the rank's process and hands bytes on between the rank and the head. While it is cut it
reads from neither side, as a network that loses every packet: what is said piles up and arrives
afterwards, in order. Windows are not touched: exchanges with peers go on.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time

_CHUNK = 1 << 16
_BUFFER = 1 << 22  # bytes that pile up on each side of a cut before its sender notices


class Relay:
    """end: the rank's end of its connection to the head. near: what the rank uses instead."""

    def __init__(self, end: socket.socket) -> None:
        self._cut_until = 0.0
        self.near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for one in (self.near, far, end):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        threading.Thread(target=self._run, args=(far, end), name="relay", daemon=True).start()

    def cut(self, seconds: float) -> None:
        """From now on for so long, whatever was cut before."""
        self._cut_until = time.monotonic() + seconds

    def _run(self, rank: socket.socket, head: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(rank, selectors.EVENT_READ, data=head)
            selector.register(head, selectors.EVENT_READ, data=rank)
            while selector.get_map():
                ready = selector.select()
                while (left_s := self._cut_until - time.monotonic()) > 0:
                    time.sleep(left_s)
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    if not _hand_on(key.fileobj, key.data):
                        selector.unregister(key.fileobj)


def _hand_on(source: socket.socket, target: socket.socket) -> bool:
    """False: the source says no more; the target hears so."""
    try:
        data = source.recv(_CHUNK)
        target.sendall(data)
    except OSError:
        data = b""
    if not data:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
    return bool(data)
