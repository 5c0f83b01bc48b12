"""Rank processes of the benchmark: each owns one object of every baseline and does as it is told.

What they are asked and answer is msgpack, and the signature of a task is the schema of both.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import socket
import time
import typing
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from flexpert.bench.comm.baseline import Baseline, CountsLinkBytes, Site, Unavailable
from flexpert.bench.comm.baseline_kinds import kind_named
from flexpert.bench.comm.workload import (
    Workload,
    expected_arrivals,
    expected_result,
    expert_results,
    make_input,
)
from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.bench.processes.loopback import keep_to_loopback
from flexpert.bench.processes.socket_store import SocketStore, StoreServer
from flexpert.comm import BufferSpec, make_buffer
from flexpert.comm.buffer import Scales
from flexpert.errors import FlexpertError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_MOST = 32 << 20  # what glibc allows

# [turns, 4]: begin and end of dispatch, begin and end of combine, on the clock that all share
Times = list[tuple[int, int, int, int]]


class Settings(msgspec.Struct, frozen=True):
    """Of a run. threads: of torch in each rank; machines: that the ranks are dealt out to; eager:
    on GPUs, launched one by one."""

    channel: str
    fp8: Scales | None
    threads: int
    timeout_s: float
    machines: int = 1
    eager: bool = False


class RankFailed(FlexpertError):  # noqa: N818 - says what happened
    """A rank of the benchmark failed."""


class BeginRank(msgspec.Struct, frozen=True):
    """What a process is told first. tasks: "package.module:Class", see `Ranks`."""

    rank: int
    ranks: int
    settings: Settings
    tasks: str


class RankTask(msgspec.Struct, frozen=True, array_like=True):
    """arguments: msgpack of a list."""

    name: str
    arguments: bytes


class RankAnswer(msgspec.Struct, frozen=True, array_like=True):
    """value: msgpack of what the task returned; error: what it raised instead."""

    value: bytes = b""
    error: str = ""


Make = Callable[[int, int, "Store", Settings], object]
_encode = msgspec.msgpack.encode


class Ranks:
    """The processes of a run. Use as a context manager: none is left afterwards.

    make: the class whose methods are the tasks, made from rank, ranks, store, settings. Their types
    must be such that msgspec can encode and decode them.
    """

    def __init__(self, count: int, settings: Settings, make: Make | None = None) -> None:
        self._settings = settings
        self._make = make or _Rank
        self._store = StoreServer()
        self._processes: list[forks.Process] = []
        try:
            for rank in range(count):
                process = forks.start(f"{__name__}:serve", self._store.hand_out())
                self._processes.append(process)
                begin = BeginRank(rank, count, settings, _name(self._make))
                with suppress(Closed):  # the answer says why
                    process.connection.send(_encode(begin))
            self._answers("start", type(None))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def all(self, task: str, *args: Any) -> list[Any]:
        """Have all ranks do a task of `make` at the same time; their answers by rank.

        Raises: RankFailed
        """
        packet = _encode(RankTask(task, _encode(args)))
        for process in self._processes:
            with suppress(Closed):  # the answer says why
                process.connection.send(packet)
        return self._answers(task, schema(self._make, task)[1])

    def _answers(self, task: str, kind: Any) -> list[Any]:
        # a chunk of exchanges waits at each of them for its limit at most, so this is generous
        deadline = time.monotonic() + 10 * self._settings.timeout_s
        answers = []
        for rank, process in enumerate(self._processes):
            try:
                packet = process.connection.receive(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise RankFailed(f"rank {rank} gave no answer in {task}") from None
            except Closed:
                process.join(5)
                code = process.exitcode
                raise RankFailed(f"rank {rank} exited in {task} (exit status {code})") from None
            answer = msgspec.msgpack.decode(packet, type=RankAnswer)
            if answer.error:
                raise RankFailed(f"rank {rank} failed in {task}: {answer.error}")
            answers.append(msgspec.msgpack.decode(answer.value, type=kind))
        return answers

    def close(self) -> None:
        """End the processes; they hold nothing that outlives them."""
        for process in self._processes:
            process.end()
        self._store.close()


def _name(make: Make) -> str:
    if make.__module__ == "__main__":
        raise ValueError(f"{make.__qualname__} must be in a module that other processes can import")
    return f"{make.__module__}:{make.__qualname__}"


def schema(make: Any, task: str) -> tuple[Any, Any]:
    """Types of a task's arguments and of its answer. Raises: ValueError: there is no such task."""
    method = getattr(make, task, None)
    if task.startswith("_") or not callable(method):
        raise ValueError(f"there is no task {task}")
    hints = typing.get_type_hints(method)
    names = list(inspect.signature(method).parameters)[1:]
    return tuple[tuple(hints[name] for name in names)], hints["return"]  # type: ignore[misc]


def serve(end: socket.socket, store: socket.socket) -> None:
    """The life of a rank."""
    libc = ctypes.CDLL(None)
    # else each large result of torch is new memory, and its page faults are what one measures
    libc.mallopt(_M_MMAP_THRESHOLD, _MALLOC_MOST)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    keep_to_loopback()
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames its collectives
    connection = StreamConnection(end)
    with suppress(Closed):  # the head is gone
        begin = msgspec.msgpack.decode(connection.receive(), type=BeginRank)
        torch.set_num_threads(begin.settings.threads)
        module, _, name = begin.tasks.partition(":")
        made: list[object] = []

        def make() -> None:
            kind = getattr(importlib.import_module(module), name)
            made.append(kind(begin.rank, begin.ranks, SocketStore(store), begin.settings))

        connection.send(_encode(_answer(make)))
        while made:
            task = msgspec.msgpack.decode(connection.receive(), type=RankTask)
            connection.send(_encode(_answer(functools.partial(_do, made[0], task))))


def _do(own: object, task: RankTask) -> Any:
    kinds, _ = schema(type(own), task.name)
    return getattr(own, task.name)(*msgspec.msgpack.decode(task.arguments, type=kinds))


def _answer(work: Callable[[], Any]) -> RankAnswer:
    try:
        return RankAnswer(_encode(work()))
    except Exception as error:  # noqa: BLE001  # goes to the head
        return RankAnswer(error=f"{type(error).__name__}: {error}")


def gather(store: Store, key: str, rank: int, ranks: int, value: Any) -> list[Any]:
    """Every rank's value by rank, given this rank's; all ranks call it, with another key each time.

    value: plain: numbers, text, bytes, lists and dicts of them; a tuple comes back as a list.
    """
    store.set(f"{key}/{rank}", _encode(value).hex())
    return [
        msgspec.msgpack.decode(bytes.fromhex(store.get(f"{key}/{of}").decode()))
        for of in range(ranks)
    ]


class _Rank:
    """The tasks."""

    def __init__(self, rank: int, ranks: int, store: Store, settings: Settings) -> None:
        self._rank, self._settings = rank, settings
        self._store = store
        self._baselines: dict[str, Baseline] = {}
        self._built = self._gathered = 0
        # what starts every phase at the same moment is the same for all baselines
        self._clock = make_buffer(
            rank,
            BufferSpec(ranks, 1, 16, 1, torch.float32),
            store=PrefixStore("clock", self._store),
            timeout_s=settings.timeout_s,
        )
        self._clock.connect(range(ranks))
        self._clock.set_active(range(ranks), 1)
        self._meet()

    def prepare(self, work: Workload) -> None:
        """Forget the last workload and make the inputs of this one."""
        for baseline in self._baselines.values():
            baseline.close()
        self._baselines.clear()
        self._work = work
        self._pool = [make_input(work, self._rank, turn) for turn in range(work.pool)]

    def build(self, name: str) -> str:
        """Returns why the baseline cannot run here, or nothing."""
        self._built += 1
        site = Site(
            rank=self._rank,
            work=self._work,
            store=PrefixStore(f"baseline/{self._built}", self._store),
            gather=self._gather,
            channel=self._settings.channel,
            fp8=self._settings.fp8,
            timeout_s=self._settings.timeout_s,
            pool=self._pool,
            machine=self._machine(),
        )
        try:
            self._baselines[name] = kind_named(name).make(site)
        except Unavailable as error:
            return str(error)
        return ""

    def _machine(self) -> str | None:
        machines = self._settings.machines
        if machines == 1:
            return None
        return f"machine {self._rank * machines // self._work.ranks}"

    def link_bytes(self, name: str) -> int | None:
        """See `CountsLinkBytes`; None: the baseline does not know."""
        baseline = self._baselines[name]
        return baseline.link_bytes() if isinstance(baseline, CountsLinkBytes) else None

    def check(self, name: str, turn: int) -> str:
        """One exchange against the oracle; returns what is wrong, or nothing."""
        kind, baseline, work = kind_named(name), self._baselines[name], self._work
        baseline.dispatch(turn)
        if not kind.checked:
            baseline.combine()
            return ""
        expected, slots = expected_arrivals(work, self._rank, turn)
        wrong = wrong_rows(baseline.rows(), expected, exact=kind.exact)
        room = baseline.y_room()
        if room.shape == expected.shape:
            room.copy_(expert_results(expected, slots))
        result = baseline.combine()
        return wrong or wrong_result(result, *expected_result(work, self._pool[turn % work.pool]))

    def measure(self, name: str, first: int, turns: int, warm_up: int) -> Times:
        """`turns` exchanges after `warm_up` that do not count."""
        baseline = self._baselines[name]
        times: Times = []
        for turn in range(first, first + warm_up + turns):
            self._meet()
            begin = time.monotonic_ns()
            baseline.dispatch(turn)
            dispatched = time.monotonic_ns()
            self._meet()
            middle = time.monotonic_ns()
            baseline.combine()
            times.append((begin, dispatched, middle, time.monotonic_ns()))
        self._meet()
        return times[warm_up:]

    def _meet(self) -> None:
        self._clock.barrier(timeout_s=self._settings.timeout_s)

    def _gather(self, value: Any) -> list[Any]:
        self._gathered += 1
        key = f"gather/{self._gathered}"
        return gather(self._store, key, self._rank, self._work.ranks, value)


def wrong_rows(rows: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> str:
    if rows.shape != expected.shape:
        return f"dispatch brought {list(rows.shape)} instead of {list(expected.shape)}"
    if exact:
        return "" if torch.equal(rows, expected) else "dispatch brought other rows than were sent"
    # e4m3 has 3 bits of mantissa, and below 2^-6 of its 448 a fixed step
    error = (rows.double() - expected.double()).abs()
    top = expected.double().abs().amax(1, keepdim=True) if expected.numel() else expected.double()
    limit = expected.double().abs() / 8 + top * 2**-14
    return "" if bool((error <= limit).all()) else "dispatched rows are not those sent, even in fp8"


def wrong_result(result: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> str:
    if result.shape != expected.shape:
        return f"combine brought {list(result.shape)} instead of {list(expected.shape)}"
    limit = 2 * torch.finfo(result.dtype).eps * size
    worst = float(((result.double() - expected).abs() - limit).max()) if expected.numel() else 0.0
    return "" if worst <= 0 else f"combined sums are off by {worst:.3g} more than rounding allows"
