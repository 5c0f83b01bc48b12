"""`flexpert simulate run`: what a load would give, as `bench serve` would measure it (pure)."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.bench.goodput import figures_with_goodput
from flexpert.bench.load_timeline import TimelinePoint, bars, step_for, timeline
from flexpert.bench.machine import Machine
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.report_table import figures_table
from flexpert.bench.statistics import Figures, Summary, longest_gap
from flexpert.bench.timed_events import TimedEvent
from flexpert.simulator.cost_profile import CostProfile
from flexpert.simulator.simulated_service import QueueSample, SimulatedChange, SimulatedSettings
from flexpert.simulator.simulation import fitting_load, simulate

_AFTER_S = 0.5  # in which a gap may begin that a change has caused


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationPlan:
    """goals_ms: as of `bench serve --goodput`."""

    load: OfferedLoad
    settings: SimulatedSettings
    profile: CostProfile
    events: Sequence[TimedEvent] = ()
    goals_ms: Mapping[str, float]


class ChangeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A change, and the longest gap of any stream until half a second after its end."""

    change: SimulatedChange
    longest_gap_ms: float


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert simulate run`.

    calibrated_on, calibrated_ranks: of the profile; what more ranks do is extrapolated. work_share,
    head_share: of the time, in which a step ran, and in which the head worked. took_s: the
    simulation itself.
    """

    command: str
    calibrated_on: Machine
    calibrated_ranks: int
    offered: str
    ranks: int
    figures: Figures
    rank_seconds: float
    steps: int
    work_share: float
    head_share: float
    preemptions: int
    cached_tokens: int
    changes: list[ChangeReport]
    queues: list[QueueSample]
    timeline: list[TimelinePoint]
    took_s: float

    @property
    def failed(self) -> bool:
        """Whether a request failed, or an event did not come to a good end."""
        changes = any(report.change.state != "done" for report in self.changes)
        return bool(self.figures.failed) or changes


def run_simulation(plan: SimulationPlan) -> SimulationReport:
    """Raises: ConfigError: see `simulate`. FlexpertError"""
    begin = time.perf_counter()
    limits = plan.settings.limits
    load = fitting_load(plan.load, min(limits.max_model_len, limits.blocks * limits.block_size))
    arrivals = load.arrivals()
    expected = max(arrivals[-1], 1.0) if arrivals else 60.0
    found = simulate(
        load, plan.settings, plan.profile, events=plan.events, sample_s=step_for(expected)
    )
    seconds = found.seconds or 1.0
    return SimulationReport(
        command=" ".join(["flexpert", *sys.argv[1:]]),
        calibrated_on=plan.profile.machine,
        calibrated_ranks=plan.profile.ranks,
        offered=load.describe(),
        ranks=plan.settings.ranks,
        figures=figures_with_goodput(found.answers, plan.goals_ms),
        rank_seconds=found.rank_seconds,
        steps=found.steps,
        work_share=found.work_s / seconds,
        head_share=found.head_busy_s / seconds,
        preemptions=found.preemptions,
        cached_tokens=found.cached_tokens,
        changes=[
            ChangeReport(
                change=change,
                longest_gap_ms=1e3
                * longest_gap(found.answers, change.at_s, (change.ended_s or seconds) + _AFTER_S)[
                    0
                ],
            )
            for change in found.changes
        ],
        queues=found.samples,
        timeline=timeline(found.answers, 0.0, seconds, step_for(seconds)),
        took_s=time.perf_counter() - begin,
    )


def simulation_text(report: SimulationReport) -> RenderableType:
    """Figures, queues over time, and what became of each change."""
    found = report.figures
    table = figures_table(
        f"simulated: {report.ranks} ranks; {report.offered}",
        "",
        ("mean", "p50", "p90", "p99", "longest"),
    )
    for name, one in (
        ("time to first token, ms", found.first_token_ms),
        ("inter-token latency, ms", found.inter_token_ms),
        ("end to end, ms", found.end_to_end_ms),
    ):
        table.add_row(name, *_cells(one))
    parts: list[RenderableType] = [table, Text()]
    lines = [
        f"{found.requests_per_s:,.2f} requests/s, {found.output_tokens_per_s:,.0f} tokens/s in "
        f"{found.duration_s:,.1f} s; {found.failed} of {found.requests} failed",
        f"{report.rank_seconds:,.0f} rank-seconds; {report.steps:,} steps, which took "
        f"{report.work_share:.0%} of the time; the head worked {report.head_share:.0%} of it",
        f"{report.cached_tokens:,} tokens of prompts cached; {report.preemptions:,} preemptions",
    ]
    if found.goodput is not None:
        lines.append(
            f"goodput {found.goodput.requests_per_s:,.2f} requests/s, "
            f"{found.goodput.share:.1%} of all"
        )
    parts += [Text(line) for line in lines]
    parts.append(Text())
    for name, values in (
        ("tokens/s", [point.tokens_per_s for point in report.timeline]),
        ("running", _thinned([float(one.running) for one in report.queues])),
        ("waiting", _thinned([float(one.waiting + one.head) for one in report.queues])),
        ("ranks", _thinned([float(one.ranks) for one in report.queues])),
    ):
        parts.append(Text(f"{name:>9} {bars(values)} to {max(values, default=0):,.0f}"))
    if report.changes:
        parts += [Text(), _changes_table(report.changes)]
    note = f"profile: {report.calibrated_on.line()}, up to {report.calibrated_ranks} ranks"
    parts.append(Text(f"{note}; simulated in {report.took_s:.1f} s", style="dim"))
    return Group(*parts)


def _thinned(values: list[float], most: int = 72) -> list[float]:
    """The largest of each of so many parts of equal length."""
    size = max(1, -(-len(values) // most))
    return [max(values[at : at + size]) for at in range(0, len(values), size)]


def _cells(one: Summary | None) -> list[str]:
    if one is None:
        return [""] * 5
    return [f"{value:,.1f}" for value in (one.mean, one.p50, one.p90, one.p99, one.longest)]


def _changes_table(changes: Sequence[ChangeReport]) -> Table:
    table = figures_table(
        "changes",
        "",
        ("at, s", "detected", "recovered", "ended", "pause, ms", "gap, ms", "requests", "experts"),
    )
    for report in changes:
        one = report.change
        after = [
            "" if at is None else f"+{at - one.at_s:.2f}"
            for at in (one.detected_s, one.recovered_s, one.ended_s)
        ]
        state = "" if one.state == "done" else f": {one.state} {one.error or ''}"
        table.add_row(
            one.what.partition(":")[0] + state,
            f"{one.at_s:.1f}",
            *after,
            "" if one.pause_ms is None else f"{one.pause_ms:.1f}",
            f"{report.longest_gap_ms:.1f}",
            f"{one.moved_requests}",
            f"{one.moved_experts}",
        )
    return table
