"""Options that several commands share, and types of options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexpert.cli.command import MOST_COUNT
from flexpert.config import parse_duration
from flexpert.errors import ConfigError
from flexpert.reading import shown

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[
    str, typer.Option("--url", envvar="FLEXPERT_URL", metavar="URL", help="Address of the service.")
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="FLEXPERT_API_KEY",
        metavar="KEY",
        help="The service's key, if it asks for one.",
    ),
]

CaFile = Annotated[
    Path | None,
    typer.Option(
        "--ca-file",
        envvar="FLEXPERT_CA_FILE",
        metavar="FILE",
        help="Certificates in PEM to trust for an https URL, instead of this system's.",
    ),
]

# the same in every command that has a result
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of text.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the result there as JSON.")
]


def duration_option(
    flag: str,
    description: str,
    *,
    least: float,
    most: float = 366 * 86400.0,
    default: str = "",
) -> Any:
    """An option that is written as "2", "2s", "500ms" or "5m" and read as seconds.

    Args:
        flag: its name, "--timeout".
        least, most: its bounds in seconds.
        default: as it is shown in the help.

    What it is given out of these bounds is a ConfigError.
    """

    def parse(text: str | float) -> float:
        try:
            seconds = parse_duration(text)
        except ValueError as error:
            raise ConfigError(f"{flag}: {error}") from None
        if not isinstance(seconds, float | int) or not least <= seconds <= most:
            raise ConfigError(f"{flag} {text} is not between {least:g}s and {most:g}s")
        return float(seconds)

    return typer.Option(
        flag,
        metavar="DURATION",
        parser=parse,
        help=f"{description} (default: {default})" if default else description,
        show_default=False,
    )


def numbers(text: str, flag: str) -> list[int]:
    """The numbers of a list, each once and sorted: "8,1,8" → [1, 8]. Raises: ConfigError"""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1 or values[-1] > MOST_COUNT:
        raise ConfigError(f"{flag} {shown(text)}: positive numbers, with commas between them")
    return values


def make_console(*, stderr: bool = False) -> Console:
    """Prints on standard output, or on standard error."""
    from rich.console import Console

    return Console(stderr=stderr)


def print_note(line: str, console: Console) -> None:
    """A remark on what is being done, dimmed."""
    console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)
