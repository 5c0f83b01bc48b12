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
_CREDIT_S = 15.0  # a death later than that is not the fault's
_BARS = "▁▂▃▄▅▆▇█"
_MORE_MIB, _MORE_DESCRIPTORS = 48.0, 8  # more than that, and a process has grown


@dataclass(slots=True)
class ChaosFault:
    """One fault; times are `time.time` seconds. gone: when the head said that the process is gone.

    serving: whether the rank was a member then, and no newcomer. seconds: length of a partition.
    """

    kind: str
    rank: int
    pid: int
    at: float
    seconds: float = 0.0
    serving: bool = True
    gone: float | None = None
    epoch: float | None = None  # the next epoch, without it, is entered
    step: float | None = None  # the first token after that
    whole: float | None = None  # the service has all the ranks again that it wants


@dataclass(slots=True)
class Seen:
    """The run so far. unharmed: ranks that were evicted or failed though no fault ends them.

    last_lines: what a service of our own printed last, if the run was bad.
    """

    began: float = 0.0
    faults: list[ChaosFault] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)  # when, how many
    warnings: list[str] = field(default_factory=list)
    unharmed: list[str] = field(default_factory=list)
    last_lines: Sequence[str] = ()

    def on_tokens(self, now: float, count: int) -> None:
        self.tokens.append((now, count))
        for fault in self.faults:
            if fault.epoch is not None and fault.step is None and now >= fault.epoch:
                fault.step = now

    def on_gone(self, rank: int, pid: int, now: float, *, unasked: bool, reason: str) -> None:
        """The latest fault of that process did it, if it was not long ago.

        unasked: it was evicted or failed.
        """
        mine = [fault for fault in self.faults if fault.pid == pid and now - fault.at < _CREDIT_S]
        lethal = [fault for fault in mine if fault.kind in LETHAL]
        if lethal:
            lethal[-1].gone = now
        elif unasked and not any(fault.kind == "partition" for fault in mine):
            what = mine[-1].kind if mine else "untouched"
            self.unharmed.append(f"rank {rank}, {what}: {reason}")

    def on_epoch(self, ranks: Sequence[int], desired: Sequence[int], now: float) -> None:
        for fault in self.faults:
            if fault.gone is None:
                continue
            if fault.epoch is None and fault.serving:
                fault.epoch = now
            if fault.whole is None and set(ranks) >= set(desired):
                fault.whole = now


class ChaosSpread(msgspec.Struct, frozen=True):
    """Milliseconds after the fault."""

    count: int
    median_ms: float
    p90_ms: float
    longest_ms: float


class RankHeld(msgspec.Struct, frozen=True):
    """What a rank holds. private_mib: memory of its own."""

    pid: int
    private_mib: float
    descriptors: int


class Held(msgspec.Struct, frozen=True):
    """What the head and its processes hold. ranks: by id."""

    resident_mib: float
    descriptors: int
    processes: int
    ranks: dict[int, RankHeld]


def growth(before: Held, after: Held) -> list[str]:
    """Ranks that hold more than the process that had their id before, or they themselves, did."""
    found = []
    for rank, now in after.ranks.items():
        was = before.ranks.get(rank)
        if was is None:
            continue
        if now.private_mib > was.private_mib + _MORE_MIB:
            found.append(f"rank {rank}: {was.private_mib} → {now.private_mib} MiB")
        if now.descriptors > was.descriptors + _MORE_DESCRIPTORS:
            found.append(f"rank {rank}: {was.descriptors} → {now.descriptors} descriptors")
    return found


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """From a fault until: the head knows, the next epoch is entered, a token comes out of it, and
    all ranks are back. None if it never happened. A newcomer's end needs no epoch."""

    detect: ChaosSpread | None
    epoch: ChaosSpread | None
    first_good_step: ChaosSpread | None
    full_capacity: ChaosSpread | None


class ChaosResult(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON of `flexpert chaos`.

    good: nothing was lost or altered, nobody ended who was not harmed, no rank has grown, and all
    are back. unharmed: ranks that were evicted or failed though at most slowed. grown: those that
    hold more than before. faults: how many by kind.
    without_effect: those that should have terminated a rank and did not. altered: not word for word
    as in the undisturbed run. changes: of --during-scaling, how many by outcome. times: by kind.
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
    unharmed: list[str]
    grown: list[str]
    errors: list[str]


def spread(values_s: Sequence[float]) -> ChaosSpread | None:
    if not values_s:
        return None
    ordered = sorted(values_s)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    median = statistics.median(ordered)
    return ChaosSpread(
        len(ordered), round(median * 1e3, 1), round(p90 * 1e3, 1), round(ordered[-1] * 1e3, 1)
    )


def times_of(faults: Sequence[ChaosFault]) -> dict[str, Times]:
    """Those that ended a rank, by kind."""
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


def counts(faults: Sequence[ChaosFault]) -> dict[str, int]:
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
