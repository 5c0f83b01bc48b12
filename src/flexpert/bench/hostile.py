"""`flexpert bench hostile`: what others' bodies cost streams that ask for nothing unusual."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import msgspec
import psutil

from flexpert.bench.hostile_clients import ClientsJob, ClientsOutcome, Kind
from flexpert.bench.load import LoadError, Target, call, complete, completion_body
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.processor_time import processor_seconds
from flexpert.bench.service import own_service
from flexpert.errors import FlexpertError

SETTLE_S = 2.0
TURN_S = 15.0  # at most, or a little more
WANTED_RATIO = 0.8
WANTED_GROWTH_MIB = 50.0
# Clients are elsewhere in life. On a machine of few cores they give way, in both measurements.
NICENESS = 5
_LOOK_S = 0.2
_ANSWER_TOKENS = 400
_STALL_S = 120.0

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostilePlan:
    """flags: of the service, besides. after_s: until memory is looked at again."""

    duration_s: float = 60.0
    streams: int = 4
    clients: int = 16
    max_body: int = 16 * 2**20
    seed: int = 0
    after_s: float = 10.0
    flags: tuple[str, ...] = ()


class HostileMeasured(msgspec.Struct, frozen=True, kw_only=True):
    """Streams together with clients of one kind.

    longest_gap_ms: between two pieces of one answer; longest_first_ms: from sending to the first.
    load: of the machine, the highest of
    the last minute at the end of a turn. clients: what came back to them.
    """

    tokens_per_s: float
    longest_gap_ms: float
    longest_first_ms: float
    stream_errors: list[str]
    head_cpu: float
    load: float
    clients: ClientsOutcome


class HeadMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident MiB of the serving process, without pages of files, which come and go as the kernel
    likes; before: the hostile clients begin, after: they are gone.

    helpers_highest: of all its other processes but the ranks, together, each with what it shares
    with its parent.
    """

    before: float
    highest: float
    after: float
    helpers_highest: float

    @property
    def growth(self) -> float:
        return round(self.after - self.before, 1)


class HostileReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert bench hostile`. ratio: tokens/s with hostile clients over those
    with ordinary ones."""

    command: str
    machine: Machine
    duration_s: float
    streams: int
    clients: int
    max_body: int
    seed: int
    ordinary: HostileMeasured
    hostile: HostileMeasured
    ratio: float
    memory: HeadMemory
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


def run_hostile(plan: HostilePlan, note: Note) -> HostileReport:
    """Measure a service of our own.

    Raises: FlexpertError
    """
    return asyncio.run(_run(plan, note))


async def _run(plan: HostilePlan, note: Note) -> HostileReport:
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
        try:
            async with (
                _clients("ordinary", plan, target) as ordinary,
                _clients("hostile", plan, target) as hostile,
            ):
                memory = await _measure(plan, note, target, head, streams, ordinary, hostile)
        except psutil.NoSuchProcess:
            last = "\n  ".join(list(service.output)[-15:])
            raise FlexpertError(f"the service has ended; its last lines:\n  {last}") from None
    found = (ordinary.measured(), hostile.measured())
    errors = sum(
        count
        for one in found
        for status, count in one.clients.statuses.items()
        if status.startswith("5")
    )
    slow, fast = found[1].tokens_per_s, found[0].tokens_per_s
    return HostileReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        duration_s=plan.duration_s,
        streams=plan.streams,
        clients=plan.clients,
        max_body=plan.max_body,
        seed=plan.seed,
        ordinary=found[0],
        hostile=found[1],
        ratio=round(slow / fast, 3) if fast else 0.0,
        memory=memory,
        memory_growth_mib=memory.growth,
        server_errors=errors,
    )


async def _measure(
    plan: HostilePlan,
    note: Note,
    target: Target,
    head: psutil.Process,
    streams: list[_Stream],
    ordinary: _Clients,
    hostile: _Clients,
) -> HeadMemory:
    """By turns, so that what else the machine does meanwhile meets both."""
    tasks = [asyncio.create_task(stream.run()) for stream in streams]
    turns = max(1, round(plan.duration_s / TURN_S))
    ranks = await _ranks(target)
    before, highest, helpers = 0.0, 0.0, 0.0
    try:
        for turn in range(1, turns + 1):
            note(f"{plan.streams} streams with other clients, turn {turn} of {turns}")
            await ordinary.run_with(streams, head, plan.duration_s / turns)
            before = before or _mib(head)
            async with _watching(head, ranks) as seen:
                await hostile.run_with(streams, head, plan.duration_s / turns)
            highest, helpers = max(highest, seen.highest), max(helpers, seen.helpers)
    finally:
        await _end(tasks)
    note(f"waiting {plan.after_s:g} s")
    await asyncio.sleep(plan.after_s)
    return HeadMemory(before=before, highest=highest, after=_mib(head), helpers_highest=helpers)


@dataclass(slots=True)
class _Clients:
    """The process of clients of one kind, and the streams that run with it in all its turns."""

    process: asyncio.subprocess.Process
    tokens: int = 0
    seconds: float = 0.0
    head_cpu_s: float = 0.0
    longest_gap_s: float = 0.0
    longest_first_s: float = 0.0
    errors: list[str] = field(default_factory=list)
    load: float = 0.0
    outcome: ClientsOutcome | None = None

    async def run_with(self, streams: list[_Stream], head: psutil.Process, seconds: float) -> None:
        """One turn: the clients come, the streams are measured for so long, and they go."""
        self._tell(b"go")
        await asyncio.sleep(min(SETTLE_S, seconds))
        for stream in streams:
            stream.reset()
        began, cpu = perf_counter(), processor_seconds(head.pid)
        await asyncio.sleep(seconds)
        self.seconds += perf_counter() - began
        self.head_cpu_s += processor_seconds(head.pid) - cpu
        for stream in streams:
            stream.look()
            self.tokens += stream.tokens
            self.longest_gap_s = max(self.longest_gap_s, stream.longest_gap_s)
            self.longest_first_s = max(self.longest_first_s, stream.longest_first_s)
            self.errors += stream.errors
        self.load = max(self.load, os.getloadavg()[0])
        self._tell(b"stop")
        await self.hear(b"stopped")

    def _tell(self, line: bytes) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write(line + b"\n")

    async def hear(self, line: bytes) -> None:
        """Raises: FlexpertError: it ended before it said so."""
        if self.process.stdout is not None and await self.process.stdout.readline() == line + b"\n":
            return
        raise FlexpertError("the process of the clients has exited")

    def measured(self) -> HostileMeasured:
        """Raises: FlexpertError: the clients did not come to their end."""
        if self.outcome is None:
            raise FlexpertError("the process of the clients has exited without a result")
        return HostileMeasured(
            tokens_per_s=round(self.tokens / self.seconds, 1),
            longest_gap_ms=round(self.longest_gap_s * 1e3, 1),
            longest_first_ms=round(self.longest_first_s * 1e3, 1),
            stream_errors=list(dict.fromkeys(self.errors))[:5],
            head_cpu=round(self.head_cpu_s / self.seconds, 3),
            load=round(self.load, 2),
            clients=self.outcome,
        )


@asynccontextmanager
async def _clients(kind: Kind, plan: HostilePlan, target: Target) -> AsyncIterator[_Clients]:
    """They have their bodies, and wait. Ended however the block ends."""
    job = ClientsJob(
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
    clients = _Clients(process)
    try:
        if process.stdin is not None:
            process.stdin.write(msgspec.json.encode(job) + b"\n")
        await clients.hear(b"ready")
        yield clients
        output, _ = await process.communicate(b"")  # closes its input
        clients.outcome = msgspec.json.decode(output, type=ClientsOutcome)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@dataclass(slots=True)
class _Seen:
    """Highest so far, MiB."""

    highest: float = 0.0
    helpers: float = 0.0


@asynccontextmanager
async def _watching(head: psutil.Process, ranks: set[int]) -> AsyncIterator[_Seen]:
    """HeadMemory, looked at while the block lasts."""
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
    """Raises: psutil.NoSuchProcess"""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(process.pid) from None
    # a zombie has no memory
    found = next((line for line in text.splitlines() if line.startswith("RssAnon:")), None)
    return round(int(found.split()[1]) / 2**10, 1) if found else 0.0
