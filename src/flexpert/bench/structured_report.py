"""The figures of `flexpert bench structured` as a table (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from flexpert.bench.structured_overhead import PLAIN, Round, StructuredReport


def structured_text(report: StructuredReport) -> Table:
    """Medians of the rounds of each kind, and of what it costs over plain."""
    what = f"{report.concurrency} at once, {report.output_tokens} tokens each"
    table = Table(title=what, caption=report.machine.line())
    table.add_column("")
    for name in ("tokens/s", "slowest", "fastest", "first token", "between tokens", "CPU a token"):
        table.add_column(name, justify="right")
    for kind, rounds in report.rounds.items():
        _add(table, kind, rounds)
    table.add_section()
    for kind, cost in report.costs.items():
        ratios = f"{cost.tokens_per_s:.3f}", f"{cost.cpu:.3f}"
        table.add_row(f"{kind} / {PLAIN}", ratios[0], "", "", "", "", ratios[1])
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table


def _add(table: Table, name: str, rounds: Sequence[Round]) -> None:
    all_figures = [one.figures for one in rounds]
    speeds = [one.output_tokens_per_s for one in all_figures]
    table.add_row(
        name,
        f"{median(speeds):,.0f}",
        f"{min(speeds):,.0f}",
        f"{max(speeds):,.0f}",
        _milliseconds([one.first_token_ms.p50 for one in all_figures if one.first_token_ms]),
        _milliseconds([one.inter_token_ms.p50 for one in all_figures if one.inter_token_ms]),
        _milliseconds([one.cpu_ms for one in rounds]),
    )


def _milliseconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ms" if values else ""
