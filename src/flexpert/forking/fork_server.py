"""The process that others are forked from: what they need has been imported there already.

Started as `python -m flexpert.forking.fork_server FD`, where FD is one end of a socket pair of
packets. The first packet is a `Begin`; every request and answer is one packet. The server runs no
tensor operation and starts no thread, so that a fork is a whole process. It ends when the other end
of the socket closes, and its children end with it (PR_SET_PDEATHSIG), however it ends.

A fork that the system refuses (descriptors, processes, memory) is answered with the reason, and
costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import pkgutil
import selectors
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from flexpert.errors import FlexpertError

MODULE = "flexpert.forking.fork_server"
PACKET = 1 << 20  # bytes of the largest request or answer
_MOST_DESCRIPTORS = 8
_FOR_THE_STARTER = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


class Begin(msgspec.Struct, frozen=True):
    """The first packet.

    setup: "module:function" that imports what children need; called with `spec`, and what it
        returns is handed to each child. It may raise FlexpertError: the answer is `Unusable`.
    path: where modules are looked for; empty: as Python has it.
    """

    setup: str
    spec: bytes = b""
    path: list[str] = []


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Comes with descriptors of sockets for the child.

    child: a number that the asker chose.
    entry: "module:function", which gets `spec`, the sockets, and what the setup returned, and
        returns the exit status: `entry(spec: bytes, *ends: socket.socket, shared) -> int`.
    tells: the first descriptor is none of the child's: its exit status is written there as text,
        in place of an `Exited`.
    """

    child: int
    entry: str
    spec: bytes
    tells: bool = False


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """For an asker that had no descriptor left for the child's pidfd."""

    child: int


Request = Fork | Kill


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Everything is imported."""


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The setup failed; the fork server ends."""

    error: str


class Started(msgspec.Struct, frozen=True, tag="started"):
    """With it comes the child's pidfd, which means this process and no later one of its number."""

    child: int
    pid: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """There is no such process: the system would not have it."""

    child: int
    error: str


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """A child's process is gone and reaped. status: exit code, or minus the signal."""

    child: int
    pid: int
    status: int


Answer = Ready | Unusable | Started | Refused | Exited

decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
encode = msgspec.msgpack.encode


def start_server(
    theirs: socket.socket, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a server that is asked through the other end of a pair; `Begin` is still to be sent.

    environment: default: that of this process.

    Raises: OSError
    """
    # they reach the new process, too; it inherits that they are blocked
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_STARTER)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@dataclass(frozen=True, slots=True)
class _Child:
    """tells: where its exit status is written; -1: an `Exited` says it."""

    number: int
    pid: int
    tells: int


def main(descriptor: int) -> None:
    """Serve fork requests on the socket with this descriptor until it closes."""
    # Both are for who started this, and reach all its processes: Ctrl-C those of a terminal,
    # SIGTERM those of a unit or of a job. Who is to drain still needs its children.
    for number in _FOR_THE_STARTER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_STARTER)
    channel = socket.socket(fileno=descriptor)
    packet = channel.recv(PACKET)
    if not packet:
        return
    begin = msgspec.msgpack.decode(packet, type=Begin)
    if begin.path:
        sys.path[:] = begin.path
    try:
        shared = pkgutil.resolve_name(begin.setup)(begin.spec)
    except FlexpertError as error:
        _answer(channel, Unusable(str(error)))
        return
    gc.collect()
    gc.freeze()  # shared pages stay shared: the collector does not touch what was imported
    _answer(channel, Ready())
    _Server(channel, shared).run()


class _Server:
    def __init__(self, channel: socket.socket, shared: Any) -> None:
        self._channel = channel
        self._shared = shared
        self._selector = selectors.EpollSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}  # by pidfd

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._channel:
                    self._reap(key.fd)
                    continue
                try:
                    packet, given, flags, _ = socket.recv_fds(
                        self._channel, PACKET, _MOST_DESCRIPTORS
                    )
                except ConnectionResetError:  # it was closed before our last answer was read
                    return
                if not packet:
                    return
                request = decode_request(packet)
                if isinstance(request, Kill):
                    self._kill(request.child)
                else:
                    self._start(request, given, whole=not flags & socket.MSG_CTRUNC)

    def _kill(self, number: int) -> None:
        for pidfd, child in self._children.items():
            if child.number == number:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)

    def _start(self, request: Fork, given: list[int], *, whole: bool) -> None:
        """given: descriptors that came with the request, whole: all of them."""
        ends = given[1:] if request.tells else given
        started = False
        try:
            if not given or not whole:  # the kernel had none left to receive them
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            pid, pidfd = self._fork(request, ends, not_theirs=[*set(given) - set(ends)])
            started = True
        except OSError as error:
            _answer(self._channel, Refused(request.child, refusal(error)))
            return
        finally:
            for descriptor in ends if started else given:
                os.close(descriptor)
        self._children[pidfd] = _Child(request.child, pid, given[0] if request.tells else -1)
        self._selector.register(pidfd, selectors.EVENT_READ)
        _answer(self._channel, Started(request.child, pid), pidfd)

    def _fork(self, request: Fork, ends: list[int], not_theirs: list[int]) -> tuple[int, int]:
        """Pid and pidfd of a new child; in the child it does not return.

        Raises: OSError: the system refuses; there is no child.
        """
        pid = os.fork()
        if pid == 0:
            tells = [child.tells for child in self._children.values() if child.tells >= 0]
            own = [self._channel.fileno(), self._selector.fileno(), *self._children, *tells]
            _run(request, ends, self._shared, [*own, *not_theirs])
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)  # ours, and not reaped yet: the number is its own
            os.waitpid(pid, 0)
            raise

    def _reap(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        os.close(pidfd)
        child = self._children.pop(pidfd)
        _, waited = os.waitpid(child.pid, 0)
        status = os.waitstatus_to_exitcode(waited)
        if child.tells < 0:
            _answer(self._channel, Exited(child.number, child.pid, status))
            return
        with contextlib.suppress(BrokenPipeError):  # nobody wants to know
            os.write(child.tells, b"%d" % status)
        os.close(child.tells)


def _run(request: Fork, ends: list[int], shared: Any, not_ours: list[int]) -> NoReturn:
    status = 1
    try:
        _end_with_parent()
        for descriptor in not_ours:
            os.close(descriptor)
        entry = pkgutil.resolve_name(request.entry)
        status = entry(request.spec, *(socket.socket(fileno=end) for end in ends), shared)
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):  # nobody may read what it says any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def refusal(error: OSError) -> str:
    """Why there is no new process, and what to do about it."""
    remedy = {
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.ENFILE: "the machine has no open files left (fs.file-max)",
        errno.EAGAIN: "raise the limit of processes (ulimit -u, pids.max of its cgroup)",
        errno.ENOMEM: "there is not enough memory for another process",
    }.get(error.errno or 0, "")
    return f"no process can be started: {error.strerror}" + (f"; {remedy}" if remedy else "")


def _answer(channel: socket.socket, answer: Answer, *descriptors: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the other end is gone; the next read says so
        socket.send_fds(channel, [encode(answer)], descriptors)


def _end_with_parent() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and Triton 3.9 would complain on the way out
