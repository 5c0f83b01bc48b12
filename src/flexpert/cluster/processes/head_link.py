"""A rank's end of its connection to whichever head there is.

A rank of a service that could be resumed outlives its head. What the head before may not have
written down is kept, and told again to the next, which sends its connection through the fork server
(`fork_server.Reconnect`). While there is no head the rank goes on with what it has; nobody else is
told anything, since all that a new head needs beyond that follows from `Attached`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque

from flexpert.cluster.processes.child_connection import Connection, ConnectionEnded
from flexpert.engine import rank_protocol as msg


class HeadLink:
    """Reports to the head and commands from it, in order. `send` may be called from any thread,
    `receive` from one.

    Args:
        end: the connection that the rank was started with.
        keeper: where new connections come from, until it is closed: then none will come. None:
            without its head a rank is nothing.
    """

    def __init__(self, end: socket.socket, keeper: socket.socket | None) -> None:
        self._connection = Connection(end)
        self._keeper = keeper
        self._sending = threading.Lock()
        self._open = True
        self._next: Connection | None = None  # its head is not told of anything yet
        self._unpersisted: deque[msg.Published] = deque()
        self._persisted = 0  # of all `Published`

    @property
    def outlives_heads(self) -> bool:
        """Whether the rank goes on without one."""
        return self._keeper is not None

    def send(self, report: msg.Report) -> None:
        """Raises: ConnectionEnded: there is no head, and will be none."""
        if self._keeper is None:
            self._connection.send(msg.encode(report))
            return
        with self._sending:
            if isinstance(report, msg.Published):
                self._unpersisted.append(report)
            self._try(report)

    def receive(self) -> bytes:
        """The next command, however long that takes.

        Raises: ConnectionEnded: the head is gone, and no other will come.
        """
        while True:
            try:
                return (self._next or self._connection).receive()
            except ConnectionEnded:
                if self._keeper is None:
                    raise
                self._next = self._await_head(self._keeper)

    def persisted(self, count: int) -> None:
        """So many `Published` of this rank are written down where the next head finds them."""
        with self._sending:
            while self._persisted < count and self._unpersisted:
                self._unpersisted.popleft()
                self._persisted += 1

    def attached(self, hello: msg.Hello, sequences: list[str], blocks: bytes) -> None:
        """The new head is told what there is, and from now on everything."""
        with self._sending:
            if self._next is None:
                return  # it has gone again
            self._connection, self._next, self._open = self._next, None, True
            kept = list(self._unpersisted)
            self._try(msg.Attached(hello, sequences, self._persisted, kept, blocks))

    def close(self) -> None:
        self._connection.close()

    def _try(self, report: msg.Report) -> None:
        if self._open:
            try:
                self._connection.send(msg.encode(report))
            except ConnectionEnded:
                self._open = False

    def _await_head(self, keeper: socket.socket) -> Connection:
        with self._sending:
            self._open = False
        given: list[int] = []
        with contextlib.suppress(OSError):
            _, given, _, _ = socket.recv_fds(keeper, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not given:
            raise ConnectionEnded("no head has come in time (--orphan-timeout)")
        return Connection(socket.socket(fileno=given[0]))
