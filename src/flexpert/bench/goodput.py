"""Goodput: the requests a second that kept to goals, each of them to all (pure).

Goals are written as for vLLM's `bench serve`, in milliseconds of one request:

    ttft    time to first token
    tpot    time per output token after the first, on average
    itl     99 of a hundred gaps between two pieces of the answer are no longer
    e2el    until the answer is complete
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from flexpert.bench.load import ClientAnswer
from flexpert.bench.statistics import Figures, Goodput, figures, percentile
from flexpert.errors import ConfigError
from flexpert.reading import shown

GOODPUT_EXAMPLE = "ttft:500 itl:50"

LatencyGoals = Mapping[str, float]


def parse_goodput(texts: Iterable[str]) -> dict[str, float]:
    """Goals from "ttft:500 itl:50", in one text or in several. Raises: ConfigError"""
    goals: dict[str, float] = {}
    for part in " ".join(texts).split():
        name, _, value = part.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in _MEASURES or not 0 < limit < math.inf:
            raise ConfigError(
                f"--goodput {shown(part)}: one of {', '.join(_MEASURES)} and milliseconds, for "
                f"example {GOODPUT_EXAMPLE!r}"
            )
        if name in goals:
            raise ConfigError(f"--goodput: {name} has two goals")
        goals[name] = limit
    return goals


def meets(answer: ClientAnswer, goals: LatencyGoals) -> bool:
    """Whether it is whole, and kept to every goal."""
    return answer.whole and all(
        _MEASURES[name](answer) * 1e3 <= limit for name, limit in goals.items()
    )


def figures_with_goodput(answers: Sequence[ClientAnswer], goals: LatencyGoals) -> Figures:
    """The figures of a run; without goals there is no goodput."""
    found = figures(answers)
    if not goals:
        return found
    met = sum(meets(answer, goals) for answer in answers)
    goodput = Goodput(
        goals_ms=dict(goals),
        requests=met,
        share=met / len(answers) if answers else 0.0,
        requests_per_s=met / found.duration_s if found.duration_s else 0.0,
    )
    return msgspec.structs.replace(found, goodput=goodput)


def _first_token_s(answer: ClientAnswer) -> float:
    found = answer.first_token_s
    return math.inf if found is None else found


def _per_token_s(answer: ClientAnswer) -> float:
    if answer.tokens < 2 or not answer.times:
        return 0.0
    return (answer.times[-1] - answer.times[0]) / (answer.tokens - 1)


def _gap_s(answer: ClientAnswer) -> float:
    gaps = sorted(answer.gaps_s)
    return percentile(gaps, 0.99) if gaps else 0.0


_MEASURES: Mapping[str, Callable[[ClientAnswer], float]] = {
    "ttft": _first_token_s,
    "tpot": _per_token_s,
    "itl": _gap_s,
    "e2el": lambda answer: answer.total_s,
}
