"""`flexpert bench autoscale`: a day's load, with all ranks, with the autoscaler, with foresight.

Services get the same requests at the same times: one with the largest number of ranks throughout,
one that scales itself (`--autoscale`), one whose ranks follow a schedule made by who knew the day,
and with kills one more that scales itself. What ranks can take on this machine is measured first:
it sets the peak of the day, the goals, and that schedule. All serve with `--deterministic`, so that
an answer that differs from the first service's is one that was altered.

They come one after the other, or all at once, each on cores of its own (`day_cores.py`).
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from flexpert.bench.day_cores import CoreGroups, do_at_once
from flexpert.bench.day_plan import (
    CapacityJob,
    DayJob,
    DayPlan,
    Job,
    RanksCapacity,
    autoscale_goals,
    goals_for,
    kill_times,
)
from flexpert.bench.day_service import DayResult, JobOutcome, Note, do_job
from flexpert.bench.day_trace import DayTrace
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.skewed_checkpoint import make_skewed_checkpoint

_ROOM = 0.9  # of what all ranks can take, at noon

DoJobs = Callable[[Sequence[Job]], Awaitable[list[JobOutcome]]]


class DayReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert bench autoscale`. autoscale: its goals as they were given. cores: of
    each service, where all were there at once; 0: one came after the other."""

    command: str
    machine: Machine
    seconds: float
    peak: float
    requests: int
    goals_ms: dict[str, float]
    autoscale: str
    flags: list[str]
    cores: int
    capacity: list[RanksCapacity]
    schedule: list[tuple[float, int]]
    results: list[DayResult]

    @property
    def harmed(self) -> int:
        """Requests that were lost or altered."""
        return sum(result.lost + result.altered for result in self.results)


def services(plan: DayPlan) -> int:
    """How many serve the day."""
    return 4 if plan.kills else 3


def run_days(plan: DayPlan, note: Note, *, groups: CoreGroups = ()) -> DayReport:
    """groups: cores for each of the services, all at once; (): one after the other, on all cores.

    Raises: FlexpertError: a service does not start, or stops answering.
    """
    with _with_model(plan) as whole:
        if groups:
            return asyncio.run(_run(whole, lambda jobs: do_at_once(jobs, groups, note), groups))
        return asyncio.run(_run(whole, lambda jobs: _one_by_one(jobs, note), groups))


async def _one_by_one(jobs: Sequence[Job], note: Note) -> list[JobOutcome]:
    return [await do_job(job, note) for job in jobs]


@contextmanager
def _with_model(plan: DayPlan) -> Iterator[DayPlan]:
    """The plan with a model of its own, if it wants one."""
    if not plan.larger_model:
        yield plan
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "random"
        make_skewed_checkpoint(model, hidden=512, inter=512, layers=8, hot=0)
        yield replace(plan, flags=("--model", str(model), *plan.flags))


async def _run(plan: DayPlan, do_jobs: DoJobs, groups: CoreGroups) -> DayReport:
    measured = await do_jobs(capacity_jobs(plan, len(groups)))
    capacity = sorted((one for each in measured for one in each.capacity), key=lambda c: c.ranks)
    goals_ms = dict(plan.goals_ms) or goals_for(capacity)
    peak = plan.peak or _ROOM * max(one.requests_per_s for one in capacity)
    day = DayTrace(plan.seconds, peak)
    schedule = day.schedule({one.ranks: one.requests_per_s for one in capacity})
    jobs = day_jobs(plan, peak, goals_ms, schedule)
    served = await do_jobs(jobs)
    first = served[0].texts
    results = [
        msgspec.structs.replace(each.day, altered=altered(first, each.texts))
        for each in served
        if each.day is not None
    ]
    return DayReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        seconds=plan.seconds,
        peak=peak,
        requests=results[0].figures.requests,
        goals_ms=goals_ms,
        autoscale=autoscale_goals(plan, goals_ms),
        flags=list(plan.service_flags()),
        cores=min(map(len, groups), default=0),
        capacity=capacity,
        schedule=schedule,
        results=results,
    )


def capacity_jobs(plan: DayPlan, at_once: int) -> list[Job]:
    """Each number of ranks once. at_once: how many can be measured beside each other; 0 or 1: one
    after the other, by one service."""
    lots = [list(range(1 + lot, plan.most + 1, max(1, at_once))) for lot in range(max(1, at_once))]
    return [CapacityJob(plan=plan, ranks=lot) for lot in lots if lot]


def day_jobs(
    plan: DayPlan,
    peak: float,
    goals_ms: dict[str, float],
    schedule: list[tuple[float, int]],
) -> list[Job]:
    """The first is the one with whose answers others are compared."""
    scaled = autoscale_goals(plan, goals_ms)
    fixed = DayJob(
        run="fixed", plan=plan, peak=peak, goals_ms=goals_ms, schedule=[(0.0, plan.most)]
    )
    change = msgspec.structs.replace
    alone = change(fixed, run="autoscaler", autoscale=scaled, schedule=[(0.0, 1)])
    jobs: list[Job] = [fixed, alone, change(fixed, run="oracle", schedule=schedule)]
    if plan.kills:
        jobs.append(change(alone, run="killed", kills=kill_times(plan)))
    return jobs


def altered(first: Sequence[str | None], texts: Sequence[str | None]) -> int:
    """Of requests that both services answered in full, how many differ. None: not in full."""
    pairs = zip(first, texts, strict=True)
    return sum(None not in pair and pair[0] != pair[1] for pair in pairs)
