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
from pathlib import Path

import msgspec

from flexpert.bench import reference
from flexpert.bench.load import (
    ClientAnswer,
    Target,
    closed_loop,
    complete,
    completion_body,
    open_loop,
    poisson_arrivals,
)
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.other_server import Against, ServerTurn, served_model
from flexpert.bench.prompts import Prompt, random_prompts, read_prompts, token_pool, tokenize
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.errors import FlexpertError

STALL_S = 120.0

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """What is asked, and how fast. prompts: a file; None: random ones.

    request_rate: arrivals a second; None: `concurrency` clients without a pause.
    """

    prompts: Path | None = None
    count: int
    input_tokens: int
    output_tokens: int
    concurrency: int
    request_rate: float | None = None
    warmup: int
    seed: int


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
    """The JSON of `flexpert bench serve`. client_cpu_s: what measuring itself cost."""

    command: str
    machine: Machine
    model: str
    ranks: int | None
    threads_per_rank: int | None
    offered: str
    service: Figures
    client_cpu_s: float
    references: list[Reference] = []
    against: Against | None = None


def run_bench(
    load: OfferedLoad, measured: ServeMeasured, *, compare: bool, note: Note
) -> ServeReport:
    """Measure; the service of our own is gone before transformers has its turn.

    Raises:
        FlexpertError
    """
    answers, prompts, cpu_s = asyncio.run(measure(load, measured, compare, note))
    found = figures(answers)
    references = []
    if compare:
        # continuous batching both as the service is asked and as it knows all of its work
        ways: list[tuple[reference.Method, int | None]] = [("generate_batch", None)]
        if load.request_rate is None and load.concurrency < load.count:
            ways.insert(0, ("generate_batch", load.concurrency))
        for method, concurrency in (*ways, ("generate", None)):
            note(f"transformers: {method}, {concurrency or 'all'} at once")
            references.append(_reference(method, concurrency, load, measured, prompts, found))
    return _report(load, measured, found, cpu_s, references=references)


def _report(
    load: OfferedLoad,
    measured: ServeMeasured,
    found: Figures,
    cpu_s: float,
    *,
    references: Sequence[Reference] = (),
    against: Against | None = None,
) -> ServeReport:
    own = measured.url is None
    return ServeReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        model=measured.model if own else str(measured.url),
        ranks=measured.ranks if own else None,
        threads_per_rank=measured.threads_per_rank if own else None,
        offered=describe(load),
        service=found,
        client_cpu_s=cpu_s,
        references=list(references),
        against=against,
    )


def describe(load: OfferedLoad) -> str:
    """The load in words."""
    what = f"prompts of {load.prompts}" if load.prompts else f"{load.input_tokens} random tokens in"
    if load.request_rate is None:
        how = f"{load.concurrency} at once"
    else:
        how = f"{load.request_rate:g} arrive a second"
    return f"{load.count} requests, {what}, {load.output_tokens} out, {how}, seed {load.seed}"


def run_against(
    load: OfferedLoad, measured: ServeMeasured, other: Target, url: str, rounds: int, note: Note
) -> ServeReport:
    """Measure a service and another server in turn; `service` of the report is the middle round.

    Args:
        url: of the other server, for people.

    Raises:
        FlexpertError
    """
    began = resource.getrusage(resource.RUSAGE_SELF)
    against = asyncio.run(_measure_against(load, measured, other, url, rounds, note))
    ended = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    return _report(load, measured, against.middle.ours, cpu_s, against=against)


async def _measure_against(
    load: OfferedLoad, measured: ServeMeasured, other: Target, url: str, rounds: int, note: Note
) -> Against:
    async with AsyncExitStack() as stack:
        theirs = await served_model(other)  # before a service of our own is started in vain
        target = await _target(stack, measured, note)
        servers = [("ours", target, await served_model(target)), ("theirs", other, theirs)]
        pool = await token_pool(target)
        arrivals = None
        if load.request_rate is not None:
            arrivals = poisson_arrivals(load.request_rate, load.count, load.seed)
        found: list[ServerTurn] = []
        for turn in range(rounds):
            seed = load.seed + 2 * turn
            prompts = await _prompts(target, load, seed)
            warm = random_prompts(pool, load.input_tokens, load.warmup, seed + 1)
            done: dict[str, Figures] = {}
            for whose, server, model in servers[:: -1 if turn % 2 else 1]:
                note(f"round {turn + 1} of {rounds}: {whose}")
                warmed = await _offer(server, load, warm, None, model)
                if warmed and all(answer.error for answer in warmed):
                    raise FlexpertError(f"{server.host}:{server.port} fails: {warmed[0].error}")
                done[whose] = figures(await _offer(server, load, prompts, arrivals, model))
            found.append(ServerTurn(**done))
        return Against.of(url, theirs, found)


async def _target(stack: AsyncExitStack, measured: ServeMeasured, note: Note) -> Target:
    """The service at the URL, or one of our own until the stack is left."""
    if measured.url is not None:
        return Target.parse(measured.url, measured.key)
    service = own_service(measured.arguments(), report=note)
    return (await stack.enter_async_context(service)).target


async def measure(
    load: OfferedLoad, measured: ServeMeasured, tokens_wanted: bool, note: Note
) -> tuple[list[ClientAnswer], list[list[int]], float]:
    """Answers, the prompts as token ids if desired, and our own CPU seconds."""
    async with AsyncExitStack() as stack:
        target = await _target(stack, measured, note)
        prompts = await _prompts(target, load, load.seed)
        if load.warmup:
            note(f"warming up with {load.warmup} requests")
            # other prompts than those measured, else the prefix cache would know them
            pool = await token_pool(target)
            warm = random_prompts(pool, load.input_tokens, load.warmup, load.seed + 1)
            warmed = await _offer(target, load, warm, arrivals=None)
            if all(answer.error for answer in warmed):
                raise FlexpertError(f"the service does not answer: {warmed[0].error}")
        note(describe(load))
        arrivals = None
        if load.request_rate is not None:
            arrivals = poisson_arrivals(load.request_rate, load.count, load.seed)
        before = resource.getrusage(resource.RUSAGE_SELF)
        answers = await _offer(target, load, prompts, arrivals)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ids = [
            await tokenize(target, prompt) if isinstance(prompt, str) else prompt
            for prompt in (prompts if tokens_wanted else ())
        ]
        return answers, ids, cpu_s


async def _prompts(target: Target, load: OfferedLoad, seed: int) -> list[Prompt]:
    if load.prompts is not None:
        return read_prompts(load.prompts, load.count)
    return random_prompts(await token_pool(target), load.input_tokens, load.count, seed)


async def _offer(
    target: Target,
    load: OfferedLoad,
    prompts: list[Prompt],
    arrivals: list[float] | None,
    model: str | None = None,
) -> list[ClientAnswer]:
    """model: its name, for servers that must be told; None: the one that is served."""
    named = {} if model is None else {"model": model}
    requests = [
        target.message(
            "POST",
            "/v1/completions",
            completion_body(
                prompt, max_tokens=load.output_tokens, ignore_eos=True, temperature=0.0, **named
            ),
        )
        for prompt in prompts
    ]

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number], stall_s=STALL_S)

    if arrivals is not None:
        return await open_loop(send, arrivals)
    return await closed_loop(send, len(requests), load.concurrency)


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
        output_tokens=[load.output_tokens] * len(prompts),
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
