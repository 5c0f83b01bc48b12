"""The process that ranks are forked from: it has imported torch and transformers already.

Started by the launcher as `python -m flexpert.cluster.processes.fork_server FD`, where FD is one
end of a socket pair. It runs no tensor operation and starts no thread, so that a fork is a whole
process. Requests and answers are one packet each; with a request comes the descriptor of the new
process's connection to the head. It ends when the head's end of the socket closes, and its children
end with it (PR_SET_PDEATHSIG), however it ends.

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
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import msgspec

if TYPE_CHECKING:
    from flexpert.models.source import ModelSource

_PACKET = 1 << 20
_PR_SET_PDEATHSIG = 1


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """child: a number of the launcher's. entry: "module:function" that the child runs.

    The function gets spec, its end of a connection to the head and the model, and returns the exit
    status: `entry(spec: bytes, end: socket.socket, source: ModelSource) -> int`.
    """

    child: int
    entry: str
    spec: bytes


class Kill(msgspec.Struct, frozen=True, tag="kill"):
    """Sent by a launcher that had no descriptor left for the child's pidfd."""

    child: int


Request = Fork | Kill


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Everything is imported."""


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The model cannot be opened; the fork server ends."""

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


def main(descriptor: int) -> None:
    """Serve fork requests on the socket with this descriptor until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = socket.socket(fileno=descriptor)
    config = channel.recv(_PACKET).decode()
    if not config:
        return
    from flexpert.cluster.processes.rank_process import open_model
    from flexpert.errors import FlexpertError

    try:
        source = open_model(config)
    except FlexpertError as error:
        _answer(channel, Unusable(str(error)))
        return
    gc.collect()
    gc.freeze()  # shared pages stay shared: the collector does not touch what was imported
    _answer(channel, Ready())

    selector = selectors.EpollSelector()
    selector.register(channel, selectors.EVENT_READ)
    children: dict[int, tuple[int, int]] = {}  # pidfd → number and pid
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                packet, descriptors, _, _ = socket.recv_fds(channel, _PACKET, 1)
                if not packet:
                    return
                request = decode_request(packet)
                if isinstance(request, Kill):
                    for pidfd, (child, _) in children.items():
                        if child == request.child:
                            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    continue
                not_theirs = [channel.fileno(), selector.fileno(), *children]
                try:
                    pid, pidfd = _fork(request, descriptors, source, not_theirs)
                except OSError as error:
                    _answer(channel, Refused(request.child, refusal(error)))
                    continue
                children[pidfd] = request.child, pid
                selector.register(pidfd, selectors.EVENT_READ)
                _answer(channel, Started(request.child, pid), pidfd)
            else:
                selector.unregister(key.fd)
                os.close(key.fd)
                child, pid = children.pop(key.fd)
                _, status = os.waitpid(pid, 0)
                _answer(channel, Exited(child, pid, os.waitstatus_to_exitcode(status)))


def _fork(
    request: Fork, descriptors: list[int], source: ModelSource, not_ours: list[int]
) -> tuple[int, int]:
    """Pid and pidfd of a new child; in the child it does not return.

    descriptors: of the child's end of its connection. not_ours: what the child has no use for.
    Raises: OSError: the system refuses; there is no child.
    """
    try:
        if not descriptors:  # the kernel had none left to receive it
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        pid = os.fork()
        if pid == 0:
            _run(request, descriptors[0], source, not_ours)
        try:
            return pid, os.pidfd_open(pid)
        except OSError:
            os.kill(pid, signal.SIGKILL)  # ours, and not reaped yet: the number is its own
            os.waitpid(pid, 0)
            raise
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _run(request: Fork, end: int, source: ModelSource, not_ours: list[int]) -> NoReturn:
    status = 1
    try:
        _end_with_parent()
        for descriptor in not_ours:
            os.close(descriptor)
        entry = pkgutil.resolve_name(request.entry)
        status = entry(request.spec, socket.socket(fileno=end), source)
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
    with contextlib.suppress(BrokenPipeError):  # the head is gone; the next read says so
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
