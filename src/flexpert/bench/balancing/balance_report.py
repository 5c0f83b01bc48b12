"""The figures of `flexpert bench balance` as tables (pure)."""

from __future__ import annotations

from rich.console import RenderableType

from flexpert.bench.balancing.balance_run import BalanceReport
from flexpert.bench.report_table import figures_table, with_note


def balance_text(report: BalanceReport) -> RenderableType:
    """Largest load over mean on each trace; then changes of the ranks, and times to plan."""
    where = f"{report.ranks} ranks, {report.redundant} redundant"
    columns: tuple[str, ...] = (
        "its own window",
        "worst layer",
        "the next window",
        "moved slots",
        "to plan",
    )
    table = figures_table(f"Largest load over mean, {where}", "trace", ("", *columns))
    for line in report.balanced:
        table.add_row(
            line.trace,
            line.way,
            f"{line.own:.3f}",
            f"{line.worst:.3f}",
            f"{line.following:.3f}",
            f"{line.moved:,.0f}",
            f"{line.seconds:.2f} s",
        )
    tables = [table]
    if report.scaled:
        columns = ("ranks", "moved slots", "unavoidable", "worst layer", "from scratch", "to plan")
        table = figures_table("Changes of the number of ranks", "loads", columns)
        for change in report.scaled:
            table.add_row(
                change.trace,
                " → ".join(map(str, change.ranks)),
                f"{change.moved:,}",
                f"{change.unavoidable:,}",
                f"{change.imbalance:.3f}",
                f"{change.fresh:.3f}",
                f"{change.seconds:.2f} s",
            )
        tables.append(table)
    if report.planned:
        columns = ("slots", "from nothing", "half of them join", "loads drift")
        table = figures_table("Processor time to plan, Zipf 0.8", "ranks", columns)
        for plan in report.planned:
            times = (plan.fresh_s, plan.join_s, plan.drift_s)
            figures = [f"{seconds:.2f} s" for seconds in times]
            table.add_row(str(plan.ranks), str(plan.slots), *figures)
        tables.append(table)
    what = f"{report.layers} layers, {report.experts} experts, seed {report.seed}"
    return with_note(tables, f"{what}; {report.machine.line()}")
