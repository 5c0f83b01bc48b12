"""Starts processes that begin with torch imported, within milliseconds, and ends them.

They are forks of one process that is started at the first use, with the environment of that
moment, and ends with this one: however this one ends, nothing is left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pkgutil
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from flexpert.bench.processes import connection as connections
from flexpert.bench.processes.connection import StreamConnection
from flexpert.errors import FlexpertError
from flexpert.forking import fork_server
from flexpert.forking.fork_server import Begin, Fork, Ready, Refused, Started

_PRELOAD = ["torch", "torch.distributed", "flexpert.comm", "flexpert.bench.processes.socket_store"]
_START_S = 120.0  # torch from a cold disk


class Process:
    """A process, and this end of a connection to it.

    It is signalled through a descriptor of its own: its number may belong to another by then.
    """

    def __init__(self, pid: int, pidfd: int, status: int, connection: StreamConnection) -> None:
        self.pid = pid
        self.connection = connection
        self._pidfd, self._status = pidfd, status
        self._exitcode: int | None = None
        self._ended = False

    @property
    def ending(self) -> int:
        """A descriptor that can be read when it has ended. For `poll`, until `end`."""
        return self._status

    @property
    def exitcode(self) -> int | None:
        """Of one that has ended, minus the signal that ended it; None if nobody knows."""
        return self._exitcode

    def alive(self) -> bool:
        return not self.join(0.0)

    def join(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended within the time."""
        if not self._ended and connections.readable(self._status, timeout_s):
            text = os.read(self._status, 16)
            self._exitcode = int(text) if text else None  # nothing: the fork server is gone, too
            self._ended = True
        return self._ended

    def signal(self, number: int) -> None:
        """Nothing if it has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def end(self) -> None:
        """Kill it and wait until it is gone. Idempotent."""
        if self._pidfd < 0:
            return
        self.signal(signal.SIGKILL)
        self.join()
        self.connection.close()
        os.close(self._pidfd)
        os.close(self._status)
        self._pidfd = -1


class _Server:
    """Raises: OSError: it cannot be started, is gone, or does not answer."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = fork_server.start_server(theirs)
        ours.settimeout(_START_S)
        self._connection = ours
        ours.send(fork_server.encode(Begin(f"{__name__}:preload", path=sys.path)))
        self._ready = False

    def fork(
        self, request: Fork, descriptors: Sequence[int]
    ) -> tuple[Started | Refused, list[int]]:
        """The answer, and the descriptor that came with it.

        Raises: OSError: the server is gone, or does not answer.
        """
        if not self._ready:
            answer, _ = self._answer()
            if not isinstance(answer, Ready):
                raise ConnectionResetError
            self._ready = True
        socket.send_fds(self._connection, [fork_server.encode(request)], list(descriptors))
        answer, given = self._answer()
        if not isinstance(answer, Started | Refused):
            raise ConnectionResetError
        return answer, given

    def _answer(self) -> tuple[fork_server.Answer, list[int]]:
        packet, given, _, _ = socket.recv_fds(self._connection, fork_server.PACKET, 1)
        if not packet:
            raise ConnectionResetError
        return fork_server.decode_answer(packet), given

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def preload(spec: bytes) -> None:
    """What the fork server imports."""
    for module in _PRELOAD:
        importlib.import_module(module)


def call(function: bytes, *given: Any) -> int:
    """What a forked process does: calls a function with its sockets."""
    *ends, _ = given
    pkgutil.resolve_name(function.decode())(*ends)
    return 0


_lock = threading.Lock()
_server: _Server | None = None


@atexit.register
def _close() -> None:
    """It would end by itself, but stay a zombie where nobody reaps those of others."""
    if _server is not None:
        _server.close()


def start(function: str, *given: socket.socket) -> Process:
    """A process that calls a function with its end of a connection, as a socket, and what is given.

    Args:
        function: "package.module:name"; the process ends when it returns.
        given: sockets that the process has from now on; they are closed here.

    Raises: FlexpertError: it cannot be started; says why.
    """
    with contextlib.ExitStack() as stack:
        for end in given:
            stack.enter_context(end)
        ours, theirs = connections.pair()
        stack.enter_context(theirs)
        status, written = os.pipe()
        stack.callback(os.close, written)
        try:
            descriptors = [written, theirs.fileno(), *(end.fileno() for end in given)]
            request = Fork(0, f"{__name__}:call", function.encode(), tells=True)
            answer, came = _fork(request, descriptors)
            if isinstance(answer, Refused):
                raise FlexpertError(answer.error)
        except BaseException:
            ours.close()
            os.close(status)
            raise
    return Process(answer.pid, came[0], status, StreamConnection(ours))


def _fork(request: Fork, descriptors: Sequence[int]) -> tuple[Started | Refused, list[int]]:
    global _server
    with _lock:
        for _ in range(2):  # the server may have ended since it was last asked
            server = _server or _Server()
            _server = None  # until it has answered: an answer under way would be taken for the next
            try:
                answer = server.fork(request, descriptors)
            except TimeoutError:
                server.close()
                raise FlexpertError(f"torch was not imported within {_START_S:.0f} s") from None
            except ConnectionError:
                server.close()
            except BaseException:
                server.close()
                raise
            else:
                _server = server
                return answer
    raise FlexpertError("no process can be started: the fork server ends as soon as it begins")
