"""What the tables of all benchmarks have in common (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def figures_table(title: str, first: str, columns: Sequence[str]) -> Table:
    """An empty table. first: heading of the names; columns: headings of the figures."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def no_figures(reason: str | None, *, wrong: bool) -> Text:
    """Stands in the row of a baseline that was skipped, or computed something else."""
    word, style = ("wrong", "bold red") if wrong else ("skipped", "yellow")
    return Text(f"{word}: {reason}", style=style)


def with_note(tables: Sequence[Table], note: str) -> RenderableType:
    """The tables, then what was measured and on what machine."""
    return Group(*tables, Text(note, style="dim"))
