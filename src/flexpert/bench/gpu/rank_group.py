"""Ranks of a measurement on GPUs, each in a process of its own, and what they tell each other.

They are dealt out to the GPUs of the machine in turn; with fewer GPUs than ranks they share. The
process that starts them sends each one what it needs to begin, then hears from all of them in turn.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
import torch

from flexpert.bench.gpu.gpu_device import set_rank_device
from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.comm import Buffer, BufferSpec, make_buffer
from flexpert.comm.interpreter import INTERPRETED
from flexpert.errors import FlexpertError

T = TypeVar("T")

LIMIT_S = 600.0  # until a rank has built, captured or measured
EXCHANGE_S = 60.0


class GroupAnswer(msgspec.Struct, frozen=True):
    """value: msgpack of the next thing that a rank has to say; why: that it failed instead."""

    value: bytes = b""
    why: str = ""


_encode = msgspec.msgpack.encode


class RankGroup:
    """The processes, seen from the one that has started them."""

    def __init__(self, ranks: Sequence[forks.Process]) -> None:
        self._ranks = ranks

    @classmethod
    @contextlib.contextmanager
    def started(cls, function: str, begins: Sequence[object]) -> Iterator[RankGroup]:
        """A process for each of `begins`, which it is told first; ended when left.

        Args:
            function: "module:name" of one that takes a socket and calls `serve_rank`.
        """
        ranks: list[forks.Process] = []
        try:
            for begin in begins:
                process = forks.start(function)
                ranks.append(process)
                with contextlib.suppress(Closed):  # the answer says why
                    process.connection.send(_encode(begin))
            yield cls(ranks)
            deadline = time.monotonic() + LIMIT_S
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.end()

    def connect(self) -> None:
        """The ranks' `ParentOfRank.connected`: each is told where the others' buffers are."""
        self._tell(dict(enumerate(self.answers(bytes))))

    def answers(self, kind: type[T]) -> list[T]:
        """The next thing that each rank says, by rank.

        Raises: FlexpertError: one of them failed, or took too long.
        """
        found = []
        for rank, process in enumerate(self._ranks):
            try:
                packet = process.connection.receive(LIMIT_S)
            except TimeoutError:
                raise FlexpertError(
                    f"rank {rank} of the bench did not answer in {LIMIT_S:g} s"
                ) from None
            except Closed:
                process.join(1.0)
                raise FlexpertError(
                    f"rank {rank} of the bench ended (exit status {process.exitcode})"
                ) from None
            answer = msgspec.msgpack.decode(packet, type=GroupAnswer)
            if answer.why:
                raise FlexpertError(f"rank {rank} of the bench: {answer.why}")
            found.append(msgspec.msgpack.decode(answer.value, type=kind))
        return found

    def _tell(self, what: object) -> None:
        for process in self._ranks:
            with contextlib.suppress(Closed):  # the answer says why
                process.connection.send(_encode(what))


class ParentOfRank:
    """The process that has started this rank's."""

    def __init__(self, connection: StreamConnection) -> None:
        self._connection = connection

    def say(self, what: object) -> None:
        self._connection.send(_encode(GroupAnswer(_encode(what))))

    @contextlib.contextmanager
    def connected(self, rank: int, spec: BufferSpec) -> Iterator[Buffer]:
        """A buffer that knows those of all others (`RankGroup.connect`)."""
        buffer = make_buffer(rank, spec, backend="cuda", timeout_s=EXCHANGE_S)
        try:
            self.say(buffer.address)
            addresses = self._connection.receive()
            buffer.connect(msgspec.msgpack.decode(addresses, type=dict[int, bytes]))
            yield buffer
        finally:
            buffer.close()


def serve_rank(
    end: socket.socket, kind: type[T], measure: Callable[[T, ParentOfRank], None]
) -> None:
    """All that a rank's process does: `measure` with what it is told first, a `kind`."""
    connection = StreamConnection(end)
    with contextlib.suppress(Closed), torch.inference_mode():
        begin = msgspec.msgpack.decode(connection.receive(), type=kind)
        try:
            measure(begin, ParentOfRank(connection))
        except Closed:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent says it
            first = (str(error).splitlines() or [""])[0]
            connection.send(_encode(GroupAnswer(why=f"{type(error).__name__}: {first}")))


def open_rank_device(rank: int) -> torch.device:
    """Of a rank's process; the CPU in the interpreter."""
    return torch.device("cpu") if INTERPRETED else set_rank_device(rank)


def meet(buffer: Buffer) -> None:
    """All ranks have come here."""
    buffer.post_vote(b"")
    buffer.collect_votes(LIMIT_S)
