"""The processes of a service on this machine: proven to be its own, measured, and harmed."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flexpert.cluster.views import RankView
from flexpert.engine import faults as planted
from flexpert.engine.memory_plan import private_memory
from flexpert.errors import ConfigError
from flexpert.trials.chaos_report import ChaosFault, Held, RankHeld

BY_ITSELF = ("oom", "partition")  # the rank does it, if its service was started to

_SERVER = "flexpert.forking.fork_server"
_SLOW_S, _SLOW_STEP_S = 1.0, 0.05  # a slow rank: stopped half of the time
_FELT_S = 5.0  # a planted fault strikes at the rank's next vote


@dataclass(frozen=True, slots=True)
class Family:
    """server: the parent of all ranks, and of nobody else. folder: where faults are planted."""

    head: psutil.Process
    server: psutil.Process
    folder: Path | None

    def process_of(self, rank: RankView) -> psutil.Process:
        """Raises: psutil.NoSuchProcess: it is gone, or its pid belongs to somebody else."""
        process = psutil.Process(rank.pid)
        if process.ppid() != self.server.pid:
            raise psutil.NoSuchProcess(rank.pid)
        return process

    def held(self, ranks: Sequence[RankView]) -> Held:
        of_ranks = {}
        for rank in ranks:
            with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
                process = self.process_of(rank)
                size = private_memory(pid=process.pid)
                of_ranks[rank.id] = RankHeld(rank.pid, round(size / 2**20, 1), process.num_fds())
        return Held(
            resident_mib=round(self.head.memory_info().rss / 2**20, 1),
            descriptors=self.head.num_fds(),
            processes=len(self.head.children(recursive=True)),
            ranks=of_ranks,
        )


def find_family(ranks: Sequence[RankView], port: int) -> Family:
    """The service that listens on a port of this machine.

    Raises: ConfigError: these ranks are not, or not provably, processes that it started here.
    """
    for rank in ranks:
        if rank.host != socket.gethostname() or not psutil.pid_exists(rank.pid):
            raise ConfigError(
                f"rank {rank.id} runs on {rank.host}; chaos signals processes, so run it there"
            )
    try:
        parents = {psutil.Process(rank.pid).ppid() for rank in ranks}
        server = psutil.Process(parents.pop())
        head = server.parent()
        if parents or head is None or _SERVER not in server.cmdline():
            raise ConfigError("the pids that it names are not those of ranks of one service")
        listening = {
            entry.laddr.port
            for entry in head.net_connections(kind="tcp")
            if entry.status == psutil.CONN_LISTEN
        }
        if port not in listening:
            raise ConfigError(
                f"process {head.pid}, which started these ranks, does not listen on port {port}; "
                "name the service itself, not what stands before it"
            )
        folder = head.environ().get(planted.VARIABLE)
    except psutil.Error as error:
        raise ConfigError(f"the service's processes cannot be looked into: {error}") from None
    return Family(head, server, Path(folder) if folder else None)


async def strike(family: Family, fault: ChaosFault) -> None:
    """One fault; psutil signals only the very process that was looked up.

    Raises: psutil.NoSuchProcess
    """
    process = psutil.Process(fault.pid)
    if process.ppid() != family.server.pid:
        raise psutil.NoSuchProcess(fault.pid)
    if fault.kind == "kill":
        process.send_signal(signal.SIGKILL)
    elif fault.kind == "stop":
        process.send_signal(signal.SIGSTOP)
    elif fault.kind == "slow":
        for _ in range(int(_SLOW_S / _SLOW_STEP_S / 2)):
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(_SLOW_STEP_S)
            finally:
                process.send_signal(signal.SIGCONT)
            await asyncio.sleep(_SLOW_STEP_S)
    elif family.folder:
        await _plant(family.folder, fault)


async def _plant(folder: Path, fault: ChaosFault) -> None:
    """Until the rank has passed the point, or will not in time."""
    if fault.kind == "oom":
        what = planted.Fault(fault.rank, "vote", action="starve", pid=fault.pid)
    else:
        seconds = fault.seconds
        what = planted.Fault(fault.rank, "vote", action="cut", seconds=seconds, pid=fault.pid)
    path = what.plant(folder)
    until = time.monotonic() + _FELT_S
    while path.exists() and time.monotonic() < until:
        await asyncio.sleep(0.01)
    with suppress(FileNotFoundError):
        path.unlink()
        return
    fault.at = time.time()
    await asyncio.sleep(fault.seconds)
