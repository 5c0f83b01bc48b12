"""One rank of a plan: a process that knows nothing of flexpert but flexpert.comm."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import torch

from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.bench.processes.loopback import keep_to_loopback
from flexpert.bench.processes.socket_store import SocketStore
from flexpert.comm import (
    Buffer,
    BufferSpec,
    CommError,
    ExpertTable,
    Interrupted,
    Received,
    make_buffer,
)
from flexpert.comm.agreement import View, agree, asked
from flexpert.comm.buffer import Channel, Scales
from flexpert.comm.errors import Evicted
from flexpert.trials.plan import oracle

Point = Literal["dispatch-send", "dispatch-wait", "combine-send", "combine-wait", "random"]
SIGNALS = {"sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP, "sigterm": signal.SIGTERM}
POINTS: tuple[Point, ...] = ("dispatch-send", "dispatch-wait", "combine-send", "combine-wait")


@dataclass(frozen=True, slots=True)
class Setup:
    """The same for all ranks of a run."""

    sizes: oracle.Sizes
    capacity: int
    channel: Channel
    fp8: Scales | None
    exchanges: int
    timeout_s: float
    connect_s: float
    seed: int


@dataclass(slots=True)
class WorkerOutcome:
    """What a rank saw in a phase. Times in seconds; `detected` on the monotonic clock."""

    epoch: int
    active: tuple[int, ...]
    errors: list[str] = field(default_factory=list)
    exchanges: int = 0
    latencies: list[float] = field(default_factory=list)  # dispatch + combine, without the experts
    detected: float = 0.0
    agree_s: float = 0.0
    commit_s: float = 0.0
    bytes_sent: int = 0
    bytes_undeduplicated: int = 0
    evicted: bool = False


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """One phase, for one rank. kill: signal to raise on itself at `point` of exchange `at`."""

    phase: int
    view: View
    doomed: frozenset[int] = frozenset()  # the phase is not over while one of them takes part
    kill: int = 0
    point: Point = "random"
    at: int = -1


class BeginWorker(msgspec.Struct, frozen=True, tag=True):
    """The first message: who this is."""

    rank: int
    setup: Setup


class Connect(msgspec.Struct, frozen=True, tag=True):
    ranks: tuple[int, ...]


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    ranks: tuple[int, ...]


class Leave(msgspec.Struct, frozen=True, tag=True):
    """Let go of all others, and end."""


class ExchangeTask(msgspec.Struct, frozen=True, tag=True):
    task: WorkerTask


class WorkerReady(msgspec.Struct, frozen=True, tag=True):
    """What `BeginWorker` is answered with."""


class Done(msgspec.Struct, frozen=True, tag=True):
    seconds: float


class Exchanged(msgspec.Struct, frozen=True, tag=True):
    outcome: WorkerOutcome


class TaskFailed(msgspec.Struct, frozen=True, tag=True):
    why: str


class Dying(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: said just before, on the monotonic clock."""

    at: float


Command = BeginWorker | Connect | Disconnect | Leave | ExchangeTask
Answer = WorkerReady | Done | Exchanged | TaskFailed | Dying


def _plain(value: object) -> object:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise NotImplementedError(type(value))


def _made(kind: type, value: str) -> object:
    found = getattr(torch, value, None)
    if kind is torch.dtype and isinstance(found, torch.dtype):
        return found
    raise ValueError(f"{value!r} is no {kind.__name__}")


encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode
_COMMANDS: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command, dec_hook=_made)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def decode_command(packet: bytes) -> Command:
    """Raises: msgspec.MsgspecError"""
    return _COMMANDS.decode(packet)


def decode_answer(packet: bytes) -> Answer:
    """Raises: msgspec.MsgspecError"""
    return _ANSWERS.decode(packet)


def serve(end: socket.socket, exported: socket.socket) -> None:
    """The life of a rank: commands come over the connection, each is answered."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # one of those that a plan may send
    torch.set_num_threads(1)
    keep_to_loopback()
    connection = StreamConnection(end)
    with suppress(Closed):  # the runner is gone
        begin = decode_command(connection.receive())
        if not isinstance(begin, BeginWorker):
            raise ValueError(f"{begin} cannot be the first message")
        _serve(begin.rank, begin.setup, SocketStore(exported, begin.setup.connect_s), connection)


def _serve(rank: int, setup: Setup, store: SocketStore, connection: StreamConnection) -> None:
    sizes = setup.sizes
    spec = BufferSpec(setup.capacity, sizes.tokens, sizes.hidden, sizes.topk, sizes.dtype)
    buffer = make_buffer(
        rank,
        spec,
        store=store,
        on_timeout="mask",
        timeout_s=setup.timeout_s,
        channel=setup.channel,
    )
    try:
        connection.send(encode(WorkerReady()))
        while True:
            command = decode_command(connection.receive())
            began = time.monotonic()
            answer: Answer
            try:
                match command:
                    case Connect(ranks):
                        buffer.connect(ranks, timeout_s=setup.connect_s)
                    case Leave():
                        buffer.disconnect(set(buffer.connected) - {rank})
                        buffer.close()
                    case Disconnect(ranks):
                        buffer.disconnect(ranks)
                    case ExchangeTask(task):
                        outcome = Run(buffer, setup, store, task, connection).phase()
                answer = Done(time.monotonic() - began)
                if isinstance(command, ExchangeTask):
                    answer = Exchanged(outcome)
            except CommError as error:
                answer = TaskFailed(f"{type(error).__name__}: {error}")
            connection.send(encode(answer))
            if isinstance(command, Leave):
                return
    finally:
        buffer.close()


class Run:
    """One phase on one rank."""

    def __init__(
        self,
        buffer: Buffer,
        setup: Setup,
        store: Any,
        task: WorkerTask,
        connection: StreamConnection,
    ) -> None:
        self.buffer = buffer
        self.setup = setup
        self.store = store
        self.task = task
        self.connection = connection
        self.view = task.view
        self.outcome = WorkerOutcome(task.view.epoch, task.view.ranks)

    def phase(self) -> WorkerOutcome:
        outcome = self.outcome
        sent = sum(self.buffer.statistics().bytes_sent.values())
        try:
            number = self.begin(0)
            while True:
                with self.listening():
                    # nobody leaves the phase while another still needs it
                    last = number >= self.setup.exchanges and not (
                        self.task.doomed & set(self.view.ranks)
                    )
                    whole = self.meet() if last else self.exchange(number)
                if not whole:
                    number = self.recover(number)
                elif last:
                    break
                else:
                    number += 1
        except Evicted as error:
            outcome.evicted = True
            outcome.errors.append(str(error))
        outcome.epoch, outcome.active = self.view.epoch, self.buffer.active
        outcome.bytes_sent = sum(self.buffer.statistics().bytes_sent.values()) - sent
        return outcome

    def begin(self, number: int) -> int:
        """Enter the epoch of the view; returns the exchange to go on with, the same for all.

        A rank may die here, too. What it desired is known to some and not to others, so only a
        barrier that was whole counts.
        """
        payload = number.to_bytes(4, "little")
        while True:
            began = time.monotonic()
            self.buffer.set_active(self.view.ranks, self.view.epoch)
            with self.listening():
                votes = self.barrier(payload, self.setup.connect_s)
            self.outcome.commit_s = time.monotonic() - began
            if votes is not None:
                return min(int.from_bytes(vote, "little") for vote in votes.values())
            self.agree()

    def meet(self) -> bool:
        return self.barrier(b"end", self.setup.timeout_s) is not None

    def barrier(self, payload: bytes, timeout_s: float) -> dict[int, bytes] | None:
        """The votes of all ranks of the view, or None if one is missing."""
        try:
            votes = self.buffer.barrier(payload, timeout_s=timeout_s)
        except Interrupted:
            return None
        return votes if set(votes) == set(self.view.ranks) else None

    def recover(self, number: int) -> int:
        """Somebody is lost: agree with the others who is left, and go on together."""
        self.agree()
        return self.begin(number)

    def agree(self) -> None:
        outcome = self.outcome
        if not outcome.detected:
            outcome.detected = time.monotonic()
        suspects = set(self.view.ranks) - set(self.buffer.active)
        began = time.monotonic()
        self.view = agree(
            self.store,
            self.buffer.rank,
            self.view,
            suspects=suspects,
            timeout_s=self.setup.connect_s,
            patience_s=2 * self.setup.timeout_s,
        )
        outcome.agree_s = time.monotonic() - began

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stop waiting in the old epoch when another rank asks for a new one."""
        ended = threading.Event()

        def listen() -> None:
            while not ended.wait(0.02):
                try:
                    desired = asked(self.store, self.view)
                except CommError:  # no answer this time: this rank was stopped meanwhile, say
                    continue
                if desired:
                    self.buffer.interrupt()
                    return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def exchange(self, number: int) -> bool:
        """One exchange, checked; False if it was not whole."""
        try:
            return self._exchange(number)
        except Interrupted:
            return False

    def _exchange(self, number: int) -> bool:
        buffer, sizes, task = self.buffer, self.setup.sizes, self.task
        ranks = self.view.ranks
        key = (self.setup.seed, task.phase, number)
        sent = {rank: oracle.inputs(sizes, ranks, (*key, rank)) for rank in ranks}
        own = sent[buffer.rank]
        experts = self.setup.capacity * sizes.experts_per_rank
        index = torch.arange(experts, dtype=torch.int32)
        table = ExpertTable(
            index // sizes.experts_per_rank, index % sizes.experts_per_rank, sizes.experts_per_rank
        )
        senders = buffer.active
        began = time.monotonic()
        self.maybe_die("dispatch-send", number)
        hook = buffer.begin_dispatch(
            own.x,
            torch.from_numpy(own.experts),
            torch.from_numpy(own.weights),
            table,
            fp8=self.setup.fp8,
        )
        self.maybe_die("dispatch-wait", number)
        received = hook()
        took = time.monotonic() - began
        self.noticed(received.masked)
        x = self.values(received).clone()
        self.maybe_die("combine-send", number)
        slots = torch.arange(sizes.experts_per_rank).repeat_interleave(received.offsets.diff())
        scale = torch.from_numpy(
            oracle.factor((buffer.rank * sizes.experts_per_rank + slots).numpy())
        )
        y = buffer.combine_input(received)
        y.copy_(x.double() * scale[:, None])
        began = time.monotonic()
        finish = buffer.begin_combine(y, received, reduce="home" if number % 2 else "rank")
        self.maybe_die("combine-wait", number)
        out = finish()
        self.outcome.latencies.append(took + time.monotonic() - began)
        self.noticed(set(ranks) - set(buffer.active))
        sources = {rank: sent[rank] for rank in senders if rank not in received.masked}
        self.check(number, received, x, sources, own, out)
        self.outcome.exchanges += 1
        return set(buffer.active) == set(ranks)

    def values(self, received: Received) -> torch.Tensor:
        from flexpert.comm.quant import dequantise

        if received.scales is None:
            return received.x
        return dequantise(received.x, received.scales, self.setup.sizes.dtype)

    def check(
        self,
        number: int,
        received: Received,
        x: torch.Tensor,
        sources: dict[int, oracle.Inputs],
        own: oracle.Inputs,
        out: torch.Tensor,
    ) -> None:
        sizes, rank = self.setup.sizes, self.buffer.rank
        missing = self.buffer.missing_results(received)
        wire = oracle.FP8_ERROR if self.setup.fp8 else 0.0
        wrong = oracle.check_received(
            sizes,
            rank,
            sources,
            oracle.Rows(received.offsets, received.source, received.token, received.weights, x),
            wire,
        ) or oracle.check_combined(
            sizes,
            own,
            self.buffer.active,
            out,
            None if missing is None else missing.choices,
            None if missing is None else missing.weight,
            () if missing is None else missing.ranks,
            wire + oracle.rounding(sizes),
        )
        if wrong:
            self.outcome.errors.append(f"exchange {number}: {wrong}")
        remote = (own.experts >= 0) & (own.experts // sizes.experts_per_rank != rank)
        self.outcome.bytes_undeduplicated += 2 * int(remote.sum()) * out.shape[1] * out.itemsize

    def noticed(self, masked: Any) -> None:
        if masked and not self.outcome.detected:
            self.outcome.detected = time.monotonic()

    def maybe_die(self, point: Point, number: int) -> None:
        task = self.task
        if task.kill and task.point == point and number == task.at:
            self.connection.send(encode(Dying(time.monotonic())))
            os.kill(os.getpid(), task.kill)
