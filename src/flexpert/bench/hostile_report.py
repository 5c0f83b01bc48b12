"""The figures of `flexpert bench hostile` as a table (pure)."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from flexpert.bench.hostile import (
    WANTED_GROWTH_MIB,
    WANTED_RATIO,
    HostileMeasured,
    HostileReport,
)


def hostile_text(report: HostileReport) -> Table:
    """Both runs in two columns, then ratio and memory."""
    title = f"{report.streams} streams with {report.clients} clients, {report.duration_s:g} s"
    table = Table(title=title, caption=report.machine.line())
    for name in ("", "ordinary", "hostile"):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, of: Callable[[HostileMeasured], str]) -> None:
        table.add_row(name, of(report.ordinary), of(report.hostile))

    row("tokens/s of the streams", lambda m: f"{m.tokens_per_s:.0f}")
    row("longest gap in an answer", lambda m: f"{m.longest_gap_ms:.0f} ms")
    row("longest wait for a first token", lambda m: f"{m.longest_first_ms:.0f} ms")
    row("streams that failed", _errors)
    row("answers to the clients, by status", _statuses)
    row("slowest of them", lambda m: f"{m.clients.slowest_s:.2f} s")
    row("bodies sent", lambda m: f"{m.clients.sent_mib:.0f} MiB")
    row("the clients' own CPU time", lambda m: f"{m.clients.cpu_s:.1f} s")
    row("the head's share of a core", lambda m: f"{m.head_cpu:.0%}")
    row("load average", lambda m: f"{m.load:.2f}")
    memory = report.memory
    table.add_section()
    table.add_row("ratio", "", f"{report.ratio:.2f} (desired: {WANTED_RATIO} at least)")
    table.add_row("head's memory before", "", f"{memory.before:.0f} MiB")
    table.add_row("  highest", "", f"{memory.highest:.0f} MiB")
    table.add_row(
        "  after", "", f"{memory.growth:+.0f} MiB (desired: within {WANTED_GROWTH_MIB:.0f})"
    )
    table.add_row("its helpers, highest", "", f"{memory.helpers_highest:.0f} MiB")
    for kind in (report.ordinary, report.hostile):
        for path, words in kind.clients.failed.items():
            table.add_row(f"5xx of {path}", "", words)
    return table


def _statuses(measured: HostileMeasured) -> str:
    found = measured.clients.statuses
    broken = {"broken": measured.clients.broken} if measured.clients.broken else {}
    return "\n".join(f"{status}: {count}" for status, count in {**found, **broken}.items())


def _errors(measured: HostileMeasured) -> str:
    return "; ".join(measured.stream_errors) or "0"
