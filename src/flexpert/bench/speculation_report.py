"""The figures of `flexpert bench speculate` as a table (pure)."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from flexpert.bench.cost_rounds import WITH, WITHOUT
from flexpert.bench.speculation_gain import SpeculationGain, SpeculationReport


def speculation_text(report: SpeculationReport) -> Table:
    """A row for each kind of request: medians of the rounds, and of the ratios within pairs."""
    title = f"--speculate {report.how}: {report.output_tokens} tokens each"
    table = Table(title=title, caption=report.machine.line())
    table.add_column("")
    columns = ("without", "with", "ratio", "least", "most", "CPU", "proposed", "accepted", "equal")
    for name in columns:
        table.add_column(name, justify="right")
    for gain in report.gains:
        table.add_row(*_row(gain))
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table


def _row(gain: SpeculationGain) -> list[str]:
    ratios = gain.tokens_ratios
    return [
        f"{gain.text}, temperature {gain.temperature:g}, {gain.concurrency} at once",
        *(
            f"{median(one.tokens_per_s for one in gain.rounds[kind]):,.0f} tokens/s"
            for kind in (WITHOUT, WITH)
        ),
        f"{median(ratios):.3f}",
        f"{min(ratios):.3f}",
        f"{max(ratios):.3f}",
        f"{gain.cpu_ratio:.3f}",
        f"{gain.drafted:,}",
        f"{gain.accepted / gain.drafted:.0%}" if gain.drafted else "",
        f"{gain.equal} of {gain.answers}",
    ]
