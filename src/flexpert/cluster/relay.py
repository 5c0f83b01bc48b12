"""A line between a rank and the head that can be cut on purpose; see `engine/faults.py`.

It stands in the rank's process and hands bytes on between the rank's sockets and the head's. While
it is cut it reads from neither side, as a network that loses every packet: what is said piles up
and arrives afterwards, in order. Windows are not touched: exchanges with peers go on.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time

_ABSTRACT = "ipc://@"
_CHUNK = 1 << 16


class Relay:
    """endpoint: where the rank's sockets connect instead of to the head."""

    def __init__(self, endpoint: str) -> None:
        """Raises: ValueError: the head listens on no abstract Unix socket. OSError"""
        if not endpoint.startswith(_ABSTRACT):
            raise ValueError(f"only a line to {_ABSTRACT}… can be cut, not one to {endpoint}")
        self._head = "\0" + endpoint.removeprefix(_ABSTRACT)
        name = f"flexpert-relay-{os.getpid()}"
        self.endpoint = _ABSTRACT + name
        self._cut_until = 0.0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + name)
        self._listener.listen()
        threading.Thread(target=self._run, name="relay", daemon=True).start()

    def cut(self, seconds: float) -> None:
        """From now on for so long, whatever was cut before."""
        self._cut_until = time.monotonic() + seconds

    def _run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._listener, selectors.EVENT_READ)
        while True:
            ready = selector.select()
            while (left_s := self._cut_until - time.monotonic()) > 0:
                time.sleep(left_s)
            for key, _ in ready:
                if key.data is None:
                    self._join(selector)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    _hand_on(selector, key.fileobj, key.data)

    def _join(self, selector: selectors.BaseSelector) -> None:
        """A line of its own for each of the rank's sockets."""
        near, _ = self._listener.accept()
        far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            far.connect(self._head)
        except OSError:  # the head is gone
            near.close()
            far.close()
            return
        selector.register(near, selectors.EVENT_READ, data=far)
        selector.register(far, selectors.EVENT_READ, data=near)


def _hand_on(
    selector: selectors.BaseSelector, source: socket.socket, target: socket.socket
) -> None:
    try:
        data = source.recv(_CHUNK)
        target.sendall(data)
    except OSError:
        data = b""
    if data:
        return
    for end in (source, target):
        with contextlib.suppress(KeyError, ValueError):  # the other end closed it in this round
            selector.unregister(end)
        end.close()
