"""How fast ranks open, check and load a checkpoint, beside what dd reads of the same files.

Each rank is a process of its own, with everything imported as a service's fork server has it. It
opens the checkpoint, accounts for its tensors, loads the dense weights and its share of the
experts into memory that peers could read, and sees that all of it is finite. dd and ranks take
turns; before a cold turn the files are dropped from the page cache.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec

from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.config import EngineConfig
from flexpert.engine.memory_plan import planned_memory
from flexpert.errors import FlexpertError

LIMIT_S: Final = 1800.0  # for one turn of the ranks
_LOOK_S: Final = 0.05
_DD_BLOCK: Final = "16M"

Cache = Literal["cold", "warm"]
MapExperts = Literal["auto", "on", "off"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is measured. model: a directory. repeats: turns of each kind."""

    model: str
    ranks: int
    repeats: int
    caches: Sequence[Cache]
    dtype: str = "auto"
    map_experts: MapExperts = "auto"


class RankLoad(msgspec.Struct, frozen=True):
    """What one rank did. cpu_s: of all its threads. Memory in bytes, of the host: the most that it
    had for itself beyond what it began with, and what a service plans for dense weights, experts
    and the process."""

    open_s: float
    dense_s: float
    experts_s: float
    cpu_s: float
    peak: int
    planned: int


class LoadTurn(msgspec.Struct, frozen=True):
    """One turn of each. load_s: until the last rank is done. dd_cpu_s: what dd used of a processor,
    which tells more than time where others use it, too."""

    cache: Cache
    dd_s: float
    dd_cpu_s: float
    load_s: float
    ranks: list[RankLoad]


class LoadReport(msgspec.Struct, frozen=True):
    """nbytes: of the files, which dd reads whole."""

    model: str
    nbytes: int
    turns: list[LoadTurn]
    machine: Machine

    @property
    def within_plan(self) -> bool:
        """Whether no rank had more memory than planned."""
        return all(rank.peak <= rank.planned for turn in self.turns for rank in turn.ranks)


class BeginLoad(msgspec.Struct, frozen=True):
    """What a rank is told first."""

    rank: int
    ranks: int
    model: str
    dtype: str
    map_experts: MapExperts


class LoadAnswer(msgspec.Struct, frozen=True):
    """loaded: None: it is ready to begin. why: it failed."""

    loaded: RankLoad | None = None
    why: str = ""


_encode = msgspec.msgpack.encode


def run_loading(plan: LoadPlan, note: Callable[[str], None]) -> LoadReport:
    """Measure.

    Raises: FlexpertError: the checkpoint cannot be served, or a process failed.
    """
    from flexpert.models.source import ModelSource

    source = ModelSource.open(plan.model, dtype=plan.dtype)
    files = [source.path / name for name in source.checkpoint.files.names]
    turns = []
    with _processes(plan) as ranks:
        for cache in plan.caches:
            for number in range(plan.repeats):
                note(f"{cache}, {number + 1} of {plan.repeats}: dd, then {plan.ranks} ranks")
                _prepare(files, cache)
                dd_s, dd_cpu_s = _read_with_dd(files)
                _prepare(files, cache)
                turns.append(LoadTurn(cache, dd_s, dd_cpu_s, *_load_with_ranks(ranks)))
    nbytes = sum(file.stat().st_size for file in files)
    return LoadReport(str(source.path), nbytes, turns, this_machine())


def _prepare(files: Sequence[Path], cache: Cache) -> None:
    if cache == "warm":
        _read_with_dd(files)
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(descriptor)  # pages that are not on the disk yet would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _read_with_dd(files: Sequence[Path]) -> tuple[float, float]:
    """Seconds, and those of a processor. Raises: FlexpertError"""
    began, used = time.perf_counter(), _children_cpu_s()
    for file in files:
        command = ["dd", f"if={file}", "of=/dev/null", f"bs={_DD_BLOCK}", "status=none"]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FlexpertError(f"dd could not read {file}: {error}") from error
    return time.perf_counter() - began, _children_cpu_s() - used


def _children_cpu_s() -> float:
    """Of those that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _load_with_ranks(ranks: Sequence[forks.Process]) -> tuple[float, list[RankLoad]]:
    """(seconds, what each says); they have given their memory back."""
    began = time.perf_counter()
    for process in ranks:
        process.connection.send(b"go")
    loaded = [_answer(rank, process).loaded for rank, process in enumerate(ranks)]
    seconds = time.perf_counter() - began
    for rank, process in enumerate(ranks):
        _answer(rank, process)
    return seconds, [one for one in loaded if one is not None]


@contextlib.contextmanager
def _processes(plan: LoadPlan) -> Iterator[list[forks.Process]]:
    ranks: list[forks.Process] = []
    try:
        for rank in range(plan.ranks):
            process = forks.start(f"{__name__}:rank_main")
            ranks.append(process)
            begin = BeginLoad(rank, plan.ranks, plan.model, plan.dtype, plan.map_experts)
            with contextlib.suppress(Closed):  # the answer says why
                process.connection.send(_encode(begin))
        for rank, process in enumerate(ranks):
            _answer(rank, process)
        yield ranks
    finally:
        for process in ranks:
            process.end()


def _answer(rank: int, process: forks.Process) -> LoadAnswer:
    try:
        packet = process.connection.receive(LIMIT_S)
    except TimeoutError:
        raise FlexpertError(f"rank {rank} did not load within {LIMIT_S:g} s") from None
    except Closed:
        process.join(1.0)
        raise FlexpertError(f"rank {rank} ended (exit status {process.exitcode})") from None
    answer = msgspec.msgpack.decode(packet, type=LoadAnswer)
    if answer.why:
        raise FlexpertError(f"rank {rank}: {answer.why}")
    return answer


# ---- in a rank's process ------------------------------------------------------------------------


def rank_main(end: socket.socket) -> None:
    """Load whenever told to, say how it went, give the memory back and say so."""
    connection = StreamConnection(end)
    begin = msgspec.msgpack.decode(connection.receive(LIMIT_S), type=BeginLoad)
    for module in ("flexpert.models.weight_reading", "flexpert.moe.expert_store", "transformers"):
        importlib.import_module(module)
    with contextlib.suppress(Closed):  # it is over
        connection.send(_encode(LoadAnswer()))
        while True:
            connection.receive()
            try:
                _load(begin, lambda load: connection.send(_encode(LoadAnswer(load))))
            except (FlexpertError, OSError, MemoryError, RuntimeError) as error:
                connection.send(_encode(LoadAnswer(why=f"{type(error).__name__}: {error}")))
                return
            gc.collect()  # what the files are mapped by would keep them in the page cache
            connection.send(_encode(LoadAnswer()))


def _load(begin: BeginLoad, done: Callable[[RankLoad], None]) -> None:
    """done: told while everything is still there."""
    import torch

    from flexpert.engine.device_profile import maps_experts
    from flexpert.models.source import ModelSource
    from flexpert.models.weight_reading import read_dense
    from flexpert.moe.expert_store import ExpertLoad, ExpertStore
    from flexpert.moe.placement import replan

    torch.set_num_threads(1)
    used_s = time.process_time()
    with _Peak() as peak:
        times = [time.perf_counter()]
        source = ModelSource.open(begin.model, dtype=begin.dtype)
        times.append(time.perf_counter())
        model = read_dense(source)
        times.append(time.perf_counter())
        experts, layers = source.info.experts, source.info.moe_layers
        placement = replan(None, range(begin.ranks), experts=experts, layers=layers)
        keys = [(n, e) for n, held in enumerate(placement.held_by(begin.rank)) for e in held]
        config = EngineConfig(map_experts=begin.map_experts)
        maps = source.map_experts if maps_experts(config, source) else None
        store = ExpertStore(begin.rank, source.expert_shapes(), experts, maps=maps)
        store.load(ExpertLoad(keys, {}, source, lambda: None, lambda share: None))
        times.append(time.perf_counter())
    planned = planned_memory(source, config, begin.ranks, len(keys), begin.ranks)
    open_s, dense_s, experts_s = (b - a for a, b in itertools.pairwise(times))
    parts = planned.dense + planned.experts + planned.runtime
    cpu_s = time.process_time() - used_s
    done(RankLoad(open_s, dense_s, experts_s, cpu_s, peak.nbytes, parts))
    store.drop(keys)
    del model


class _Peak:
    """The most memory that this process had for itself beyond what it began with, looked at again
    and again. (A rank begins with pages that are the fork server's.)"""

    def __init__(self) -> None:
        self.nbytes = 0
        self._before = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peak", daemon=True)

    def __enter__(self) -> _Peak:
        self._before = _own_memory()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        last = False
        while not last:
            last = self._over.wait(_LOOK_S)
            self.nbytes = max(self.nbytes, _own_memory() - self._before)


def _own_memory() -> int:
    """Bytes that are no file's: the process's own, and what it shares as memory. By counters of the
    kernel's, since walking through gigabytes of pages would hold up what is measured."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    return sum(int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
