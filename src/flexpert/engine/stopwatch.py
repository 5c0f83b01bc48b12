"""How long the parts of a piece of work took."""

from __future__ import annotations

import time
from collections.abc import Mapping


class Stopwatch:
    """laps: part → seconds, in their order; the parts follow each other in one thread."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """That part is over; the next one begins."""
        now = time.perf_counter()
        self.laps[part] = self.laps.get(part, 0.0) + now - self._last
        self._last = now


def in_words(laps: Mapping[str, float]) -> str:
    """For a log."""
    return ", ".join(f"{part} {seconds:.3f}" for part, seconds in laps.items()) + " s"
