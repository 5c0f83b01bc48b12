"""`flexpert bench serve`: what a service does under a load, and what transformers does alone."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter

import msgspec
import uvloop

from flexpert.bench import reference
from flexpert.bench.cluster_history import cluster_now
from flexpert.bench.goodput import LatencyGoals, figures_with_goodput
from flexpert.bench.load import ClientAnswer, Target
from flexpert.bench.load_timeline import TimelinePoint, step_for, timeline
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.offered_load import OfferedLoad, offer, warm_up
from flexpert.bench.other_server import Against, ServerTurn, served_model
from flexpert.bench.processor_time import processor_seconds
from flexpert.bench.prompts import tokenize
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures
from flexpert.bench.timed_events import EventOutcome, EventRun, TimedEvent, check_events
from flexpert.errors import FlexpertError

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeMeasured:
    """What is measured: the service at `url`, or else one of our own."""

    url: str | None = None
    key: str | None = None
    model: str = "tiny"
    ranks: int = 1
    threads: int | None = None
    flags: tuple[str, ...] = ()

    @property
    def threads_per_rank(self) -> int:
        return self.threads or 1

    @property
    def dtype(self) -> str:
        """As the flags have it."""
        for place, flag in enumerate(self.flags):
            name, _, value = flag.partition("=")
            if name == "--dtype":
                return value or "".join(self.flags[place + 1 : place + 2])
        return "auto"

    def arguments(self) -> list[str]:
        return [
            *("--model", self.model),
            *("--ranks", str(self.ranks)),
            *("--threads", str(self.threads_per_rank)),
            *("--log-level", "warning"),
            *self.flags,
        ]


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """One way of transformers. ratio: our output tokens/s over its. error: why there is none.

    concurrency: requests it may run at once; None: all.
    """

    method: str
    concurrency: int | None
    threads: int
    seconds: float | None = None
    output_tokens: int | None = None
    output_tokens_per_s: float | None = None
    ratio: float | None = None
    attention: str | None = None
    error: str | None = None


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert bench serve`.

    client_cpu_s: what measuring itself cost. head_cpu_s: of the head of a service of our own.
    timeline: where requests arrive at times of their own, or something was done to the service
    meanwhile.
    """

    command: str
    machine: Machine
    model: str
    ranks: int | None
    threads_per_rank: int | None
    offered: str
    service: Figures
    client_cpu_s: float
    head_cpu_s: float | None = None
    references: list[Reference] = []
    against: Against | None = None
    events: list[EventOutcome] = []
    timeline: list[TimelinePoint] = []


def run_bench(
    load: OfferedLoad,
    measured: ServeMeasured,
    *,
    compare: bool,
    note: Note,
    goals: LatencyGoals | None = None,
    events: Sequence[TimedEvent] = (),
) -> ServeReport:
    """Measure; the service of our own is gone before transformers has its turn.

    Raises:
        FlexpertError
    """
    run = uvloop.run(measure(load, measured, note, events=events, tokens_wanted=compare))
    load, prompts = run.load, run.prompts
    found = figures_with_goodput(run.answers, goals or {})
    references = []
    if compare:
        # continuous batching both as the service is asked and as it knows all of its work
        ways: list[tuple[reference.Method, int | None]] = [("generate_batch", None)]
        if not load.timed and load.concurrency < load.count:
            ways.insert(0, ("generate_batch", load.concurrency))
        for method, concurrency in (*ways, ("generate", None)):
            note(f"transformers: {method}, {concurrency or 'all'} at once")
            references.append(_reference(method, concurrency, load, measured, prompts, found))
    return _report(
        load,
        measured,
        found,
        run.cpu_s,
        head_cpu_s=run.head_cpu_s,
        references=references,
        events=run.events,
        points=run.timeline,
    )


def _report(
    load: OfferedLoad,
    measured: ServeMeasured,
    found: Figures,
    cpu_s: float,
    *,
    head_cpu_s: float | None = None,
    references: Sequence[Reference] = (),
    against: Against | None = None,
    events: Sequence[EventOutcome] = (),
    points: Sequence[TimelinePoint] = (),
) -> ServeReport:
    own = measured.url is None
    return ServeReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        model=measured.model if own else str(measured.url),
        ranks=measured.ranks if own else None,
        threads_per_rank=measured.threads_per_rank if own else None,
        offered=load.describe(),
        service=found,
        client_cpu_s=cpu_s,
        head_cpu_s=head_cpu_s,
        references=list(references),
        against=against,
        events=list(events),
        timeline=list(points),
    )


def run_against(
    load: OfferedLoad,
    measured: ServeMeasured,
    other: Target,
    url: str,
    rounds: int,
    note: Note,
    goals: LatencyGoals | None = None,
) -> ServeReport:
    """Measure a service and another server in turn; `service` of the report is the middle round.

    Args:
        url: of the other server, for people.

    Raises:
        FlexpertError
    """
    began = resource.getrusage(resource.RUSAGE_SELF)
    load, against = uvloop.run(
        _measure_against(load, measured, other, url, rounds, note, goals or {})
    )
    ended = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return _report(load, measured, against.middle.ours, cpu_s, against=against)


async def _measure_against(
    load: OfferedLoad,
    measured: ServeMeasured,
    other: Target,
    url: str,
    rounds: int,
    note: Note,
    goals: LatencyGoals,
) -> tuple[OfferedLoad, Against]:
    async with AsyncExitStack() as stack:
        theirs = await served_model(other)  # before a service of our own is started in vain
        target, _ = await _target(stack, measured, note)
        servers = [("ours", target, await served_model(target)), ("theirs", other, theirs)]
        load = await load.fitting(target)
        found: list[ServerTurn] = []
        for turn in range(rounds):
            seed = load.seed + 2 * turn
            prompts = await load.asked(target, seed)
            done: dict[str, Figures] = {}
            for whose, server, model in servers[:: -1 if turn % 2 else 1]:
                note(f"round {turn + 1} of {rounds}: {whose}")
                await warm_up(server, load, seed + 1, {"model": model})
                answers = await offer(server, load, prompts, {"model": model})
                done[whose] = figures_with_goodput(answers, goals)
            found.append(ServerTurn(**done))
        return load, Against.of(url, theirs, found)


async def _target(
    stack: AsyncExitStack, measured: ServeMeasured, note: Note
) -> tuple[Target, int | None]:
    """The service at the URL, or one of our own until the stack is left, and that one's pid."""
    if measured.url is not None:
        return Target.parse(measured.url, measured.key), None
    service = await stack.enter_async_context(own_service(measured.arguments(), report=note))
    return service.target, service.pid


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRun:
    """One load. prompts: as token ids, if desired. cpu_s: our own. head_cpu_s: of the
    head, if it is ours. load: as it was offered."""

    load: OfferedLoad
    answers: list[ClientAnswer]
    prompts: list[list[int]]
    cpu_s: float
    head_cpu_s: float | None
    events: list[EventOutcome]
    timeline: list[TimelinePoint]


async def measure(
    load: OfferedLoad,
    measured: ServeMeasured,
    note: Note,
    *,
    events: Sequence[TimedEvent] = (),
    tokens_wanted: bool = False,
) -> LoadRun:
    """Offer a load once, with what shall happen to the service meanwhile.

    Raises:
        FlexpertError
    """
    async with AsyncExitStack() as stack:
        target, pid = await _target(stack, measured, note)
        if events:
            check_events(events, await cluster_now(target))
        load = await load.fitting(target)
        prompts = await load.asked(target, load.seed)
        if load.warmup:
            note(f"warming up with {load.warmup} requests")
            await warm_up(target, load, load.seed + 1)
        note(load.describe())
        head_before = None if pid is None else processor_seconds(pid)
        before = resource.getrusage(resource.RUSAGE_SELF)
        begin = perf_counter()
        outcomes: list[EventOutcome] = []
        if events:
            run = EventRun(target, events)
            await run.start()
            begin = run.begin
            try:
                answers = await offer(target, load, prompts)
                outcomes = await run.finish(answers)
            finally:
                await run.cancel()
        else:
            answers = await offer(target, load, prompts)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        head_cpu_s = None
        if pid is not None and head_before is not None:
            head_cpu_s = processor_seconds(pid) - head_before
        ids = [
            await tokenize(target, prompt) if isinstance(prompt, str) else prompt
            for prompt in (prompts if tokens_wanted else ())
        ]
        points: list[TimelinePoint] = []
        if events or load.timed:
            end = max((answer.ended for answer in answers), default=begin)
            points = timeline(answers, begin, end, step_for(end - begin))
        return LoadRun(
            load=load,
            answers=answers,
            prompts=ids,
            cpu_s=cpu_s,
            head_cpu_s=head_cpu_s,
            events=outcomes,
            timeline=points,
        )


def _reference(
    method: reference.Method,
    concurrency: int | None,
    load: OfferedLoad,
    measured: ServeMeasured,
    prompts: list[list[int]],
    found: Figures,
) -> Reference:
    threads = measured.threads_per_rank * measured.ranks
    job = reference.ReferenceJob(
        model=measured.model,
        dtype=measured.dtype,
        threads=threads,
        method=method,
        prompts=prompts,
        output_tokens=load.answer_tokens(),
        concurrency=concurrency,
        warmup=min(load.warmup, 4),
    )
    try:
        result = asyncio.run(_run_reference(job))
    except FlexpertError as error:
        return Reference(method=method, concurrency=concurrency, threads=threads, error=str(error))
    speed = result.tokens / result.seconds
    return Reference(
        method=method,
        concurrency=concurrency,
        threads=threads,
        seconds=result.seconds,
        output_tokens=result.tokens,
        output_tokens_per_s=speed,
        ratio=found.output_tokens_per_s / speed,
        attention=result.attention,
    )


async def _run_reference(job: reference.ReferenceJob) -> reference.ReferenceResult:
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flexpert.bench.reference"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            # passive: on a machine that does anything else besides, threads that spin at
            # OpenMP's barriers cost it a factor of ten (2 cores, a third busy process: 69
            # tokens/s, and 704 with this)
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(job.threads),
                "OMP_WAIT_POLICY": "passive",
            },
        )
        try:
            output, _ = await process.communicate(msgspec.json.encode(job))
        except BaseException:
            process.kill()
            raise
        if process.returncode == 0:
            return msgspec.json.decode(output, type=reference.ReferenceResult)
        errors.seek(0)
        last = errors.read().decode("utf-8", "replace").strip().splitlines()[-1:]
        raise FlexpertError(f"exit status {process.returncode}: {' '.join(last)}")
