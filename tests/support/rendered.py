"""What a terminal shows of a report."""

from __future__ import annotations

from rich.console import Console, RenderableType


def shown(text: RenderableType) -> str:
    """In plain characters, of lines as wide as reports get."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(text)
    return capture.get()
