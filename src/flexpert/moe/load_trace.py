"""Recorded loads of experts, as JSON lines: one window a line.

    {"seconds": 5.0, "loads": [[12, 0, 7, …], …]}

`loads[layer][expert]` is the number of tokens that were routed to an expert in that window, a token
once for each expert that it went to; `seconds` is how long the window was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from flexpert.moe.expert_loads import load_array


class LoadWindow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """loads: [layers][experts] tokens. seconds: 0.0 if that is not known."""

    loads: list[list[float]]
    seconds: float = 0.0


def load_line(window: LoadWindow) -> bytes:
    """One line of a trace, with its end."""
    return msgspec.json.encode(window) + b"\n"


def load_windows(lines: Iterable[bytes]) -> Iterator[LoadWindow]:
    """The windows of a trace, all of one shape; empty lines are skipped.

    Raises:
        ValueError: which line is not one, and why.
    """
    shape: tuple[int, int] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            window = msgspec.json.decode(line, type=LoadWindow)
            if shape is None:
                shape = (len(window.loads), len(window.loads[0]) if window.loads else 0)
                if 0 in shape:
                    raise ValueError("no loads")
            load_array(window.loads, *shape)
        except ValueError as error:  # msgspec's errors are such
            raise ValueError(f"line {number} of the trace: {error}") from None
        yield window
