"""`flexpert bench start`: how long a service takes until it is ready, and what its processes hold
then.

One service after the other is started, looked at when it says that it is ready and again after some
requests, and ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median

import msgspec
import psutil

from flexpert.bench.cluster_history import cluster_now
from flexpert.bench.load import call, error_message
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.process_memory import held_memory
from flexpert.bench.processor_time import processor_seconds
from flexpert.bench.service import Service, own_service
from flexpert.errors import FlexpertError
from flexpert.forking.fork_server import MODULE

HEAD, FORK_SERVER, RANKS, OTHERS = "head", "fork server", "ranks", "other children"
ROLES = (HEAD, FORK_SERVER, RANKS, OTHERS)

REQUESTS, TOKENS = 8, 64
"""So many requests, of so many tokens each, are answered before the memory is looked at again."""

PROMPT = "In the beginning God created the heaven and the earth. " * 4

Note = Callable[[str], None]


class RoleCost(msgspec.Struct, frozen=True):
    """Of all processes of one role. pss: bytes, a page that n processes share counted as 1 / n."""

    processes: int
    processor_s: float
    pss: int


class ServiceStart(msgspec.Struct, frozen=True):
    """ready_s: from before its process was made until it said that it is ready. roles: by name, as
    they were then. first_s: until its first request had an answer of one token. served_pss: bytes
    of all its processes after `REQUESTS` more."""

    ready_s: float
    roles: dict[str, RoleCost]
    first_s: float
    served_pss: int

    @property
    def processor_s(self) -> float:
        return sum(role.processor_s for role in self.roles.values())

    @property
    def pss(self) -> int:
        return sum(role.pss for role in self.roles.values())


class StartReport(msgspec.Struct, frozen=True):
    """load: running and waiting threads of the machine before it began, mean of a minute."""

    machine: Machine
    flags: list[str]
    load: float
    starts: list[ServiceStart]

    @property
    def ready_s(self) -> float:
        """The median."""
        return median(start.ready_s for start in self.starts)


def run_starts(starts: int, flags: list[str], note: Note) -> StartReport:
    """Start a service of these flags so many times, one after the other.

    Raises: FlexpertError: one does not start, or cannot be looked at.
    """
    load = psutil.getloadavg()[0]
    found = []
    for number in range(starts):
        found.append(asyncio.run(_start(flags)))
        note(f"start {number + 1} of {starts}: ready after {found[-1].ready_s:.2f} s")
    return StartReport(this_machine(), flags, load, found)


async def _start(flags: list[str]) -> ServiceStart:
    began = time.perf_counter()
    async with own_service(flags) as service:
        ready_s = time.perf_counter() - began
        try:
            roles = await look(service)
        except psutil.Error as error:
            raise FlexpertError(f"the service cannot be looked at: {error!r}") from error
        first_s = await _answered(service, 1)
        for _ in range(REQUESTS):
            await _answered(service, TOKENS)
        return ServiceStart(ready_s, roles, first_s, held_memory(service.pid))


async def _answered(service: Service, tokens: int) -> float:
    """How long a request takes. Raises: FlexpertError: it fails."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    status, answer = await call(service.target, "POST", "/v1/completions", body)
    if status != 200:
        said = error_message(msgspec.json.encode(answer))
        raise FlexpertError(f"the service answered {status}: {said}")
    return time.perf_counter() - began


async def look(service: Service) -> dict[str, RoleCost]:
    """What its processes have used and hold now, by role. Raises: FlexpertError, psutil.Error"""
    head = psutil.Process(service.pid)
    processes = [head, *head.children(recursive=True)]
    costs = {process.pid: _cost(process) for process in processes}  # before it has to answer
    ranks = {rank.pid for rank in (await cluster_now(service.target)).ranks}
    roles: dict[str, list[RoleCost]] = {role: [] for role in ROLES}
    for process in processes:
        if process.pid == head.pid:
            role = HEAD
        elif process.pid in ranks:
            role = RANKS
        elif MODULE in process.cmdline() and process.ppid() == head.pid:
            role = FORK_SERVER
        else:
            role = OTHERS
        roles[role].append(costs[process.pid])
    return {role: _sum(each) for role, each in roles.items() if each}


def _cost(process: psutil.Process) -> RoleCost:
    return RoleCost(1, processor_seconds(process.pid), process.memory_full_info().pss)


def _sum(costs: list[RoleCost]) -> RoleCost:
    return RoleCost(
        sum(cost.processes for cost in costs),
        sum(cost.processor_s for cost in costs),
        sum(cost.pss for cost in costs),
    )
