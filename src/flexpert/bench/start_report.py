"""The starts of a service, as a table (pure)."""

from __future__ import annotations

from statistics import median

from rich.console import RenderableType

from flexpert.bench.report_table import figures_table, with_note
from flexpert.bench.service_start import REQUESTS, ROLES, StartReport


def start_text(report: StartReport) -> RenderableType:
    """Medians over all starts, and how far the time to be ready spreads."""
    times = sorted(start.ready_s for start in report.starts)
    title = f"ready after {report.ready_s:.2f} s ({times[0]:.2f} to {times[-1]:.2f} s)"
    table = figures_table(title, "", ["processes", "processor time", "memory (PSS)"])
    for role in ROLES:
        costs = [start.roles[role] for start in report.starts if role in start.roles]
        if costs:
            table.add_row(
                role,
                f"{median(cost.processes for cost in costs):.0f}",
                f"{median(cost.processor_s for cost in costs):.2f} s",
                f"{median(cost.pss for cost in costs) / 2**20:.0f} MiB",
            )
    processes = (sum(role.processes for role in one.roles.values()) for one in report.starts)
    table.add_row(
        "all",
        f"{median(processes):.0f}",
        f"{median(start.processor_s for start in report.starts):.2f} s",
        f"{median(start.pss for start in report.starts) / 2**20:.0f} MiB",
    )
    served = median(start.served_pss for start in report.starts) / 2**20
    table.add_row(f"all, after {REQUESTS} requests", "", "", f"{served:.0f} MiB")
    flags = " ".join(report.flags)
    first = median(start.first_s for start in report.starts) * 1e3
    note = (
        f"medians of {len(report.starts)} starts of 'flexpert serve{flags and ' '}{flags}'; "
        f"first answer of one token after {first:.0f} ms; "
    )
    return with_note([table], f"{note}load before {report.load:.1f}; {report.machine.line()}")
