"""A day's load, compressed, and how many ranks one would have who knew it (pure).

Few requests at night, a rise in the morning, a peak at noon and another in the evening. Rates are
shares of the peak's, times are shares of the day.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from flexpert.bench.arrival_times import unit_arrivals

# (hour, share of the peak's rate), with straight lines between them
DAY = (
    *((0.0, 0.12), (5.5, 0.12), (8.5, 0.28), (11.25, 0.28)),
    *((11.75, 1.0), (12.5, 1.0), (13.0, 0.28), (17.75, 0.28)),
    *((18.25, 0.9), (19.25, 0.9), (19.75, 0.28), (22.5, 0.12), (24.0, 0.12)),
)
NOON, EVENING = 12.25 / 24, 18.75 / 24

_USED = 0.8  # of what ranks can take, at most, by who knows what comes
_AHEAD = 1 / 90  # of the day: ranks are asked for before they are needed
_GRID = 2000


@dataclass(frozen=True)
class DayTrace:
    """seconds: the day's length. peak: requests a second at noon."""

    seconds: float
    peak: float

    def rate(self, at: float) -> float:
        """Requests a second, `at` seconds after midnight."""
        hour = min(max(at / self.seconds, 0.0), 1.0) * 24
        place = min(bisect.bisect_right(DAY, (hour, 2.0)), len(DAY) - 1)
        (begin, low), (end, high) = DAY[place - 1], DAY[place]
        return self.peak * (low + (high - low) * (hour - begin) / (end - begin))

    @cached_property
    def _come(self) -> list[float]:
        """Requests that have come on average, at each point of a grid of the day."""
        step = self.seconds / _GRID
        rates = [self.rate((n + 0.5) * step) * step for n in range(_GRID)]
        return [0.0, *itertools.accumulate(rates)]

    @property
    def requests(self) -> float:
        """Of the whole day, on average."""
        return self._come[-1]

    def arrivals(self, seed: int) -> list[float]:
        """Seconds after midnight: a Poisson process of this rate."""
        come, step = self._come, self.seconds / _GRID
        found: list[float] = []
        for number in unit_arrivals(seed, 1.0):
            if number >= come[-1]:
                return found
            place = bisect.bisect_right(come, number)
            share = (number - come[place - 1]) / (come[place] - come[place - 1])
            found.append((place - 1 + share) * step)
        return found

    def schedule(self, capacity: Mapping[int, float]) -> list[tuple[float, int]]:
        """(seconds after midnight, ranks): the fewest that take the load of the near future.

        capacity: number of ranks → requests a second that they can take.
        """
        ahead = self.seconds * _AHEAD
        found: list[tuple[float, int]] = []
        for place in range(_GRID):
            at = place * self.seconds / _GRID
            coming = max(self.rate(at + ahead * n / 4) for n in range(5))
            enough = [n for n, most in sorted(capacity.items()) if coming <= _USED * most]
            ranks = enough[0] if enough else max(capacity)
            if not found or found[-1][1] != ranks:
                found.append((at, ranks))
        return found


def flips(sizes: list[int]) -> int:
    """How often the numbers of ranks, one after the other, turn from up to down or back."""
    steps = [after - before for before, after in itertools.pairwise(sizes) if after != before]
    return sum((one > 0) != (two > 0) for one, two in itertools.pairwise(steps))
