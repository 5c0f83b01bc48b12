"""What something costs a service, as a table (pure)."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from flexpert.bench.cost_rounds import CostReport
from flexpert.bench.statistics import median_interval


def cost_text(report: CostReport) -> Table:
    """Medians of the rounds with and without, and of what differs between two of a pair."""
    title = f"{report.of}: {report.output_tokens} tokens each"
    watched = any(one.observers_us for one in report.rounds)
    columns = ["tokens/s", "slowest", "fastest", "CPU of the head", "CPU of the service"]
    table = Table(title=title, caption=report.machine.line())
    table.add_column("")
    for name in (*columns, *["CPU of who watches"] * watched):
        table.add_column(name, justify="right")
    for cost in report.costs:
        for kind, rounds in cost.rounds.items():
            speeds = [one.figures.output_tokens_per_s for one in rounds]
            times = [
                median(one.head_us for one in rounds),
                median(one.service_us for one in rounds),
                *[median(one.observers_us for one in rounds)] * watched,
            ]
            table.add_row(
                f"{cost.concurrency} at once, {kind}",
                f"{median(speeds):,.0f}",
                f"{min(speeds):,.0f}",
                f"{max(speeds):,.0f}",
                *(f"{time:.1f} µs" for time in times),
            )
        table.add_row(
            "with / without",
            f"{cost.tokens_ratio:.3f}",
            f"{min(cost.tokens_ratios):.3f}",
            f"{max(cost.tokens_ratios):.3f}",
            f"{cost.head_us:+.1f} µs",
            f"{cost.service_us:+.1f} µs ({cost.service_share:+.1%})",
        )
        low, high = median_interval(cost.tokens_ratios)
        table.add_row("its median, to 95 %", "", f"{low:.3f}", f"{high:.3f}", end_section=True)
    if report.failed:
        table.add_row("failed requests", str(report.failed))
    return table
