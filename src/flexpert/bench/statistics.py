"""Percentiles and the figures of a run (pure)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec

from flexpert.bench.load import ClientAnswer


class SpreadUs(msgspec.Struct, frozen=True):
    """Percentiles of measured times in microseconds."""

    p10: float
    p50: float
    p90: float

    @classmethod
    def of(cls, times_us: Iterable[float]) -> SpreadUs:
        """Raises: IndexError: there is no time."""
        ordered = sorted(times_us)
        return cls(*(percentile(ordered, share) for share in (0.1, 0.5, 0.9)))


class Summary(msgspec.Struct, frozen=True):
    """One measure over all requests, in the unit its name says."""

    mean: float
    p50: float
    p90: float
    p99: float
    longest: float


class Goodput(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that kept to all goals (milliseconds, by name), and their share of all."""

    goals_ms: dict[str, float]
    requests: int
    share: float
    requests_per_s: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a load.

    duration_s: first request sent until last answer complete. first_token_ms, end_to_end_ms: per
    request; inter_token_ms: per pair of events that follow each other in a stream. Requests that
    failed count in none of them; errors holds up to five different reasons.
    """

    requests: int
    failed: int
    duration_s: float
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    first_token_ms: Summary | None
    inter_token_ms: Summary | None
    end_to_end_ms: Summary | None
    errors: list[str] = []
    goodput: Goodput | None = None


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the ordered values lie, interpolated linearly."""
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def median_interval(values: Iterable[float], chance: float = 0.05) -> tuple[float, float]:
    """Between which two of the values the true median lies, but for this chance, however they are
    spread (order statistics); between the first and the last if they are too few for that.

    Raises: IndexError: there is none.
    """
    ordered = sorted(values)
    count, left, below = len(ordered), 0, 0.0
    while left < count // 2:
        below += math.comb(count, left) / 2**count
        if 2 * below > chance:
            break
        left += 1
    place = max(0, left - 1)
    return ordered[place], ordered[-1 - place]


def summarise(values: Iterable[float]) -> Summary | None:
    """None without values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Summary(
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 0.5),
        p90=percentile(ordered, 0.9),
        p99=percentile(ordered, 0.99),
        longest=ordered[-1],
    )


def figures(answers: Sequence[ClientAnswer]) -> Figures:
    """The figures of a run."""
    whole = [answer for answer in answers if answer.whole]
    duration = 0.0
    if answers:
        duration = max(a.ended for a in answers) - min(a.sent for a in answers)
    tokens = sum(answer.tokens for answer in whole)
    firsts = [a.first_token_s * 1e3 for a in whole if a.first_token_s is not None]
    errors = dict.fromkeys(a.error for a in answers if a.error is not None)
    return Figures(
        requests=len(answers),
        failed=len(answers) - len(whole),
        duration_s=duration,
        output_tokens=tokens,
        requests_per_s=len(whole) / duration if duration else 0.0,
        output_tokens_per_s=tokens / duration if duration else 0.0,
        first_token_ms=summarise(firsts),
        inter_token_ms=summarise(gap * 1e3 for a in whole for gap in a.gaps_s),
        end_to_end_ms=summarise(a.total_s * 1e3 for a in whole),
        errors=list(errors)[:5],
    )


def longest_gap(answers: Iterable[ClientAnswer], begin: float, end: float) -> tuple[float, float]:
    """(seconds, when it began) of any answer's that overlaps that time; (0, begin) without one."""
    gaps = (
        (after - before, before)
        for answer in answers
        if answer.times and answer.times[-1] > begin and answer.times[0] < end
        for before, after in itertools.pairwise(answer.times)
        if after > begin and before < end
    )
    return max(gaps, default=(0.0, begin))
