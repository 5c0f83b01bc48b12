"""The figures of `flexpert bench elastic` as a table (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from flexpert.bench.elastic import ElasticChange, ElasticKill, ElasticReport


def elastic_text(report: ElasticReport) -> Table:
    """What is undisturbed, what changes do to it, what kills do."""
    title = f"{report.clients} streaming clients; {' '.join(report.flags)}"
    table = Table(title=title, caption=report.machine.line())
    table.add_column("")
    for name in ("median", "longest"):
        table.add_column(name, justify="right")
    table.add_row("start of the service", "", f"{report.start_s:.1f} s")
    for steady in report.steady:
        name = (
            f"undisturbed on {steady.ranks}: {steady.tokens_per_s:,.0f} tokens/s, gap in a stream"
        )
        table.add_row(name, f"{steady.median_gap_ms:.1f} ms", f"{steady.longest_gap_ms:.1f} ms")
    _add_changes(table, report)
    for label in ("kill", "stop"):
        _add_kills(table, label, [kill for kill in report.kills if kill.label == label])
    table.add_section()
    for name, (before, after) in report.memory_mib.items():
        table.add_row(f"memory, {name}: before, after", f"{before:,.0f} MiB", f"{after:,.0f} MiB")
    table.add_row("answers, lost", f"{report.answers:,}", f"{len(report.lost)}")
    for reason in sorted(set(report.lost)):
        table.add_row(f"  {reason}", "", f"{report.lost.count(reason)}")
    if report.altered is not None:
        table.add_row("altered", "", f"{report.altered}")
    return table


def _add_kills(table: Table, label: str, kills: Sequence[ElasticKill]) -> None:
    if not kills:
        return
    table.add_section()
    firsts = [kill.first_token_s for kill in kills]
    table.add_row(f"{len(firsts)} {label}s: first token after", *_seconds(firsts))
    table.add_row("longest silence", *_seconds([kill.silence_s for kill in kills]))
    backs = [kill.back_s for kill in kills if kill.back_s is not None]
    name = f"95 % of the throughput after ({len(backs)} of {len(firsts)})"
    table.add_row(name, *_seconds(backs))
    table.add_row("all ranks after", *_seconds([kill.whole_s for kill in kills]))


def _add_changes(table: Table, report: ElasticReport) -> None:
    if not report.changes:
        return
    table.add_section()
    table.add_row(f"{len(report.changes)} changes, failed", "", f"{report.failed_changes}")
    for label, ranks in sorted({(change.label, change.ranks) for change in report.changes}):
        same = [c for c in report.changes if (c.label, c.ranks) == (label, ranks)]
        done = [c for c in same if c.state == "done"]
        if not done:
            continue
        table.add_row(f"{label}, to {ranks} ranks: took", *_seconds([c.seconds for c in done]))
        pauses = [c.pause_ms for c in done if c.pause_ms is not None]
        table.add_row("  pause", *_milliseconds(pauses))
        table.add_row("  longest gap in a stream", *_milliseconds([c.longest_gap_ms for c in done]))
        for phase in _phases(done):
            table.add_row(f"  {phase}", *_seconds([c.phases.get(phase, 0.0) for c in done]))


def _phases(changes: Sequence[ElasticChange]) -> list[str]:
    found = [phase for change in changes for phase in change.phases]
    return list(dict.fromkeys(found))


def _seconds(values: Sequence[float]) -> tuple[str, str]:
    return (f"{median(values):.2f} s", f"{max(values):.2f} s") if values else ("", "")


def _milliseconds(values: Sequence[float]) -> tuple[str, str]:
    return (f"{median(values):.1f} ms", f"{max(values):.1f} ms") if values else ("", "")
