"""Which models are served, as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexpert.models.catalogue import ModelFamily, ServedFormat


def show_models(
    families: Sequence[ModelFamily], formats: Sequence[ServedFormat], version: str
) -> None:
    """Print what is served. version: of transformers, of which the families are."""
    console = Console()
    stored = Table(
        "format", "on a CPU", "on a GPU", title="Formats of weights", title_justify="left"
    )
    for one in formats:
        stored.add_row(escape(one.name), one.cpu, one.gpu)
    console.print(stored)
    table = Table(
        "family",
        "served",
        "by, or why not",
        title=f"Families of transformers {version}, each compared with it on 1 and 3 ranks",
        title_justify="left",
    )
    for family in families:
        why = f"{family.architecture} {family.note}" if family.served else family.note
        table.add_row(escape(family.name), "yes" if family.served else "no", escape(why))
    console.print(table)
