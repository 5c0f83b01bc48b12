"""A load over time: throughput, first tokens and gaps in steps of equal length (pure)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import msgspec

from flexpert.bench.load import ClientAnswer
from flexpert.bench.statistics import percentile

_BARS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 72
_STEPS_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class TimelinePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One step. at_s: its begin. tokens_per_s: pieces of streams, which are tokens where each has a
    text. first_token_ms: median of the answers that began in it; inter_token_ms: 99 of a hundred
    gaps that ended in it are no longer; None: there were none.
    """

    at_s: float
    tokens_per_s: float
    first_token_ms: float | None
    inter_token_ms: float | None


def step_for(duration_s: float, points: int = _MOST_POINTS) -> float:
    """The length of steps of which so many at most fill that time."""
    return next((s for s in _STEPS_S if duration_s / s <= points), duration_s / points)


def timeline(
    answers: Iterable[ClientAnswer], begin: float, end: float, step_s: float
) -> list[TimelinePoint]:
    """Of the time from `begin` to `end` on `perf_counter`."""
    count = max(1, -int(-(end - begin) / step_s // 1))
    pieces = [0] * count
    firsts: list[list[float]] = [[] for _ in range(count)]
    gaps: list[list[float]] = [[] for _ in range(count)]

    def place(at: float) -> int | None:
        found = int((at - begin) // step_s)
        return found if 0 <= found < count else None

    for answer in answers:
        for at in answer.times:
            if (step := place(at)) is not None:
                pieces[step] += 1
        if answer.times and (step := place(answer.times[0])) is not None:
            firsts[step].append(answer.times[0] - answer.sent)
        for before, after in itertools.pairwise(answer.times):
            if (step := place(after)) is not None:
                gaps[step].append(after - before)
    return [
        TimelinePoint(
            at_s=step * step_s,
            tokens_per_s=pieces[step] / step_s,
            first_token_ms=_ms(firsts[step], 0.5),
            inter_token_ms=_ms(gaps[step], 0.99),
        )
        for step in range(count)
    ]


def _ms(seconds: list[float], share: float) -> float | None:
    return percentile(sorted(seconds), share) * 1e3 if seconds else None


def bars(values: Sequence[float]) -> str:
    """A character for each value, as high as its share of the largest."""
    most = max(values, default=0.0)
    if not most:
        return " " * len(values)
    last = len(_BARS) - 1
    return "".join(_BARS[min(last, int(v / most * len(_BARS)))] if v else " " for v in values)
