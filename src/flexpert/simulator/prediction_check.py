"""`flexpert simulate check`: what the simulation says beside what a real service does.

The loads are none of those that the profile was fitted to: other lengths, numbers and rates.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import msgspec
import psutil
from rich.table import Table

from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.report_table import figures_table
from flexpert.bench.service import own_service
from flexpert.bench.statistics import Figures, figures
from flexpert.bench.timed_events import TimedEvent, parse_event
from flexpert.errors import ConfigError, FlexpertError
from flexpert.simulator.calibration import REFERENCE, CalibrationPlan, settings_of
from flexpert.simulator.cost_profile import CostProfile, FittedRun
from flexpert.simulator.real_runs import random_load, real_run, served_shape
from flexpert.simulator.simulation import simulate

Note = Callable[[str], None]

GOAL = 0.15  # of an error
_KNOWN_EVERY = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckPlan:
    """runs: how many, at most those there are. repeats: of each on the real service; with other
    prompts, in an order of chance. flags: of the service; those of the profile come
    first."""

    profile: CostProfile
    runs: int = 5
    repeats: int = 2
    seed: int = 0
    flags: tuple[str, ...] = ()


class ComparedFigure(msgspec.Struct, frozen=True, kw_only=True):
    """error: of what was predicted, relative to what was measured. measured: the median of the
    repeats; spread: the largest less the smallest, relative to it."""

    predicted: float
    measured: float
    spread: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else 0.0


class ComparedRun(msgspec.Struct, frozen=True, kw_only=True):
    """ranks: at the begin."""

    load: str
    ranks: int
    event: str | None
    tokens_per_s: ComparedFigure
    first_token_ms: ComparedFigure
    inter_token_ms: ComparedFigure

    @property
    def errors(self) -> list[float]:
        return [one.error for one in self.compared]

    @property
    def compared(self) -> list[ComparedFigure]:
        return [self.tokens_per_s, self.first_token_ms, self.inter_token_ms]


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert simulate check`.

    drift: a load that was fitted to takes so many times as long now as it did then; None: the
    profile has none. mean_errors, mean_spreads: of tokens/s, time to first token and inter-token
    latency, without their signs.
    """

    command: str
    machine: Machine
    load_average: float
    drift: float | None
    runs: list[ComparedRun]
    mean_errors: list[float]
    mean_spreads: list[float]
    within: int
    figures: int


def run_check(plan: CheckPlan, note: Note) -> CheckReport:
    """Raises: FlexpertError"""
    runs, drift = asyncio.run(_compare(plan, note))
    errors = [[abs(error) for error in run.errors] for run in runs]
    return CheckReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        machine=this_machine(),
        load_average=psutil.getloadavg()[0],
        drift=drift,
        runs=runs,
        mean_errors=[fmean(each) for each in zip(*errors, strict=True)],
        mean_spreads=[
            fmean(one.spread for one in each)
            for each in zip(*(run.compared for run in runs), strict=True)
        ],
        within=sum(error <= GOAL for run in errors for error in run),
        figures=sum(map(len, errors)),
    )


def check_loads(ranks: int, seed: int) -> list[tuple[OfferedLoad, int, TimedEvent | None]]:
    """With ranks at the begin; some seconds each. ranks: the most."""
    event = parse_event(f"t=1 scale {ranks}") if ranks > 1 else None
    return [
        (random_load(192, 10, 90, 60, seed + 1), 1, None),
        (random_load(384, 24, 50, 40, seed + 2), ranks, None),
        (random_load(32, 1, 110, 30, seed + 3, rate=7.0), 1, None),
        (random_load(480, 24, 40, 60, seed + 4), 1, event),
        (random_load(40, 1, 300, 20, seed + 5, rate=6.0), ranks, None),
        (random_load(96, 6, 500, 40, seed + 6), 1, None),
        (random_load(640, 80, 30, 50, seed + 7), ranks, None),
    ]


async def _compare(plan: CheckPlan, note: Note) -> tuple[list[ComparedRun], float | None]:
    profile = plan.profile
    shape = profile.shape
    calibrated = CalibrationPlan(ranks=profile.ranks, flags=(*profile.flags, *plan.flags))
    flags = calibrated.service_flags()
    async with own_service(flags, start_timeout_s=300.0) as service:
        here = await served_shape(service, flags)
        if here != shape:
            raise ConfigError(f"the profile is of another service: {shape}, and this one is {here}")
        await real_run(service, random_load(8, 8, 64, 32, plan.seed + 50), 1)
        loads = check_loads(profile.ranks, 7000 + plan.seed * 1000)[: plan.runs]
        real: list[list[Figures]] = [[] for _ in loads]
        order = [index for index in range(len(loads)) for _ in range(plan.repeats)]
        random.Random(plan.seed).shuffle(order)
        known: list[float] = []  # seconds of what was fitted to, between the others
        for place, index in enumerate(order):
            if place % _KNOWN_EVERY == 0:
                known.append((await real_run(service, _known(place), 1)).seconds)
            load, ranks, event = loads[index]
            again = replace(load, seed=load.seed + 100 * len(real[index]))
            note(f"{ranks} ranks: {again.describe()}{f', {event.text}' if event else ''}")
            run = await real_run(service, again, ranks, [event] if event else [])
            failed = next((one for one in run.outcomes if one.failed), None)
            if failed is not None:
                raise FlexpertError(f"{failed.what}: {failed.state} {failed.error or ''}")
            real[index].append(figures(run.answers))
    found: list[ComparedRun] = []
    for (load, ranks, event), measured in zip(loads, real, strict=True):
        settings = settings_of(shape, ranks, profile.ranks + 1)
        predicted = simulate(load, settings, profile, events=[event] if event else [])
        found.append(_compared(load, ranks, event, figures(predicted.answers), measured))
    then = [run.measured_s for run in profile.runs if _is_known(run)]
    return found, median(known) / median(then) if then else None


def _known(seed: int) -> OfferedLoad:
    """A load of the calibration, with other prompts."""
    return random_load(*REFERENCE, seed=8000 + seed)


def _is_known(run: FittedRun) -> bool:
    return run.ranks == 1 and run.load.split(", seed")[0] == _known(0).describe().split(", seed")[0]


def _compared(
    load: OfferedLoad,
    ranks: int,
    event: TimedEvent | None,
    predicted: Figures,
    measured: Sequence[Figures],
) -> ComparedRun:
    def compare(of: Callable[[Figures], float]) -> ComparedFigure:
        values = [of(one) for one in measured]
        middle = median(values)
        spread = (max(values) - min(values)) / middle
        return ComparedFigure(predicted=of(predicted), measured=middle, spread=spread)

    return ComparedRun(
        load=load.describe(),
        ranks=ranks,
        event=event.text if event else None,
        tokens_per_s=compare(lambda one: one.output_tokens_per_s),
        first_token_ms=compare(lambda one: one.first_token_ms.mean if one.first_token_ms else 0.0),
        inter_token_ms=compare(lambda one: one.inter_token_ms.mean if one.inter_token_ms else 0.0),
    )


def check_text(report: CheckReport) -> Table:
    """Prediction / measurement and the error, of each run."""
    table = figures_table(
        "predicted / measured", "", ("tokens/s", "", "ttft, ms", "", "itl, ms", "")
    )
    table.caption = (
        f"{report.within} of {report.figures} within {GOAL:.0%}; {report.machine.line()}, "
        f"load average {report.load_average:.1f}"
    )
    for run in report.runs:
        what = f"{run.ranks} ranks, {run.load}{f', {run.event}' if run.event else ''}"
        cells = []
        for one, digits in (
            (run.tokens_per_s, 0),
            (run.first_token_ms, 1),
            (run.inter_token_ms, 1),
        ):
            cells += [
                f"{one.predicted:,.{digits}f} / {one.measured:,.{digits}f}",
                f"{one.error:+.0%}",
            ]
        table.add_row(what, *cells)
    table.add_section()
    means = [cell for error in report.mean_errors for cell in ("", f"{error:.0%}")]
    table.add_row("mean error", *means)
    spreads = [cell for spread in report.mean_spreads for cell in ("", f"{spread:.0%}")]
    table.add_row("repeats of the real service differ by", *spreads)
    if report.drift is not None:
        table.add_row(
            "a load of the calibration takes now, of the time it took then", f"{report.drift:.0%}"
        )
    return table
