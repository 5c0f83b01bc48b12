"""The figures of `flexpert bench comm` as a table (pure)."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.bench.comm.comm_run import CommReport, CommResult, Point
from flexpert.bench.report_table import figures_table, no_figures, with_note
from flexpert.bench.statistics import SpreadUs


def comm_text(report: CommReport) -> RenderableType:
    """A table for each number of tokens, then what was measured on."""
    return with_note(
        [_table(point, between=report.machines > 1) for point in report.points],
        f"medians (p10 to p90), first rank's begin to last rank's end; channel "
        f"{report.channel}, fp8 {report.fp8}, {report.threads} torch threads a rank"
        f"{_machines(report.machines)}\n{report.machine.line()}",
    )


def _machines(count: int) -> str:
    return f"; {count} machines by name, all on this one" if count > 1 else ""


def _table(point: Point, *, between: bool) -> Table:
    """between: with the bytes between machines."""
    work = point.workload
    title = (
        f"{work.ranks} ranks, {work.tokens} tokens each, hidden {work.hidden}, top-{work.topk} of "
        f"{work.experts} experts, {work.dtype}: {point.bytes / 1e6:.2f} MB an exchange"
    )
    columns = ["dispatch µs", "combine µs", "total µs", "GB/s", "× flexpert", "× memcpy"]
    if between:
        columns.append("MB between machines")
    table = figures_table(title, "baseline", columns)
    for result in point.results:
        sent = "" if result.link_bytes is None else f"{result.link_bytes / 1e6:.3f}"
        table.add_row(*_row(result), *([sent] if between and result.skipped is None else []))
    return table


def _row(result: CommResult) -> list[str | Text]:
    if result.skipped is not None:
        return [result.baseline, no_figures(result.skipped, wrong=result.wrong)]
    return [
        result.baseline,
        _spread(result.dispatch_us),
        _spread(result.combine_us),
        _spread(result.total_us),
        _number(result.gb_per_s),
        _number(result.times_ours),
        _number(result.times_memcpy),
    ]


def _spread(spread: SpreadUs | None) -> str:
    if spread is None:
        return ""
    return f"{spread.p50:,.0f} ({spread.p10:,.0f} to {spread.p90:,.0f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
