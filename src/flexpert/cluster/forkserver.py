"""The process that ranks are forked from: it has imported torch and transformers already.

Started by the launcher as `python -m flexpert.cluster.forkserver FD`, where FD is one end of a
socket pair. It runs no tensor operation and starts no thread, so that a fork is a whole process.
Requests and answers are one packet each. It ends when the head's end of the socket closes, and its
ranks end with it (PR_SET_PDEATHSIG), however it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import sys
import traceback

import msgspec

_PACKET = 1 << 20
_PR_SET_PDEATHSIG = 1


class RankSpec(msgspec.Struct, frozen=True):
    """What a new rank is told. config: the settings tree as JSON; endpoint: the head's ROUTER."""

    rank: int
    endpoint: str
    token: str
    config: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Everything is imported."""


class Unusable(msgspec.Struct, frozen=True, tag="unusable"):
    """The model cannot be opened; the fork server ends."""

    error: str


class Started(msgspec.Struct, frozen=True, tag="started"):
    rank: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """A rank's process is gone and reaped. status: exit code, or minus the signal."""

    rank: int
    pid: int
    status: int


Answer = Ready | Unusable | Started | Exited

decode_answer = msgspec.msgpack.Decoder(Answer).decode
decode_spec = msgspec.msgpack.Decoder(RankSpec).decode
encode = msgspec.msgpack.encode


def main(descriptor: int) -> None:
    """Serve fork requests on the socket with this descriptor until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    channel = socket.socket(fileno=descriptor)
    config = channel.recv(_PACKET).decode()
    if not config:
        return
    from flexpert.cluster.rank_process import open_model, rank_main
    from flexpert.errors import FlexpertError

    try:
        source = open_model(config)
    except FlexpertError as error:
        _answer(channel, Unusable(str(error)))
        return
    gc.collect()
    gc.freeze()  # shared pages stay shared: the collector does not touch what was imported
    _answer(channel, Ready())

    selector = selectors.DefaultSelector()
    selector.register(channel, selectors.EVENT_READ)
    ranks: dict[int, int] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is channel:
                packet = channel.recv(_PACKET)
                if not packet:
                    return
                spec = decode_spec(packet)
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    channel.close()
                    _become_rank()
                    status = 1
                    try:
                        status = rank_main(spec, source)
                    except BaseException:  # noqa: BLE001 - the last frame of this process
                        traceback.print_exc()
                    finally:
                        sys.stdout.flush()
                        sys.stderr.flush()
                        os._exit(status)
                pidfd = os.pidfd_open(pid)
                ranks[pidfd] = spec.rank
                selector.register(pidfd, selectors.EVENT_READ, data=pid)
                _answer(channel, Started(spec.rank, pid))
            else:
                pidfd = key.fd
                selector.unregister(pidfd)
                os.close(pidfd)
                _, status = os.waitpid(key.data, 0)
                code = os.waitstatus_to_exitcode(status)
                _answer(channel, Exited(ranks.pop(pidfd), key.data, code))


def _answer(channel: socket.socket, answer: Answer) -> None:
    with contextlib.suppress(BrokenPipeError):  # the head is gone; the next read says so
        channel.send(encode(answer))


def _become_rank() -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing is left to do, and Triton 3.9 would complain on the way out
