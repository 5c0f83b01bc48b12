"""One service of `flexpert bench autoscale`: what its ranks take, or its day."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from time import perf_counter

import msgspec

from flexpert.bench.cluster_history import BACK_S, all_back, change_ranks, cluster_now, events_since
from flexpert.bench.day_plan import CapacityJob, DayJob, DayPlan, Job, RanksCapacity, RunName
from flexpert.bench.day_trace import DayTrace, flips
from flexpert.bench.goodput import figures_with_goodput
from flexpert.bench.load import (
    ClientAnswer,
    LoadError,
    Target,
    closed_loop,
    complete,
    completion_body,
    open_loop,
)
from flexpert.bench.load_timeline import TimelinePoint, step_for, timeline
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.ranks_history import ranks_history
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.bench.timed_events import kill_rank
from flexpert.errors import FlexpertError

_STALL_S = 120.0
_LOOK_S = 0.05
_WARM_UP = 6
_SETTLED = 3.0  # times `settle_s`, in which the autoscaler is back at one rank

Note = Callable[[str], None]


class DayResult(msgspec.Struct, frozen=True, kw_only=True):
    """One service's day. rank_seconds: of all ranks, from being asked for until they left.
    changes: how often the number of ranks was changed; flips: how often that turned from up to down
    or back. sizes: (seconds after midnight, active ranks). altered: answers that differ from the
    first service's. killed: seconds after midnight. decisions: the autoscaler's, that led to a
    change, with their reasons.
    """

    run: RunName
    figures: Figures
    rank_seconds: float
    changes: int
    failed_changes: int
    flips: int
    lost: int
    altered: int
    sizes: list[tuple[float, int]]
    killed: list[float]
    decisions: list[tuple[float, str]]
    timeline: list[TimelinePoint]

    @property
    def kept(self) -> float:
        """The share of requests that kept to the goals."""
        return self.figures.goodput.share if self.figures.goodput else 0.0


class JobOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """capacity: of a CapacityJob. day, texts: of a DayJob, its answers; None: one that was not
    whole."""

    capacity: list[RanksCapacity] = []
    day: DayResult | None = None
    texts: list[str | None] = []


async def do_job(job: Job, note: Note) -> JobOutcome:
    """With a service of its own.

    Raises: FlexpertError: it does not start, or stops answering.
    """
    if isinstance(job, CapacityJob):
        async with _service(job.plan, job.ranks[0], None, note) as target:
            return JobOutcome(capacity=await _calibrate(target, job, note))
    (_, ranks), *_ = job.schedule
    async with _service(job.plan, ranks, job.autoscale, note) as target:
        return await _serve_day(job, target, note)


@asynccontextmanager
async def _service(
    plan: DayPlan, ranks: int, autoscale: str | None, note: Note
) -> AsyncIterator[Target]:
    """A service of these ranks that has answered something."""
    scaled = () if autoscale is None else ("--autoscale", autoscale)
    arguments = ("--ranks", str(ranks), *plan.service_flags(), *scaled)
    async with own_service(arguments, start_timeout_s=300.0) as service:
        target = service.target
        note(f"{ranks} ranks{'' if autoscale is None else f', --autoscale {autoscale}'}: ready")
        send = await _sender(target, plan, _WARM_UP, plan.seed + 1)
        warmed = await closed_loop(send, _WARM_UP, 1)
        if all(answer.error for answer in warmed):
            raise FlexpertError(f"the service does not answer: {warmed[0].error}")
        if autoscale is not None:
            await _at_rest(target, ranks, _SETTLED * plan.settle_s)
        yield target


async def _at_rest(target: Target, ranks: int, wait_s: float) -> None:
    """Until an autoscaler to which the first requests seemed slow has so few ranks again; it need
    not."""
    until = perf_counter() + wait_s
    while perf_counter() < until:
        view = await cluster_now(target)
        if view.operation is None and len(view.ranks) == ranks:
            return
        await asyncio.sleep(_LOOK_S)


Sender = Callable[[int], Awaitable[ClientAnswer]]


async def _sender(target: Target, plan: DayPlan, count: int, seed: int) -> Sender:
    """What sends the request of a number."""
    prompts = random_prompts(await token_pool(target), plan.input_tokens, count, seed)
    requests = [
        target.message(
            "POST",
            "/v1/completions",
            completion_body(
                prompt, max_tokens=plan.output_tokens, ignore_eos=True, temperature=0.0
            ),
        )
        for prompt in prompts
    ]

    async def send(number: int) -> ClientAnswer:
        return await complete(target, requests[number % count], stall_s=_STALL_S)

    return send


async def _calibrate(target: Target, job: CapacityJob, note: Note) -> list[RanksCapacity]:
    """Of one number of ranks after the other."""
    plan, found = job.plan, []
    for ranks in job.ranks:
        await _scale(target, ranks)
        send = await _sender(target, plan, 4096, plan.seed + 1 + ranks)
        until = perf_counter() + plan.calibrate_s
        answers = await closed_loop(send, _until(until), ranks * plan.max_running)
        done = figures(answers)
        if done.failed or not (done.first_token_ms and done.inter_token_ms and done.end_to_end_ms):
            raise FlexpertError(f"the service does not answer: {done.errors[:1]}")
        one = RanksCapacity(
            ranks=ranks,
            requests_per_s=done.requests_per_s,
            first_token_ms=done.first_token_ms.p50,
            inter_token_p99_ms=done.inter_token_ms.p99,
            end_to_end_ms=done.end_to_end_ms.p50,
        )
        note(
            f"{ranks} ranks take {one.requests_per_s:.1f} requests a second, each in "
            f"{one.end_to_end_ms:.0f} ms"
        )
        found.append(one)
    return found


def _until(end: float) -> Iterator[int]:
    """Numbers of requests, as long as it is not that late on `perf_counter`."""
    for number in itertools.count():
        if perf_counter() >= end:
            return
        yield number


async def _scale(target: Target, ranks: int) -> None:
    """Again while it is refused or fails, because a rank is being replaced. Raises: LoadError"""
    until = perf_counter() + BACK_S
    while True:
        try:
            operation = await change_ranks(target, {"ranks": ranks})
            if operation.state == "done":
                return
            error = operation.error or operation.state
        except LoadError as refused:
            error = str(refused)
        if perf_counter() > until:
            raise LoadError(f"{ranks} ranks could not be had: {error}")
        await asyncio.sleep(_LOOK_S)


async def _serve_day(job: DayJob, target: Target, note: Note) -> JobOutcome:
    plan, day = job.plan, DayTrace(job.plan.seconds, job.peak)
    arrivals = day.arrivals(plan.seed)
    send = await _sender(target, plan, len(arrivals), plan.seed)
    killed: list[float] = []
    before = await cluster_now(target)
    begin, wall = perf_counter(), time.time()
    actions = [
        asyncio.create_task(_follow(target, job.schedule[1:], begin)),
        asyncio.create_task(_kill(target, job, begin, killed)),
    ]
    try:
        answers = await open_loop(send, arrivals)
        await asyncio.gather(*actions)
    finally:
        for task in actions:
            task.cancel()
        await asyncio.gather(*actions, return_exceptions=True)
    end = max(begin + plan.seconds, perf_counter())
    await all_back(target)
    found = ranks_history(before, await events_since(target, before.cursor), wall, plan.seconds)
    result = DayResult(
        run=job.run,
        figures=figures_with_goodput(answers, job.goals_ms),
        rank_seconds=found.rank_seconds,
        changes=found.changes,
        failed_changes=found.failed,
        flips=flips(found.targets),
        lost=sum(not answer.whole for answer in answers),
        altered=0,
        sizes=found.sizes,
        killed=killed,
        decisions=found.decisions,
        timeline=timeline(answers, begin, end, step_for(end - begin)),
    )
    note(
        f"{result.kept:.1%} kept to the goals, {result.rank_seconds:.0f} rank-seconds, "
        f"{result.changes} changes, {result.lost} lost"
    )
    texts = [answer.text if answer.whole else None for answer in answers]
    return JobOutcome(day=result, texts=texts)


async def _follow(target: Target, schedule: Sequence[tuple[float, int]], begin: float) -> None:
    for at, ranks in schedule:
        await asyncio.sleep(max(0.0, begin + at - perf_counter()))
        await _scale(target, ranks)


async def _kill(target: Target, job: DayJob, begin: float, killed: list[float]) -> None:
    """Any active rank, by the seed."""
    source = random.Random(job.plan.seed)
    for at in job.kills:
        await asyncio.sleep(max(0.0, begin + at - perf_counter()))
        active = [r for r in (await cluster_now(target)).ranks if r.state == "active"]
        if active:
            kill_rank(source.choice(active))
            killed.append(perf_counter() - begin)
