"""When it is worth moving experts between ranks, and which layers go first (pure).

A step waits in each layer for the rank that has the most to compute. What that costs is measured:
the choices of the routers, and how long a rank takes for one. What a better placement would save is
weighed against what moving costs, and both against what the loads may do meanwhile: a placement
must be better for what came lately and for what came last, it must pay for itself twice before
loads are likely to be others, and after each change comes a rest that is long against its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from flexpert.moe.placement import Placement

Loads = npt.NDArray[np.float64]

HORIZON_S = 60.0  # so long loads are taken to stay what they are
PAYS = 2.0  # what is gained in that time, of its cost
LEAST_GAIN = 0.03  # of the time
LEAST_EVERY = 0.005  # the same, where no cost is asked for
LATEST = 0.5  # of the gain, by the latest loads alone
LEAST_CHOICES = 64  # of each expert, on average: what fewer say is chance
REST_S = 10.0
REST_COSTS = 20.0  # of what a change cost, the rest after it
ASSUMED_BUSY = 0.5  # share of the time in experts' products where it is not measured


class Ground(Enum):
    """Why experts are moved, or are not."""

    GAIN = "gain"  # moves
    INTERVAL = "interval"  # moves
    REDUNDANCY = "redundancy"  # moves
    REQUEST = "request"  # moves
    OFF = "off"
    BUSY = "busy"  # a change of the ranks runs or is due
    IDLE = "idle"  # too little was computed
    BALANCED = "balanced"
    SMALL = "small"  # the gain
    DEAR = "dear"  # the moves
    UNSTEADY = "unsteady"  # the loads
    REST = "rest"  # after the last change
    MEMORY = "memory"  # there is none
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class BalanceVerdict:
    """reason: for people."""

    ground: Ground
    reason: str

    @property
    def moves(self) -> bool:
        return self.ground in (Ground.GAIN, Ground.INTERVAL, Ground.REDUNDANCY, Ground.REQUEST)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured lately.

    choices_per_s: of all ranks. choice_s: of a rank's time, for one; 0: not known. enough: of each
    expert, on average. parallel: how many ranks can compute at the same time, at most: fewer than
    there are where they share processors.
    """

    choices_per_s: float
    choice_s: float
    per_expert: float
    parallel: float


def busy_share(rank_loads: Loads, measured: Measured) -> float:
    """The share of the time for which a step waits for experts' products."""
    total = rank_loads.sum()
    if total <= 0:
        return 0.0
    floor = rank_loads.sum(axis=1) / measured.parallel
    longest = float(np.maximum(rank_loads.max(axis=1), floor).sum() / total)
    if measured.choice_s <= 0:  # relative to ranks that all have the same to do
        return float(ASSUMED_BUSY * longest * rank_loads.shape[1])
    return float(longest * measured.choices_per_s * measured.choice_s)


@dataclass(frozen=True, slots=True)
class Gain:
    """Shares of the time: for which steps wait for experts, as they lie now and as they would."""

    before: float
    after: float

    @property
    def share(self) -> float:
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.before:.1%} of the time → {self.after:.1%}"


def worth_planning(gain_at_best: Gain, measured: Measured) -> BalanceVerdict | None:
    """Whether to look for a better placement; None: yes. gain_at_best: with even loads."""
    if measured.per_expert < LEAST_CHOICES:
        return BalanceVerdict(
            Ground.IDLE,
            f"each expert was chosen {measured.per_expert:.0f} times lately, which says too little",
        )
    if gain_at_best.share < LEAST_EVERY:
        return BalanceVerdict(Ground.BALANCED, f"even loads would gain {gain_at_best.share:.1%}")
    return None


def rest_s(cost_s: float) -> float:
    """For how long nothing is moved by itself after a change that has cost so much."""
    return max(REST_S, REST_COSTS * cost_s)


def judge(recent: Gain, latest: Gain, cost_s: float, *, at_fixed_times: bool) -> BalanceVerdict:
    """Whether to move to a placement that was found.

    recent, latest: with the loads of the last half-life, and with those since the last look.
    cost_s: of ranks' time that it takes.
    """
    if at_fixed_times:
        if recent.share < LEAST_EVERY:
            return BalanceVerdict(Ground.BALANCED, f"no placement found gains anything: {recent}")
        return BalanceVerdict(Ground.INTERVAL, str(recent))
    if recent.share < LEAST_GAIN:
        return BalanceVerdict(Ground.SMALL, f"gains {recent.share:.1%} of the time ({recent})")
    gained_s = recent.share * HORIZON_S
    if gained_s < PAYS * cost_s:
        return BalanceVerdict(
            Ground.DEAR,
            f"gains {gained_s:.2f} s in {HORIZON_S:.0f} s and costs {cost_s:.2f} s ({recent})",
        )
    if latest.share < LATEST * recent.share:
        return BalanceVerdict(
            Ground.UNSTEADY,
            f"would have gained {latest.share:.1%} with the latest loads, not {recent.share:.1%}",
        )
    return BalanceVerdict(
        Ground.GAIN, f"gains {gained_s:.2f} s in {HORIZON_S:.0f} s, costs {cost_s:.2f} s ({recent})"
    )


def loads_by_layer(before: Placement, after: Placement) -> list[dict[int, int]]:
    """Per layer: rank → how many experts it must load."""
    return [
        {rank: len(set(held).difference(old.get(rank, ()))) for rank, held in new.items()}
        for old, new in zip(before.layers, after.layers, strict=True)
    ]


def first_part(before: Placement, after: Placement, worth: Sequence[float], most: int) -> Placement:
    """The layers of `after` that gain the most for what they move, the others as they are, such
    that no rank loads more than `most` experts; at least one layer that differs.

    A change of one layer needs no other: the rest can follow in later epochs. worth: of each layer.
    """
    loads = loads_by_layer(before, after)
    pairs = enumerate(zip(before.layers, after.layers, strict=True))
    moved = {index: sum(loads[index].values()) for index, (old, new) in pairs if old != new}
    layers, loaded = list(before.layers), dict.fromkeys(after.ranks, 0)
    taken = False
    for index in sorted(moved, key=lambda index: (-worth[index] / max(1, moved[index]), index)):
        then = {rank: loaded[rank] + count for rank, count in loads[index].items()}
        if not taken or max(then.values()) <= most:
            layers[index], loaded, taken = after.layers[index], then, True
    return Placement(after.experts, layers)


def cost_s(
    before: Placement, after: Placement, move_s: float, pause_s: float, parallel: float
) -> float:
    """Of the ranks' time. move_s: of one rank, for an expert that it loads."""
    loads = loads_by_layer(before, after)
    totals = [sum(layer.get(rank, 0) for layer in loads) for rank in after.ranks]
    return max(max(totals), sum(totals) / parallel) * move_s + pause_s
