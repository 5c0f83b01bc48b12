"""What a chaos run has seen, and what it comes to (pure)."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from flexpert.bench.machine import Machine

LETHAL = ("kill", "stop", "oom")
BIN_S = 0.1
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Fault:
    """One fault; times are `time.time` seconds. gone: when the head said that the rank is gone."""

    kind: str
    rank: int
    at: float
    gone: float | None = None
    epoch: float | None = None  # the next epoch, without it, is entered
    step: float | None = None  # the first token after that
    whole: float | None = None  # the service has all its ranks again


@dataclass(slots=True)
class Seen:
    """The run so far."""

    began: float = 0.0
    faults: list[Fault] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # when, how many
    warnings: list[str] = field(default_factory=list)

    def on_tokens(self, now: float, count: int) -> None:
        self.tokens.append((now, count))
        for fault in self.faults:
            if fault.epoch is not None and fault.step is None and now >= fault.epoch:
                fault.step = now

    def on_gone(self, rank: int, now: float) -> None:
        """The latest fault did it; one before it had no effect."""
        mine = [fault for fault in self.faults if fault.rank == rank and fault.kind in LETHAL]
        if mine and mine[-1].gone is None:
            mine[-1].gone = now

    def on_epoch(self, ranks: Sequence[int], now: float, wanted: int) -> None:
        for fault in self.faults:
            if fault.gone is not None and fault.epoch is None:
                fault.epoch = now
            if fault.epoch is not None and fault.whole is None and len(ranks) >= wanted:
                fault.whole = now


class Spread(msgspec.Struct, frozen=True):
    """Milliseconds after the fault."""

    count: int
    median_ms: float
    p90_ms: float
    longest_ms: float


class Held(msgspec.Struct, frozen=True):
    """What the head holds."""

    resident_mib: float
    descriptors: int
    processes: int


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """From a fault until: the head knows, the next epoch is entered, a token comes out of it, and
    all ranks are back. None if it never happened."""

    detect: Spread | None
    epoch: Spread | None
    first_good_step: Spread | None
    full_capacity: Spread | None


class ChaosResult(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert chaos`.

    good: nothing was lost or altered, and all ranks are back. faults: how many by kind.
    without_effect: those that should have ended a rank and did not. altered: not word for word as
    in the undisturbed run. changes: of --during-scaling, how many by outcome. times: by kind.
    """

    good: bool
    machine: Machine
    seed: int
    ranks: int
    clients: int
    duration_s: float
    faults: dict[str, int]
    without_effect: int
    sent: int
    answered: int
    lost: int
    altered: int
    tokens_per_s: float
    changes: dict[str, int]
    times: dict[str, Times]
    before: Held
    after: Held
    back: bool
    errors: list[str]


def spread(values_s: Sequence[float]) -> Spread | None:
    if not values_s:
        return None
    ordered = sorted(values_s)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    median = statistics.median(ordered)
    return Spread(
        len(ordered), round(median * 1e3, 1), round(p90 * 1e3, 1), round(ordered[-1] * 1e3, 1)
    )


def times_of(faults: Sequence[Fault]) -> dict[str, Times]:
    """By kind, of those that ended a rank."""
    kinds = sorted({fault.kind for fault in faults if fault.gone is not None})
    return {
        kind: Times(
            detect=spread([f.gone - f.at for f in faults if f.kind == kind and f.gone]),
            epoch=spread([f.epoch - f.at for f in faults if f.kind == kind and f.epoch]),
            first_good_step=spread([f.step - f.at for f in faults if f.kind == kind and f.step]),
            full_capacity=spread([f.whole - f.at for f in faults if f.kind == kind and f.whole]),
        )
        for kind in kinds
    }


def counts(faults: Sequence[Fault]) -> dict[str, int]:
    return dict(sorted(Counter(fault.kind for fault in faults).items()))


def rates(seen: Seen, until: float, bin_s: float = BIN_S) -> list[float]:
    """Tokens a second in each bin since the begin."""
    found = [0.0] * max(1, int((until - seen.began) / bin_s) + 1)
    for at, count in seen.tokens:
        place = int((at - seen.began) / bin_s)
        if 0 <= place < len(found):
            found[place] += count / bin_s
    return found


def sparkline(values: Sequence[float], width: int = 72) -> str:
    """The values as a line of bars."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [statistics.fmean(values[at : at + size]) for at in range(0, len(values), size)]
    top = max(means) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int(mean / top * len(_BARS)))] for mean in means)
