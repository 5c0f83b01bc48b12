"""What all commands share: help that is whole on a narrow terminal, and a check of numbers."""

from __future__ import annotations

import math
import shutil
import signal
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand

from flexpert.errors import ConfigError

MOST_COUNT = 2**40
_WIDEST = 100  # columns of a help text
_COLUMN = 30  # of the descriptions
_MOST = 366 * 86400.0  # seconds mostly; what is handed to the system's clocks must not overflow


class Command(TyperCommand):
    """A command whose help is whole on a narrow terminal.

    It refuses numbers that are not finite, which lie in every range, and those beyond reason.

    interruptible: from its first line on Ctrl-C is a KeyboardInterrupt; until then, and in a
    command that sees to signals itself, it ends the process at once (`flexpert.__main__`).
    """

    interruptible = True

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """A flag with a long name has its description on the next line; nothing is cut off."""
        formatter.width = min(shutil.get_terminal_size().columns, _WIDEST)
        self.format_usage(ctx, formatter)
        self.format_help_text(ctx, formatter)
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            own = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panel = getattr(parameter, "rich_help_panel", None) or own
            panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records, col_max=_COLUMN)
        self.format_epilog(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Raises: ConfigError"""
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            for number in value if isinstance(value, list | tuple) else (value,):
                _check(parameter.opts[-1], number)
        if self.interruptible and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return super().invoke(ctx)


def _check(flag: str, number: object) -> None:
    if isinstance(number, float) and not abs(number) <= _MOST:  # nan is not, either
        wrong = "is too large" if math.isfinite(number) else "is not a finite number"
        raise ConfigError(f"{flag} {number:g} {wrong}")
    if isinstance(number, int) and abs(number) > MOST_COUNT:
        raise ConfigError(f"{flag}: the number is too large; 2**40 is the most")


def add_command(
    app: typer.Typer,
    name: str,
    function: Callable[..., None],
    examples: Sequence[str],
    *,
    cls: type[Command] = Command,
) -> None:
    """Register a command whose help ends with examples, one a line."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
    app.command(name, cls=cls, epilog=epilog)(function)
