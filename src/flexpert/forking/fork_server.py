"""The process that others are forked from: what they need has been imported there already.

Started as `python -m flexpert.forking.fork_server FD`, where FD is one end of a socket pair of
packets. The first packet is a `Begin`; every request and answer is one packet. The server runs no
tensor operation and starts no thread, so that a fork is a whole process. It ends when the other end
of the socket closes, and its children end with it (PR_SET_PDEATHSIG), however it ends.

Unless it is to be kept (`Keep`): then it listens on a socket in a directory of its user's own, and
who connects there after the asker has gone is the next asker. It is told which children there are,
and gives each that is asked for a new connection over a channel that the child has had from its
fork on (`Reconnect`). Where nobody comes, children end by themselves, and the server after them.

A fork that the system refuses (descriptors, processes, memory) is answered with the reason, and
costs nobody else anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import logging
import os
import pkgutil
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from flexpert.errors import FlexpertError
from flexpert.forking.framing import PROTOCOL

MODULE = "flexpert.forking.fork_server"
PACKET = 1 << 20  # bytes of the largest request or answer
_MOST_DESCRIPTORS = 8
_MOST_LOGGED = 2**14  # characters of a line
_GRACE_S = 5.0  # in which children that have waited in vain may end by themselves
_PEER = struct.Struct("3i")  # SO_PEERCRED: process, user, group
_FOR_THE_STARTER = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1


class Keep(msgspec.Struct, frozen=True):
    """The server outlives who asks it. path: of the socket on which it listens for the next; "": on
    none, it gives children new connections as long as there is the one. timeout_s: how long it and
    its children wait for the next."""

    path: str
    timeout_s: float


class Begin(msgspec.Struct, frozen=True):
    """The first packet.

    setup: "module:function" that imports what children need; called with `spec`, and what it
        returns is handed to each child. It may raise FlexpertError: the answer is `Unusable`.
    path: where modules are looked for; empty: as Python has it.
    log_level: least severity, in capitals, of what is logged meanwhile and told (`Logged`); empty:
        nothing is told.
    """

    setup: str
    spec: bytes = b""
    path: list[str] = []
    keep: Keep | None = None
    log_level: str = ""


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Comes with descriptors of sockets for the child.

    child: a number that the asker chose.
    entry: "module:function", which gets `spec`, the sockets, and what the setup returned, and
        returns the exit status: `entry(spec: bytes, *ends: socket.socket, shared) -> int`.
    tells: the first descriptor is none of the child's: its exit status is written there as text,
        in place of an `Exited`.
    kept: it goes on without who asked for it: it gets one more socket, the last, on which
        `Reconnect` hands it another connection. That is closed when none will come any more.
    shares: what the entry needs is imported in the server, the first time, and all later children
        share its memory; to import it must start no thread.
    """

    child: int
    entry: str
    spec: bytes
    tells: bool = False
    kept: bool = False
    shares: bool = False


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """For an asker that had no descriptor left for the child's pidfd."""

    child: int


class Reconnect(msgspec.Struct, frozen=True, tag="reconnect"):
    """Comes with the descriptor of a new connection for a child that is kept."""

    child: int


Request = Fork | Kill | Reconnect


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Everything is imported."""


class Logged(msgspec.Struct, frozen=True, tag="logged"):
    """A line of the log of the setup, before its end is told. level: as `logging` numbers it."""

    level: int
    logger: str
    text: str


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """To an asker that has come later, before anything else. Then come a `Started` for each child
    that lives, and `Ready`.

    protocol: see `framing.PROTOCOL`; where it is another, nothing else is to be read.
    """

    protocol: int
    pid: int


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The setup failed; the fork server ends. kind: name of a class of `flexpert.errors`."""

    error: str
    kind: str = "ModelError"


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


Answer = Ready | Logged | Taken | Unusable | Started | Refused | Exited

decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
encode = msgspec.msgpack.encode


def start_server(
    theirs: socket.socket, environment: dict[str, str] | None = None, *, preload: str = ""
) -> subprocess.Popen[bytes]:
    """Start a server that is asked through the other end of a pair; `Begin` is still to be sent.

    environment: default: that of this process.
    preload: "module:function" that it calls before it hears of anything; until then it ends with
        the thread that has started it.

    Raises: OSError
    """
    # they reach the new process, too; it inherits that they are blocked
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_STARTER)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno()), *([preload] if preload else [])],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@dataclass(frozen=True, slots=True)
class _Child:
    """tells: where its exit status is written; -1: an `Exited` says it. keeper: our end of the
    channel to a child that is kept."""

    number: int
    pid: int
    tells: int
    keeper: socket.socket | None = None


def main(descriptor: int, preload: str = "") -> None:
    """Serve fork requests on the socket with this descriptor until it closes. preload: see
    `start_server`."""
    # Both are for who started this, and reach all its processes: Ctrl-C those of a terminal,
    # SIGTERM those of a unit or of a job. Who is to drain still needs its children.
    for number in _FOR_THE_STARTER:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_STARTER)
    channel = socket.socket(fileno=descriptor)
    gc.disable()  # what is imported stays, and is walked again and again meanwhile
    if preload:
        _end_with_parent()
        pkgutil.resolve_name(preload)()
    packet = channel.recv(PACKET)
    if not packet:
        return
    begin = msgspec.msgpack.decode(packet, type=Begin)
    if begin.path:
        sys.path[:] = begin.path
    if begin.keep is not None and begin.keep.path:
        os.setsid()  # what ends the session of who has started it does not end this
    _set_parent_death_signal(0)
    try:
        with _telling(channel, begin.log_level):
            shared = pkgutil.resolve_name(begin.setup)(begin.spec)
    except FlexpertError as error:
        _answer(channel, Unusable(str(error), type(error).__name__))
        return
    gc.enable()
    gc.freeze()  # shared pages stay shared: the collector does not touch what was imported
    listener = _listen(begin.keep) if begin.keep and begin.keep.path else None
    _answer(channel, Ready())
    _Server(channel, shared, begin.keep, listener).run()


class _Teller(logging.Handler):
    """Hands lines of the log on to who reads the channel."""

    def __init__(self, channel: socket.socket) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)[:_MOST_LOGGED]
        _answer(self._channel, Logged(record.levelno, record.name, text))


@contextlib.contextmanager
def _telling(channel: socket.socket, level: str) -> Iterator[None]:
    if not level:
        yield
        return
    root, teller = logging.getLogger(), _Teller(channel)
    before = root.level
    root.addHandler(teller)
    root.setLevel(level)
    try:
        yield
    finally:
        root.removeHandler(teller)
        root.setLevel(before)


def _listen(keep: Keep) -> socket.socket:
    """On a socket in the file system that nobody but this user may connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(keep.path)
    before = os.umask(0o177)
    try:
        listener.bind(keep.path)
    finally:
        os.umask(before)
    listener.listen(4)
    return listener


class _Server:
    """channel: None while nobody asks. alone_until: then, when it ends, of the monotonic clock."""

    def __init__(
        self,
        channel: socket.socket,
        shared: Any,
        keep: Keep | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self._channel: socket.socket | None = channel
        self._shared = shared
        self._keep = keep
        self._listener = listener
        self._alone_until = 0.0
        self._selector = selectors.EpollSelector()
        self._selector.register(channel, selectors.EVENT_READ)
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ)
        self._children: dict[int, _Child] = {}  # by pidfd

    def run(self) -> None:
        while self._channel is not None or self._waits():
            left_s = None if self._channel else max(0.0, self._alone_until - time.monotonic())
            for key, _ in self._selector.select(left_s):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._channel:
                    self._hear(self._channel)
                else:
                    self._reap(key.fd)
        if self._keep is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._keep.path)
            self._end_children()

    def _end_children(self) -> None:
        """Nobody has come for them: they may end by themselves, for a while."""
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        for child in self._children.values():
            if child.keeper is not None:
                child.keeper.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _GRACE_S
        while self._children and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left_s):
                self._reap(key.fd)

    def _waits(self) -> bool:
        """Whether somebody may still come: there are children, and their time is not over."""
        return self._keep is not None and (
            bool(self._children) and time.monotonic() < self._alone_until
        )

    def _hear(self, channel: socket.socket) -> None:
        try:
            packet, given, flags, _ = socket.recv_fds(channel, PACKET, _MOST_DESCRIPTORS)
        except ConnectionResetError:  # it was closed before our last answer was read
            packet, given, flags = b"", [], 0
        if not packet:
            self._selector.unregister(channel)
            channel.close()
            self._channel = None
            if self._keep is not None:
                self._alone_until = time.monotonic() + self._keep.timeout_s
            return
        request = decode_request(packet)
        if isinstance(request, Kill):
            self._kill(request.child)
        elif isinstance(request, Reconnect):
            self._attach(request.child, given)
        else:
            self._start(request, given, whole=not flags & socket.MSG_CTRUNC)

    def _accept(self) -> None:
        """The next asker, if there is none and it is the same user's."""
        assert self._listener is not None
        try:
            channel, _ = self._listener.accept()
        except OSError:  # it has gone again, or there is no descriptor for it: it may try again
            return
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        _, user, _ = _PEER.unpack(credentials)
        if user != os.geteuid():
            channel.close()
            return
        if self._channel is not None:
            _answer(channel, Unusable("another head has these ranks; it runs"))
            channel.close()
            return
        self._channel = channel
        self._selector.register(channel, selectors.EVENT_READ)
        _answer(channel, Taken(PROTOCOL, os.getpid()))
        for pidfd, child in self._children.items():
            _answer(channel, Started(child.number, child.pid), pidfd)
        _answer(channel, Ready())

    def _attach(self, number: int, given: list[int]) -> None:
        """Hand a child its new connection; one that is gone is told as such anyway."""
        for child in self._children.values():
            if child.number == number and child.keeper is not None:
                with contextlib.suppress(OSError):
                    socket.send_fds(child.keeper, [b"a"], given)
        for descriptor in given:
            os.close(descriptor)

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
            keeper = theirs = None
            if request.kept and self._keep is not None:
                keeper, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                ends = [*ends, theirs.detach()]
            not_theirs = [*set(given) - set(ends)]
            if keeper is not None:
                not_theirs.append(keeper.fileno())
            if request.shares:
                _import(request.entry)
            pid, pidfd = self._fork(request, ends, not_theirs)
            started = True
        except OSError as error:
            self._tell(Refused(request.child, refusal(error)))
            return
        finally:
            for descriptor in ends if started else {*given, *ends}:
                os.close(descriptor)
        told = given[0] if request.tells else -1
        self._children[pidfd] = _Child(request.child, pid, told, keeper)
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._tell(Started(request.child, pid), pidfd)

    def _tell(self, answer: Answer, *descriptors: int) -> None:
        """The asker, if there is one; the next is told who lives."""
        if self._channel is not None:
            _answer(self._channel, answer, *descriptors)

    def _fork(self, request: Fork, ends: list[int], not_theirs: list[int]) -> tuple[int, int]:
        """Pid and pidfd of a new child; in the child it does not return.

        Raises: OSError: the system refuses; there is no child.
        """
        with warnings.catch_warnings():
            # libraries have threads of their own here, which hold no lock that a child needs
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            pid = os.fork()
        if pid == 0:
            tells = [child.tells for child in self._children.values() if child.tells >= 0]
            keepers = [c.keeper.fileno() for c in self._children.values() if c.keeper]
            asked = [one.fileno() for one in (self._channel, self._listener) if one is not None]
            own = [*asked, self._selector.fileno(), *self._children, *tells, *keepers]
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
        if child.keeper is not None:
            child.keeper.close()
        if child.tells < 0:
            self._tell(Exited(child.number, child.pid, status))
            return
        with contextlib.suppress(BrokenPipeError):  # nobody wants to know
            os.write(child.tells, b"%d" % status)
        os.close(child.tells)


def _import(entry: str) -> None:
    """What it needs stays here; what is wrong with it, the child says."""
    before = len(sys.modules)
    with contextlib.suppress(Exception):
        pkgutil.resolve_name(entry)
    if len(sys.modules) != before:
        gc.freeze()


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
    _set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _set_parent_death_signal(number: int) -> None:
    """0: none."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and Triton 3.9 would complain on the way out
