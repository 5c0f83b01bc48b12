"""What loading took, as people read it (pure)."""

from __future__ import annotations

from rich.console import RenderableType

from flexpert.bench.checkpoint_loading import LoadReport, LoadTurn
from flexpert.bench.report_table import figures_table, with_note


def loading_text(report: LoadReport) -> RenderableType:
    """A line for each turn."""
    columns = (
        *("dd GB/s", "ranks GB/s", "of dd", "total s", "open", "dense", "experts"),
        *("CPU s of dd", "of ranks", "peak/plan"),
    )
    table = figures_table("opened, checked and loaded", "page cache", columns)
    for turn in report.turns:
        table.add_row(turn.cache, *_figures(turn, report.nbytes))
    note = f"{report.model}, {report.nbytes / 1e9:.2f} GB; {report.machine.line()}"
    return with_note([table], note)


def _figures(turn: LoadTurn, nbytes: int) -> list[str]:
    slowest = max(turn.ranks, key=lambda rank: rank.open_s + rank.dense_s + rank.experts_s)
    fullest = max(turn.ranks, key=lambda rank: rank.peak / rank.planned)
    return [
        f"{nbytes / turn.dd_s / 1e9:.2f}",
        f"{nbytes / turn.load_s / 1e9:.2f}",
        f"{turn.dd_s / turn.load_s:.2f}",
        f"{turn.load_s:.2f}",
        f"{slowest.open_s:.2f}",
        f"{slowest.dense_s:.2f}",
        f"{slowest.experts_s:.2f}",
        f"{turn.dd_cpu_s:.2f}",
        f"{sum(rank.cpu_s for rank in turn.ranks):.2f}",
        f"{fullest.peak >> 20} of {fullest.planned >> 20} MiB",
    ]
