"""The figures of `flexpert bench speculate` as a table (pure)."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from flexpert.bench.cost_rounds import WITH, WITHOUT
from flexpert.bench.speculation_gain import SpeculationGain, SpeculationReport


def speculation_text(report: SpeculationReport) -> Table:
    """A row for each kind of request: medians of the rounds, and of the ratios within pairs."""
    title = f"--speculate {report.how}: tokens/s of {report.output_tokens} tokens each"
    table = Table(title=title, caption=report.machine.line())
    for name in ("prompts", "temp.", "at once"):
        table.add_column(name)
    for name in ("without", "with", "ratio", "least, most", "CPU", "accepted", "equal"):
        table.add_column(name, justify="right")
    for gain in report.gains:
        table.add_row(*_row(gain))
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table


def _row(gain: SpeculationGain) -> list[str]:
    ratios = gain.tokens_ratios
    speeds = [median(one.tokens_per_s for one in gain.rounds[kind]) for kind in (WITHOUT, WITH)]
    return [
        gain.text,
        f"{gain.temperature:g}",
        str(gain.concurrency),
        *(f"{speed:,.0f}" for speed in speeds),
        f"{median(ratios):.2f}",
        f"{min(ratios):.2f}, {max(ratios):.2f}",
        f"{gain.cpu_ratio:.2f}",
        f"{gain.accepted} of {gain.drafted}",
        f"{gain.equal} of {gain.answers}",
    ]
