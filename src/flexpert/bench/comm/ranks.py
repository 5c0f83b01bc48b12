"""Rank processes of the benchmark: each owns one object of every contender and does as it is told.

They come from a fork server that has imported torch once, and end with it, however it ends.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import msgspec
import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from flexpert.bench.comm.contender import Contender, Site, Unavailable, kind_named
from flexpert.bench.comm.workload import (
    Workload,
    expected_arrivals,
    expected_result,
    expert_results,
    make_input,
)
from flexpert.comm import BufferSpec, make_buffer
from flexpert.comm.buffer import Scales
from flexpert.errors import FlexpertError

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MALLOC_MOST = 32 << 20  # what glibc allows

# [turns, 4]: begin and end of dispatch, begin and end of combine, on the clock that all share
Times = list[tuple[int, int, int, int]]


class Settings(msgspec.Struct, frozen=True):
    """Of a run. threads: of torch in each rank."""

    channel: str
    fp8: Scales | None
    threads: int
    timeout_s: float


class RankFailed(FlexpertError):  # noqa: N818 - says what happened
    """A rank of the benchmark failed."""


Make = Callable[[int, int, int, Settings], object]


class Ranks:
    """The processes of a run. Use as a context manager: none is left afterwards.

    make: the object whose methods are the tasks, from rank, ranks, port of the store, settings.
    """

    def __init__(self, count: int, settings: Settings, make: Make | None = None) -> None:
        self._settings = settings
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", __name__])
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        try:
            for rank in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, count, self._store.port, settings, theirs, make or _Rank),
                )
                process.daemon = True
                process.start()
                theirs.close()
                self._pipes.append(ours)
                self._processes.append(process)
            self._answers()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def all(self, task: str, *args: Any) -> list[Any]:
        """Have all ranks do a task of `_Rank` at the same time; their answers by rank.

        Raises: RankFailed
        """
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # the answer says why
                pipe.send((task, args))
        return self._answers(task)

    def _answers(self, task: str = "start") -> list[Any]:
        # a chunk of exchanges waits at each of them for its limit at most, so this is generous
        deadline = time.monotonic() + 10 * self._settings.timeout_s
        answers = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise RankFailed(f"rank {rank} gave no answer in {task}")
                fine, value = pipe.recv()
            except (EOFError, ConnectionResetError):
                self._processes[rank].join(5)
                code = self._processes[rank].exitcode
                raise RankFailed(f"rank {rank} ended in {task} (exit status {code})") from None
            if not fine:
                raise RankFailed(f"rank {rank} failed in {task}: {value}")
            answers.append(value)
        return answers

    def close(self) -> None:
        """End the processes; they hold nothing that outlives them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _serve(
    rank: int, ranks: int, port: int, settings: Settings, pipe: Connection, make: Make
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the head's to handle
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # else each large result of torch is new memory, and its page faults are what one measures
    libc.mallopt(_M_MMAP_THRESHOLD, _MALLOC_MOST)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch renames its collectives
    try:
        own = make(rank, ranks, port, settings)
        pipe.send((True, None))
    except Exception as error:  # noqa: BLE001  # goes to the head
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            task, args = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            answer = (True, getattr(own, task)(*args))
        except Exception as error:  # noqa: BLE001  # goes to the head
            answer = (False, f"{type(error).__name__}: {error}")
        try:
            pipe.send(answer)
        except BrokenPipeError:  # the head is gone
            return


class _Rank:
    """The tasks."""

    def __init__(self, rank: int, ranks: int, port: int, settings: Settings) -> None:
        self._rank, self._settings = rank, settings
        self._store = TCPStore("127.0.0.1", port, is_master=False)
        self._contenders: dict[str, Contender] = {}
        self._built = self._gathered = 0
        # what starts every phase at the same moment is the same for all contenders
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
        for contender in self._contenders.values():
            contender.close()
        self._contenders.clear()
        self._work = work
        self._pool = [make_input(work, self._rank, turn) for turn in range(work.pool)]

    def build(self, name: str) -> str:
        """Returns why the contender cannot run here, or nothing."""
        self._built += 1
        site = Site(
            rank=self._rank,
            work=self._work,
            store=PrefixStore(f"contender/{self._built}", self._store),
            gather=self._gather,
            channel=self._settings.channel,
            fp8=self._settings.fp8,
            timeout_s=self._settings.timeout_s,
            pool=self._pool,
        )
        try:
            self._contenders[name] = kind_named(name).make(site)
        except Unavailable as error:
            return str(error)
        return ""

    def check(self, name: str, turn: int) -> str:
        """One exchange against the oracle; returns what is wrong, or nothing."""
        kind, contender, work = kind_named(name), self._contenders[name], self._work
        contender.dispatch(turn)
        if not kind.checked:
            contender.combine()
            return ""
        wanted, slots = expected_arrivals(work, self._rank, turn)
        wrong = wrong_rows(contender.rows(), wanted, exact=kind.exact)
        room = contender.y_room()
        if room.shape == wanted.shape:
            room.copy_(expert_results(wanted, slots))
        result = contender.combine()
        return wrong or wrong_result(result, *expected_result(work, self._pool[turn % work.pool]))

    def measure(self, name: str, first: int, turns: int, warm_up: int) -> Times:
        """`turns` exchanges after `warm_up` that do not count."""
        contender = self._contenders[name]
        times: Times = []
        for turn in range(first, first + warm_up + turns):
            self._meet()
            begin = time.monotonic_ns()
            contender.dispatch(turn)
            dispatched = time.monotonic_ns()
            self._meet()
            middle = time.monotonic_ns()
            contender.combine()
            times.append((begin, dispatched, middle, time.monotonic_ns()))
        self._meet()
        return times[warm_up:]

    def _meet(self) -> None:
        self._clock.barrier(timeout_s=self._settings.timeout_s)

    def _gather(self, value: Any) -> list[Any]:
        self._gathered += 1
        key = f"gather/{self._gathered}"
        self._store.set(f"{key}/{self._rank}", pickle.dumps(value).hex())
        return [
            pickle.loads(bytes.fromhex(self._store.get(f"{key}/{rank}").decode()))
            for rank in range(self._work.ranks)
        ]


def wrong_rows(rows: torch.Tensor, wanted: torch.Tensor, *, exact: bool) -> str:
    if rows.shape != wanted.shape:
        return f"dispatch brought {list(rows.shape)} instead of {list(wanted.shape)}"
    if exact:
        return "" if torch.equal(rows, wanted) else "dispatch brought other rows than were sent"
    # e4m3 has 3 bits of mantissa, and below 2^-6 of its 448 a fixed step
    error = (rows.double() - wanted.double()).abs()
    top = wanted.double().abs().amax(1, keepdim=True) if wanted.numel() else wanted.double()
    limit = wanted.double().abs() / 8 + top * 2**-14
    return "" if bool((error <= limit).all()) else "dispatched rows are not those sent, even in fp8"


def wrong_result(result: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor) -> str:
    if result.shape != wanted.shape:
        return f"combine brought {list(result.shape)} instead of {list(wanted.shape)}"
    limit = 2 * torch.finfo(result.dtype).eps * size
    worst = float(((result.double() - wanted).abs() - limit).max()) if wanted.numel() else 0.0
    return "" if worst <= 0 else f"combined sums are off by {worst:.3g} more than rounding allows"
