"""The figures of `flexpert bench autoscale` as a table (pure)."""

from __future__ import annotations

from rich.console import RenderableType

from flexpert.bench.day_run import DayReport
from flexpert.bench.day_service import DayResult
from flexpert.bench.load_timeline import bars
from flexpert.bench.report_table import figures_table, with_note
from flexpert.bench.statistics import Summary

_MEANINGFUL = 1.2  # times what one rank takes, for more ranks to be worth anything
_COLUMNS = 60
_ROWS = (
    *("kept to the goals", "goodput, requests/s", "time to first token, p99", "gap, p99"),
    *("rank-seconds", "changes", "flips", "lost", "altered"),
)


def days_text(report: DayReport) -> RenderableType:
    """What each service's day was, and how the autoscaler's compares."""
    goals = ", ".join(f"{name} {limit:g} ms" for name, limit in report.goals_ms.items())
    table = figures_table(
        f"a day of {report.seconds:g} s, {report.requests} requests; goals: {goals}",
        "",
        [_name(report, result) for result in report.results],
    )
    columns = [_cells(result, report.results[0]) for result in report.results]
    for name, *cells in zip(_ROWS, *columns, strict=True):
        table.add_row(name, *cells)
    lines = [*(_sizes_line(report, result) for result in report.results), "", *notes(report)]
    return with_note([table], "\n".join(["", *lines, report.machine.line()]))


def notes(report: DayReport) -> list[str]:
    """In words: what ranks could take, what came out, and what that is worth."""
    took = ", ".join(f"{one.ranks}: {one.requests_per_s:.1f}" for one in report.capacity)
    lines = [f"requests a second that ranks took, each as many at once as it may run: {took}"]
    most = max(one.requests_per_s for one in report.capacity)
    if most < _MEANINGFUL * report.capacity[0].requests_per_s:
        lines.append(
            "more ranks take hardly more than one on this machine: that fewer suffice says little"
        )
    by_name = {result.run: result for result in report.results}
    fixed, scaled, oracle = by_name["fixed"], by_name["autoscaler"], by_name["oracle"]
    if fixed.kept and fixed.rank_seconds:
        lines.append(
            f"the autoscaler: {scaled.kept / fixed.kept:.1%} of the goodput of the fixed number"
            f" with {scaled.rank_seconds / fixed.rank_seconds:.0%} of their rank-seconds; the "
            f"oracle: {oracle.kept / fixed.kept:.1%} with "
            f"{oracle.rank_seconds / fixed.rank_seconds:.0%}"
        )
    if fixed.kept and fixed.rank_seconds and "killed" in by_name:
        killed = by_name["killed"]
        lines.append(
            f"with {len(killed.killed)} kills: {killed.kept / fixed.kept:.1%} with "
            f"{killed.rank_seconds / fixed.rank_seconds:.0%}"
        )
    if scaled.flips > oracle.flips:
        lines.append(
            f"it turned {scaled.flips} times from up to down or back, the day does {oracle.flips} "
            "times"
        )
    return lines


def _name(report: DayReport, result: DayResult) -> str:
    if result.run == "fixed":
        return f"{report.capacity[-1].ranks} ranks"
    return "autoscaler, kills" if result.run == "killed" else result.run


def _cells(result: DayResult, fixed: DayResult) -> list[str]:
    found = result.figures
    share = result.rank_seconds / fixed.rank_seconds if fixed.rank_seconds else 0.0
    failed = f" ({result.failed_changes} failed)" if result.failed_changes else ""
    return [
        f"{result.kept:.1%}",
        f"{found.goodput.requests_per_s:.2f}" if found.goodput else "",
        _p99(found.first_token_ms),
        _p99(found.inter_token_ms),
        f"{result.rank_seconds:.0f} ({share:.0%})",
        f"{result.changes}{failed}",
        str(result.flips),
        str(result.lost),
        str(result.altered),
    ]


def _p99(summary: Summary | None) -> str:
    return "" if summary is None else f"{summary.p99:.0f} ms"


def _sizes_line(report: DayReport, result: DayResult) -> str:
    """Ranks over the day, and the kills."""
    step = report.seconds / _COLUMNS
    heights = []
    for column in range(_COLUMNS):
        before = [size for at, size in result.sizes if at <= (column + 0.5) * step]
        heights.append(float(before[-1]) if before else 0.0)
    most = float(report.capacity[-1].ranks)
    line = bars([*heights, most])[:-1]
    for at in result.killed:
        place = min(int(at / step), _COLUMNS - 1)
        line = f"{line[:place]}x{line[place + 1 :]}"
    return f"{line}  {_name(report, result)}{', x: killed' if result.killed else ''}"
