"""The figures of `flexpert bench comm` as a table (pure)."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flexpert.bench.comm.comm_run import CommReport, CommResult, CommSpread, Point


def comm_text(report: CommReport) -> RenderableType:
    """A table for each number of tokens, then what was measured on."""
    parts: list[RenderableType] = [_table(point) for point in report.points]
    parts.append(
        Text(
            f"medians (p10 to p90), first rank's begin to last rank's end; channel "
            f"{report.channel}, fp8 {report.fp8}, {report.threads} torch threads a rank\n"
            f"{report.machine.line()}",
            style="dim",
        )
    )
    return Group(*parts)


def _table(point: Point) -> Table:
    work = point.workload
    title = (
        f"{work.ranks} ranks, {work.tokens} tokens each, hidden {work.hidden}, top-{work.topk} of "
        f"{work.experts} experts, {work.dtype}: {point.bytes / 1e6:.2f} MB an exchange"
    )
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("baseline")
    for column in ("dispatch µs", "combine µs", "total µs", "GB/s", "× flexpert", "× memcpy"):
        table.add_column(column, justify="right")
    for result in point.results:
        table.add_row(*_row(result))
    return table


def _row(result: CommResult) -> list[str | Text]:
    if result.skipped is not None:
        word, style = ("wrong", "bold red") if result.wrong else ("skipped", "yellow")
        return [result.baseline, Text(f"{word}: {result.skipped}", style=style)]
    return [
        result.baseline,
        _spread(result.dispatch_us),
        _spread(result.combine_us),
        _spread(result.total_us),
        _number(result.gb_per_s),
        _number(result.times_ours),
        _number(result.times_memcpy),
    ]


def _spread(spread: CommSpread | None) -> str:
    if spread is None:
        return ""
    return f"{spread.p50:,.0f} ({spread.p10:,.0f} to {spread.p90:,.0f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
