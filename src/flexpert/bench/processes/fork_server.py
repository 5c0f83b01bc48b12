"""The process that other processes of a measurement are forked from: torch is imported once.

`python -m flexpert.bench.processes.fork_server DESCRIPTOR`, with one end of a socket pair, over
which `forks.py` asks. It ends when the other end closes, and all that it forked with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback

import msgspec

PACKET = 1 << 17
_PR_SET_PDEATHSIG = 1
_MOST_DESCRIPTORS = 8


class Begin(msgspec.Struct, frozen=True):
    """The first packet. path: where modules are looked for; preload: modules to import."""

    path: list[str]
    preload: list[str]


class Fork(msgspec.Struct, frozen=True):
    """Comes with descriptors: where its exit status is written, then what the function is given.

    function: "package.module:name"; called with a socket for each of the other descriptors.
    """

    function: str


class Forked(msgspec.Struct, frozen=True):
    """Comes with a pidfd. error: why there is no process."""

    pid: int = 0
    error: str = ""


encode = msgspec.msgpack.encode


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    channel = socket.socket(fileno=descriptor)
    packet = channel.recv(PACKET)
    if not packet:
        return
    begin = msgspec.msgpack.decode(packet, type=Begin)
    sys.path[:] = begin.path
    for module in begin.preload:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # shared pages stay shared
    _serve(channel)


def _serve(channel: socket.socket) -> None:
    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    running: dict[int, tuple[int, int]] = {}  # pidfd → pid, where its status goes
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                packet, given, flags, _ = socket.recv_fds(channel, PACKET, _MOST_DESCRIPTORS)
                if not packet:
                    return
                request = msgspec.msgpack.decode(packet, type=Fork)
                try:
                    if flags & socket.MSG_CTRUNC:
                        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                    pid, pidfd = _fork()
                except OSError as error:
                    for number in given:
                        os.close(number)
                    _answer(channel, Forked(error=error.strerror or str(error)), [])
                    continue
                if pid == 0:
                    selector.close()
                    channel.close()
                    for other, (_, theirs) in running.items():
                        os.close(other)
                        os.close(theirs)
                    os.close(given[0])
                    _run(request.function, given[1:])
                for number in given[1:]:
                    os.close(number)
                running[pidfd] = (pid, given[0])
                selector.register(pidfd, selectors.EVENT_READ)
                _answer(channel, Forked(pid), [pidfd])
            else:
                selector.unregister(key.fd)
                os.close(key.fd)
                pid, theirs = running.pop(key.fd)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):  # nobody wants to know
                    os.write(theirs, b"%d" % os.waitstatus_to_exitcode(status))
                os.close(theirs)


def _fork() -> tuple[int, int]:
    """The child's pid and pidfd; in the child 0 and nothing. Raises: OSError: there is none."""
    pid = os.fork()
    if pid == 0:
        return 0, -1
    try:
        return pid, os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        os.waitpid(pid, 0)
        raise


def _answer(channel: socket.socket, answer: Forked, descriptors: list[int]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the other end is gone; the next read says so
        socket.send_fds(channel, [encode(answer)], descriptors)


def _run(function: str, given: list[int]) -> None:
    """The life of a forked process; does not return."""
    status = 1
    try:
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            return
        module, _, name = function.partition(":")
        called = getattr(importlib.import_module(module), name)
        called(*(socket.socket(fileno=number) for number in given))
        status = 0
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # nothing is left to do, and Triton 3.9 would complain on the way out
