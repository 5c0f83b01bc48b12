"""What a plan showed, for people."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.table import Table

from flexpert.trials.plan.runner import PhaseResult

_COLUMNS = (
    "phase",
    "join",
    "rejoin",
    "leave",
    "detect",
    "agree",
    "commit",
    "exchange",
    "GB/s",
    "wire",
    "checked",
)


def new_table(title: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        caption="ms; detect: median, slowest; wire: bytes, of those without deduplication",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "phase" else "right")
    return table


def add(table: Table, result: PhaseResult) -> None:
    detect = "-"
    if result.detect_s:
        detect = _ms(median(result.detect_s))
        if len(result.detect_s) > 1:
            detect += f" {_ms(max(result.detect_s))}"
    share = "-"
    if result.bytes_undeduplicated:
        share = f"{result.bytes_sent / result.bytes_undeduplicated:.0%}"
    rate = result.gigabytes_per_s
    table.add_row(
        result.phase,
        _ms(result.connect_s),
        _ms(result.rejoin_s),
        _ms(result.disconnect_s),
        detect,
        _ms(result.agree_s),
        _ms(result.commit_s),
        _ms(result.exchange_s),
        "-" if rate is None else f"{rate:.2f}",
        share,
        f"{result.exchanges} wrong" if result.errors else f"{result.exchanges} ✓",
    )


def verdict(console: Console, results: list[PhaseResult]) -> bool:
    """Print reasons and the last line; whether all was right."""
    wrong = [(result.phase, error) for result in results for error in result.errors]
    for phase, error in wrong[:20]:
        console.print(f"  phase {phase}: {error}", style="red", markup=False)
    exchanges = sum(result.exchanges for result in results)
    console.print(
        f"FAIL: {len(wrong)} errors"
        if wrong
        else f"PASS: {exchanges} exchanges, all as they must be",
        style="bold red" if wrong else "bold green",
    )
    return not wrong


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
