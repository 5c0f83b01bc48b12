"""`flexpert bench hostile`: what others' bodies cost streams that ask for nothing unusual."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import msgspec
import psutil

from flexpert.bench.hostile_clients import Job, Kind, Outcome
from flexpert.bench.load import LoadError, Target, call, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.service import own_service
from flexpert.errors import FlexpertError

SETTLE_S = 2.0
WANTED_RATIO = 0.8
WANTED_GROWTH_MIB = 50.0
# Clients are elsewhere in life. On a machine of few cores they give way, in both measurements.
NICENESS = 5
_LOOK_S = 0.2
_ANSWER_TOKENS = 400
_STALL_S = 120.0

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """flags: of the service, besides. after_s: until memory is looked at again."""

    duration_s: float = 60.0
    streams: int = 4
    clients: int = 16
    max_body: int = 16 * 2**20
    seed: int = 0
    after_s: float = 10.0
    flags: tuple[str, ...] = ()


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Streams beside clients of one kind.

    longest_gap_ms: between two pieces of one answer; longest_first_ms: from sending to the first.
    load: of the machine, in the minute before the end. clients: what came back to them.
    """

    tokens_per_s: float
    longest_gap_ms: float
    longest_first_ms: float
    stream_errors: list[str]
    head_cpu: float
    load: float
    clients: Outcome


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident MiB of the serving process; before: the hostile clients begin, after: they are gone.

    helpers_highest: of all its other processes but the ranks, together.
    """

    before: float
    highest: float
    after: float
    helpers_highest: float

    @property
    def growth(self) -> float:
        return round(self.after - self.before, 1)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert bench hostile`. ratio: tokens/s beside hostile clients over those
    beside ordinary ones."""

    command: str
    machine: Machine
    duration_s: float
    streams: int
    clients: int
    max_body: int
    seed: int
    ordinary: Measured
    hostile: Measured
    ratio: float
    memory: Memory
    memory_growth_mib: float
    server_errors: int


@dataclass(slots=True)
class _Stream:
    """One well-behaved client: an answer after the other."""

    target: Target
    requests: list[bytes]
    tokens: int = 0
    longest_gap_s: float = 0.0
    longest_first_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    _latest: float = 0.0
    _first: bool = True

    async def run(self) -> None:
        for number in range(sys.maxsize):
            self._latest, self._first = perf_counter(), True
            request = self.requests[number % len(self.requests)]
            answer = await complete(
                self.target, request, stall_s=_STALL_S, on_tokens=self._on_tokens
            )
            if answer.error is not None:
                self.errors.append(answer.error)
                await asyncio.sleep(0.1)  # not to make a refusal a flood

    def _on_tokens(self, count: int) -> None:
        if count:
            self.look()
            self._latest, self._first = perf_counter(), False
            self.tokens += count

    def look(self) -> None:
        """Its silence until now counts."""
        silence = perf_counter() - self._latest
        if self._first:
            self.longest_first_s = max(self.longest_first_s, silence)
        else:
            self.longest_gap_s = max(self.longest_gap_s, silence)

    def reset(self) -> None:
        self.tokens, self.longest_gap_s, self.longest_first_s = 0, 0.0, 0.0
        self.errors.clear()


def run_hostile(plan: Plan, note: Note) -> Report:
    """Measure a service of our own.

    Raises: FlexpertError
    """
    return asyncio.run(_run(plan, note))


async def _run(plan: Plan, note: Note) -> Report:
    flags = ("--model", "tiny", "--ranks", "1", "--max-ranks", "1", "--log-level", "warning")
    size = ("--max-body", str(plan.max_body))
    async with own_service((*flags, *size, *plan.flags), report=note) as service:
        head = psutil.Process(service.pid)
        target = service.target
        requests = [
            target.message(
                "POST",
                "/v1/completions",
                completion_body(
                    f"In the {number}th year", max_tokens=_ANSWER_TOKENS, ignore_eos=True, seed=1
                ),
            )
            for number in range(plan.streams * 4)
        ]
        streams = [
            _Stream(target, requests[place :: plan.streams]) for place in range(plan.streams)
        ]
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        try:
            note(f"{plan.streams} streams beside {plan.clients} ordinary clients")
            ordinary = await _beside("ordinary", plan, target, head, streams)
            before = _mib(head)
            note(f"{plan.streams} streams beside {plan.clients} hostile clients")
            async with _watching(head, await _ranks(target)) as seen:
                hostile = await _beside("hostile", plan, target, head, streams)
            await _end(tasks)
            note(f"waiting {plan.after_s:g} s")
            await asyncio.sleep(plan.after_s)
            memory = Memory(
                before=before, highest=seen.highest, after=_mib(head), helpers_highest=seen.helpers
            )
        except psutil.NoSuchProcess:
            last = "\n  ".join(list(service.output)[-15:])
            raise FlexpertError(f"the service has ended; its last lines:\n  {last}") from None
        finally:
            await _end(tasks)
    both = (ordinary.clients.statuses, hostile.clients.statuses)
    errors = sum(count for found in both for status, count in found.items() if status[0] == "5")
    return Report(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        duration_s=plan.duration_s,
        streams=plan.streams,
        clients=plan.clients,
        max_body=plan.max_body,
        seed=plan.seed,
        ordinary=ordinary,
        hostile=hostile,
        ratio=round(hostile.tokens_per_s / ordinary.tokens_per_s, 3)
        if ordinary.tokens_per_s
        else 0,
        memory=memory,
        memory_growth_mib=memory.growth,
        server_errors=errors,
    )


async def _beside(
    kind: Kind, plan: Plan, target: Target, head: psutil.Process, streams: list[_Stream]
) -> Measured:
    """The streams, which run already, beside clients that come and go."""
    job = Job(
        host=target.host,
        port=target.port,
        kind=kind,
        clients=plan.clients,
        max_body=plan.max_body,
        seed=plan.seed,
        niceness=NICENESS,
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpert.bench.hostile_clients"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        if await process.stdout.readline() != b"ready\n":
            raise FlexpertError("the clients did not start")
        process.stdin.write(b"go\n")
        await asyncio.sleep(min(SETTLE_S, plan.duration_s))
        for stream in streams:
            stream.reset()
        began, cpu = perf_counter(), sum(head.cpu_times()[:2])
        await asyncio.sleep(plan.duration_s)
        took = perf_counter() - began
        for stream in streams:
            stream.look()
        measured: dict[str, Any] = {
            "tokens_per_s": round(sum(stream.tokens for stream in streams) / took, 1),
            "longest_gap_ms": round(max(s.longest_gap_s for s in streams) * 1e3, 1),
            "longest_first_ms": round(max(s.longest_first_s for s in streams) * 1e3, 1),
            "stream_errors": list(dict.fromkeys(e for s in streams for e in s.errors))[:5],
            "head_cpu": round((sum(head.cpu_times()[:2]) - cpu) / took, 3),
            "load": round(os.getloadavg()[0], 2),
        }
        process.stdin.close()
        output = await process.stdout.read()
        await process.wait()
    except BaseException:
        process.kill()
        raise
    return Measured(**measured, clients=msgspec.json.decode(output, type=Outcome))


@dataclass(slots=True)
class _Seen:
    """Highest so far, MiB."""

    highest: float = 0.0
    helpers: float = 0.0


@asynccontextmanager
async def _watching(head: psutil.Process, ranks: set[int]) -> AsyncIterator[_Seen]:
    """Memory, looked at while the block lasts."""
    seen = _Seen()

    async def watch() -> None:
        while True:
            seen.highest = max(seen.highest, _mib(head))
            helpers = 0.0
            for process in head.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if process.pid not in ranks:
                        helpers += _mib(process)
            seen.helpers = max(seen.helpers, round(helpers, 1))
            await asyncio.sleep(_LOOK_S)

    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        await _end([task])


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _ranks(target: Target) -> set[int]:
    status, cluster = await call(target, "GET", "/cluster")
    if status != 200:
        raise LoadError(f"/cluster answered {status}")
    return {rank["pid"] for rank in cluster["ranks"]}


def _mib(process: psutil.Process) -> float:
    return round(process.memory_info().rss / 2**20, 1)
