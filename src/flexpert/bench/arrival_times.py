"""When the requests of an open load arrive: at a steady rate, or at one that rises or falls (pure).

The gaps between arrivals are gamma-distributed. Their shape is the burstiness: 1 is a Poisson
process, less comes in bursts, more is more even than chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from flexpert.errors import ConfigError
from flexpert.reading import shown

RampKind = Literal["linear", "exponential"]
RAMP_EXAMPLE = "linear:1:8"
_MOST_RATE = 1e6


@dataclass(frozen=True, slots=True)
class RateRamp:
    """A rate that goes from `begin` to `end` requests a second, linearly or by a steady factor."""

    kind: RampKind
    begin: float
    end: float

    @classmethod
    def parse(cls, text: str) -> RateRamp:
        """From "linear:1:8". Raises: ConfigError"""
        kind, _, rates = text.partition(":")
        first, _, last = rates.partition(":")
        try:
            begin, end = float(first), float(last)
        except ValueError:
            begin = end = math.nan
        for known in get_args(RampKind):
            if kind == known and 0 < begin <= _MOST_RATE and 0 < end <= _MOST_RATE:
                return cls(known, begin, end)
        raise ConfigError(
            f"--ramp {shown(text)}: write linear:A:B or exponential:A:B, from A to B requests a "
            f"second, for example {RAMP_EXAMPLE}"
        )

    def seconds(self, count: int) -> float:
        """In which `count` requests arrive."""
        if self.kind == "exponential" and self.begin != self.end:
            return count * math.log(self.end / self.begin) / (self.end - self.begin)
        return 2 * count / (self.begin + self.end)

    def time_of(self, number: float, count: int) -> float:
        """When as many have arrived, of `count`: the inverse of the rate's integral."""
        change = self.end - self.begin
        if not change:
            return number / self.begin
        if self.kind == "exponential":
            growth = math.log(self.end / self.begin) / self.seconds(count)
            return math.log1p(number * growth / self.begin) / growth
        slope = change / self.seconds(count)
        # below zero by rounding only: at the end of a ramp that falls to nearly nothing
        return (math.sqrt(max(0.0, self.begin**2 + 2 * slope * number)) - self.begin) / slope

    def __str__(self) -> str:
        return f"{self.begin:g} to {self.end:g} a second ({self.kind})"


def gamma_arrivals(rate: float, count: int, seed: int, burstiness: float = 1.0) -> list[float]:
    """Seconds from the start at which `count` requests arrive, `rate` a second on average."""
    return [at / rate for at in islice(unit_arrivals(seed, burstiness), count)]


def ramp_arrivals(ramp: RateRamp, count: int, seed: int, burstiness: float = 1.0) -> list[float]:
    """The same at a rate that changes. They fill the ramp: the next request after the last would
    arrive at its very end."""
    *numbers, end = islice(unit_arrivals(seed, burstiness), count + 1)
    return [ramp.time_of(number * count / (end or 1.0), count) for number in numbers]


def unit_arrivals(seed: int, burstiness: float) -> Iterator[float]:
    """Arrivals of one a second on average, from 0 on."""
    source = random.Random(seed)
    at = 0.0
    while True:
        yield at
        if burstiness == 1.0:
            at += source.expovariate(1.0)
        else:
            at += source.gammavariate(burstiness, 1.0 / burstiness)
