"""The figures of `flexpert bench prefix` as a table (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from flexpert.bench.prefix import PrefixHalf, PrefixReport


def prefix_text(report: PrefixReport) -> Table:
    """Medians of the rounds, and of their ratios."""
    table = Table(title="routing by prefix and by the fewest", caption=report.machine.line())
    for name in ("", "ranks", "routing"):
        table.add_column(name)
    for name in ("requests/s", "mean first token", "cached"):
        table.add_column(name, justify="right")
    for case in report.cases:
        for routing, halves in case.halves.items():
            table.add_row(case.workload, str(case.ranks), routing, *_figures(halves))
        gain = case.gain
        table.add_row(
            case.workload,
            str(case.ranks),
            "prefix / fewest",
            f"{gain.requests_per_s:.2f}",
            f"{gain.first_token:.2f}",
            "",
            end_section=True,
        )
    for tokens, microseconds in report.choice_us.items():
        table.add_row("choice of a rank", "", f"{tokens} tokens", f"{microseconds:.0f} µs")
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table


def _figures(halves: Sequence[PrefixHalf]) -> tuple[str, str, str]:
    firsts = [half.figures.first_token_ms.mean for half in halves if half.figures.first_token_ms]
    return (
        f"{median(half.figures.requests_per_s for half in halves):.1f}",
        f"{median(firsts):.0f} ms" if firsts else "",
        f"{median(half.cached for half in halves):.0%}",
    )
