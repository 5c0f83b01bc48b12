"""What all commands check of their numbers, beside the range of each."""

from __future__ import annotations

import math
from typing import Any

from typer.core import TyperCommand

from flexpert.errors import ConfigError
from flexpert.reading import shown

MOST_COUNT = 2**40
_MOST = 366 * 86400.0  # seconds mostly; what is handed to the system's clocks must not overflow


class Command(TyperCommand):
    """Refuses numbers that are not finite, which lie in every range, and those beyond reason."""

    def invoke(self, ctx: Any) -> Any:
        """Raises: ConfigError"""
        for parameter in self.params:
            value = ctx.params.get(parameter.name or "")
            for number in value if isinstance(value, list | tuple) else (value,):
                _check(parameter.opts[-1], number)
        return super().invoke(ctx)


def _check(flag: str, number: object) -> None:
    if isinstance(number, float) and not abs(number) <= _MOST:  # nan is not, either
        wrong = "is too large" if math.isfinite(number) else "is not a finite number"
        raise ConfigError(f"{flag} {number:g} {wrong}")
    if isinstance(number, int) and abs(number) > MOST_COUNT:
        raise ConfigError(f"{flag}: the number is too large; 2**40 is the most")


def numbers(text: str, flag: str) -> list[int]:
    """Those of "8,1,8": 1, 8. Raises: ConfigError"""
    try:
        values = sorted({int(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or values[0] < 1 or values[-1] > MOST_COUNT:
        raise ConfigError(f"{flag} {shown(text)}: positive numbers, with commas between them")
    return values
