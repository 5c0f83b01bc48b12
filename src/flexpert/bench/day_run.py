"""`flexpert bench autoscale`: a day's load, with all ranks, with the autoscaler, with foresight.

Three services, one after the other, get the same requests at the same times: one with the largest
number of ranks throughout, one that scales itself (`--autoscale`), and one whose ranks follow a
schedule made by who knew the day. What ranks can take on this machine is measured first: it sets
the peak of the day, the goals, and that schedule. All serve with `--deterministic`, so that an
answer that differs from the first service's is one that was altered.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import msgspec

from flexpert.bench.cluster_history import BACK_S, all_back, change_ranks, cluster_now, events_since
from flexpert.bench.day_trace import EVENING, NOON, DayTrace, flips
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
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.prompts import random_prompts, token_pool
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.bench.timed_events import kill_rank
from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView
from flexpert.errors import FlexpertError

RunName = Literal["fixed", "autoscaler", "oracle"]
RUNS: tuple[RunName, ...] = ("fixed", "autoscaler", "oracle")

_STALL_S = 120.0
_LOOK_S = 0.05
_WARM_UP = 6
_SETTLED = 3.0  # times `settle_s`, in which the autoscaler is back at one rank
_FIRST_MS, _GAP_MS = 500.0, 50.0  # goals are not closer than these
_ROOM = 0.9  # of what all ranks can take, at noon
_OF_GOAL = 0.5  # the autoscaler is given half of the clients' time to the first token

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DayPlan:
    """seconds: of the day. peak: requests a second at noon; None: by what ranks can take. goals_ms:
    as for `bench serve`; {}: by what was measured. calibrate_s: for each number of ranks. most: the
    largest number of ranks. autoscale: the autoscaler's goals of latencies, as "ttft_p99=0.5s"; "":
    by those of the requests. settle_s, every_s: the autoscaler's. flags: of all services, besides.
    """

    seconds: float
    most: int
    max_running: int
    input_tokens: int
    output_tokens: int
    peak: float | None
    goals_ms: Mapping[str, float]
    calibrate_s: float
    settle_s: float
    every_s: float
    autoscale: str = ""
    kills: int
    seed: int
    flags: tuple[str, ...] = ()

    def service_flags(self) -> tuple[str, ...]:
        return (
            *("--max-ranks", str(self.most), "--max-running", str(self.max_running)),
            *("--deterministic", "--threads", "1", "--kv-memory", "32MiB"),
            *("--log-level", "warning", "--shutdown-timeout", "0"),
            *self.flags,
        )


class RanksCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What so many ranks did, each with as many requests as it may run."""

    ranks: int
    requests_per_s: float
    first_token_ms: float
    inter_token_p99_ms: float
    end_to_end_ms: float


class DayResult(msgspec.Struct, frozen=True, kw_only=True):
    """One service's day. rank_seconds: of all ranks, from being asked for until they left.
    changes: how often the number of ranks was changed; flips: how often that turned from up to down
    or back. sizes: (seconds after midnight, active ranks). altered: answers that differ from the
    first service's. killed: seconds after midnight.
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
    timeline: list[TimelinePoint]

    @property
    def kept(self) -> float:
        """The share of requests that kept to the goals."""
        return self.figures.goodput.share if self.figures.goodput else 0.0


class DayReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert bench autoscale`. autoscale: its goals as they were given."""

    command: str
    machine: Machine
    seconds: float
    peak: float
    requests: int
    goals_ms: dict[str, float]
    autoscale: str
    flags: list[str]
    capacity: list[RanksCapacity]
    schedule: list[tuple[float, int]]
    results: list[DayResult]

    @property
    def harmed(self) -> int:
        """Requests that were lost or altered."""
        return sum(result.lost + result.altered for result in self.results)


def run_days(plan: DayPlan, note: Note) -> DayReport:
    """Raises: FlexpertError: a service does not start, or stops answering."""
    return asyncio.run(_run(plan, note))


def goals_for(capacity: Sequence[RanksCapacity]) -> dict[str, float]:
    """Goals that a service that keeps up meets: a request may wait for as long as several answers
    take, and for its tokens three times as long as they took when all ranks were full."""
    full = capacity[-1]
    first_ms = max(_FIRST_MS, 4.0 * max(one.end_to_end_ms for one in capacity))
    return {
        "ttft": float(round(first_ms, -1)),
        "itl": float(round(max(_GAP_MS, 3.0 * full.inter_token_p99_ms))),
    }


def autoscale_goals(plan: DayPlan, goals_ms: Mapping[str, float]) -> str:
    """For `--autoscale`, unless the plan has them: half of the clients' time to the first token. Of
    gaps it is told only where that is all there is: on cores that ranks share, more of them make no
    gap shorter."""
    goals = plan.autoscale
    if not goals and "ttft" in goals_ms:
        goals = f"ttft_p99={goals_ms['ttft'] * _OF_GOAL:g}ms"
    elif not goals and "itl" in goals_ms:
        goals = f"itl_p99={goals_ms['itl']:g}ms"
    parts = ("min=1", f"max={plan.most}", goals, f"settle={plan.settle_s:g}s")
    return ",".join(filter(None, (*parts, f"every={plan.every_s:g}s")))


def kill_times(plan: DayPlan) -> list[float]:
    """One at noon, two also in the evening, more throughout the day."""
    if plan.kills <= 2:
        return [share * plan.seconds for share in (NOON, EVENING)[: plan.kills]]
    return [(number + 0.5) / plan.kills * plan.seconds for number in range(plan.kills)]


async def _run(plan: DayPlan, note: Note) -> DayReport:
    capacity: list[RanksCapacity] = []
    results: list[DayResult] = []
    texts: list[ClientAnswer] = []
    async with _service(plan, plan.most, None, note) as target:
        capacity = await _calibrate(target, plan, note)
        goals_ms = dict(plan.goals_ms) or goals_for(capacity)
        peak = plan.peak or _ROOM * max(one.requests_per_s for one in capacity)
        day = DayTrace(plan.seconds, peak)
        schedule = day.schedule({one.ranks: one.requests_per_s for one in capacity})
        note(
            f"a day of {plan.seconds:g} s with {peak:.1f} requests a second at noon; goals: "
            + ", ".join(f"{name} {limit:g} ms" for name, limit in goals_ms.items())
        )
        served = _DayRun(target, plan, day, goals_ms, note)
        results.append(await served.measure("fixed", [], texts))
    autoscale = autoscale_goals(plan, goals_ms)
    results += [
        await measure_day(
            "autoscaler", plan, day, goals_ms, note, autoscale=autoscale, texts=texts
        ),
        await measure_day("oracle", plan, day, goals_ms, note, schedule=schedule, texts=texts),
    ]
    return DayReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        seconds=plan.seconds,
        peak=peak,
        requests=results[0].figures.requests,
        goals_ms=goals_ms,
        autoscale=autoscale,
        flags=list(plan.service_flags()),
        capacity=capacity,
        schedule=schedule,
        results=results,
    )


async def measure_day(
    run: RunName,
    plan: DayPlan,
    day: DayTrace,
    goals_ms: Mapping[str, float],
    note: Note,
    *,
    autoscale: str | None = None,
    schedule: Sequence[tuple[float, int]] = ((0.0, 1),),
    texts: Sequence[ClientAnswer] = (),
) -> DayResult:
    """The day of a service of its own.

    Args:
        autoscale: goals, if it scales itself.
        schedule: seconds after midnight and ranks, from midnight on.
        texts: the first service's answers; () if this is the first.

    Raises: FlexpertError
    """
    (_, ranks), *changes = schedule
    async with _service(plan, ranks, autoscale, note) as target:
        served = _DayRun(target, plan, day, goals_ms, note)
        return await served.measure(run, changes, list(texts))


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


async def _calibrate(target: Target, plan: DayPlan, note: Note) -> list[RanksCapacity]:
    """Of one rank, of two, and so on."""
    found = []
    for ranks in range(1, plan.most + 1):
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


@dataclass(slots=True)
class _DayRun:
    """One service's day."""

    target: Target
    plan: DayPlan
    day: DayTrace
    goals_ms: Mapping[str, float]
    note: Note

    async def measure(
        self, run: RunName, schedule: Sequence[tuple[float, int]], texts: list[ClientAnswer]
    ) -> DayResult:
        """texts: the first service's answers, which this call adds if there are none yet."""
        plan = self.plan
        arrivals = self.day.arrivals(plan.seed)
        send = await _sender(self.target, plan, len(arrivals), plan.seed)
        killed: list[float] = []
        before = await cluster_now(self.target)
        begin, wall = perf_counter(), time.time()
        actions = [
            asyncio.create_task(self._follow(schedule, begin)),
            asyncio.create_task(self._kill(begin, killed)),
        ]
        try:
            answers = await open_loop(send, arrivals)
            await asyncio.gather(*actions)
        finally:
            for task in actions:
                task.cancel()
            await asyncio.gather(*actions, return_exceptions=True)
        end = max(begin + plan.seconds, perf_counter())
        await all_back(self.target)
        history = await events_since(self.target, before.cursor)
        first = not texts
        if first:
            texts += answers
        found = ranks_history(before, history, wall, plan.seconds)
        result = DayResult(
            run=run,
            figures=figures_with_goodput(answers, self.goals_ms),
            rank_seconds=found.rank_seconds,
            changes=found.changes,
            failed_changes=found.failed,
            flips=flips(found.targets),
            lost=sum(not answer.whole for answer in answers),
            altered=altered(texts, answers),
            sizes=found.sizes,
            killed=killed,
            timeline=timeline(answers, begin, end, step_for(end - begin)),
        )
        self.note(
            f"{run}: {result.kept:.1%} kept to the goals, {result.rank_seconds:.0f} rank-seconds, "
            f"{result.changes} changes, {result.lost} lost, {result.altered} altered"
        )
        return result

    async def _follow(self, schedule: Sequence[tuple[float, int]], begin: float) -> None:
        for at, ranks in schedule:
            await asyncio.sleep(max(0.0, begin + at - perf_counter()))
            await _scale(self.target, ranks)

    async def _kill(self, begin: float, killed: list[float]) -> None:
        """Any active rank, by the seed."""
        source = random.Random(self.plan.seed)
        for at in kill_times(self.plan):
            await asyncio.sleep(max(0.0, begin + at - perf_counter()))
            active = [r for r in (await cluster_now(self.target)).ranks if r.state == "active"]
            if active:
                kill_rank(source.choice(active))
                killed.append(perf_counter() - begin)


def altered(first: Sequence[ClientAnswer], answers: Sequence[ClientAnswer]) -> int:
    """Of requests that both services answered in full, how many differ."""
    pairs = zip(first, answers, strict=True)
    return sum(one.whole and two.whole and one.text != two.text for one, two in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksHistory:
    """What became of the ranks in a day. targets: sizes that were asked for, from the first on."""

    rank_seconds: float
    changes: int
    failed: int
    targets: list[int]
    sizes: list[tuple[float, int]]


def ranks_history(
    before: ClusterView,
    history: Sequence[ClusterEvent],
    wall: float,
    seconds: float,
) -> RanksHistory:
    """From the events since `before`. wall: when the day began, in seconds since 1970."""
    end = wall + seconds
    active = sum(rank.state == "active" for rank in before.ranks)
    sizes, targets = [(0.0, active)], [active]
    total, since = 0.0, wall
    changes = failed = 0
    for event in history:
        at = min(max(event.time, wall), end)
        if event.kind == "epoch":
            total += active * (at - since)
            active, since = len(event.data["ranks"]), at
            if event.time <= end:
                sizes.append((event.time - wall, active))
        elif event.kind == "operation":
            view = msgspec.convert(event.data, OperationView)
            if view.state in ("preparing", "committing") or view.created > end:
                continue
            # a rank that is asked for takes a process until it is active, or the change has failed
            total += len(view.add) * max(0.0, at - max(view.created, wall))
            if view.purpose == "request" and (view.add or view.remove):
                changes += view.state == "done"
                failed += view.state != "done"
                if view.state == "done":
                    targets.append(len(view.target))
    total += active * (end - since)
    return RanksHistory(
        rank_seconds=total, changes=changes, failed=failed, targets=targets, sizes=sizes
    )
