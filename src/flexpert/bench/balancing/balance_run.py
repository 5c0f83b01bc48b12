"""Plans placements for traces of loads, and compares them with the baselines."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import mean

import msgspec
import numpy as np

from flexpert.bench.balancing.replicate_and_pack import replicate_and_pack
from flexpert.bench.balancing.routing_traces import TRACES, Trace
from flexpert.bench.machine import Machine, this_machine
from flexpert.moe.balance import imbalance
from flexpert.moe.placement import Placement, loads, replan

SCALED = (16, 24, 16)
SCALED_SLOTS = 18
SPEED = ((64, 2), (1024, 3))  # ranks, and the multiple of the experts that they hold


class Balanced(msgspec.Struct, frozen=True):
    """One way on one trace. own, following: imbalance on the window that it was planned for, and on
    the next, the mean over layers and windows. moved: slots a rebalance, seconds: of a processor,
    to plan it."""

    trace: str
    way: str
    own: float
    following: float
    worst: float
    moved: float
    seconds: float


class RanksChanged(msgspec.Struct, frozen=True):
    """One change of the number of ranks. unavoidable: free slots, or experts that nobody holds.
    imbalance, fresh: of the worst layer; fresh: of the better of two placements from nothing."""

    trace: str
    ranks: list[int]
    moved: int
    unavoidable: int
    imbalance: float
    fresh: float
    seconds: float


class Planned(msgspec.Struct, frozen=True):
    """Seconds of a processor that it takes to plan. fresh_s: from nothing, join_s: half of the
    ranks join, drift_s: loads have changed by half."""

    ranks: int
    slots: int
    fresh_s: float
    join_s: float
    drift_s: float


class BalanceReport(msgspec.Struct, frozen=True):
    """layers, experts, ranks, redundant: of `balanced`."""

    machine: Machine
    seed: int
    layers: int
    experts: int
    ranks: int
    redundant: int
    balanced: list[Balanced]
    scaled: list[RanksChanged]
    planned: list[Planned]


def run_balance(
    traces: dict[str, Trace],
    *,
    ranks: int,
    redundant: int,
    seed: int,
    scale: bool,
    speed: bool,
    note: Callable[[str], None],
) -> BalanceReport:
    """traces: by name, all of one shape."""
    layers, experts = next(iter(traces.values()))[0].shape
    balanced = []
    for name, trace in traces.items():
        note(f"{name}: {len(trace)} windows on {ranks} ranks")
        balanced += _balanced(name, trace, ranks, redundant)
    scaled: list[RanksChanged] = []
    planned = []
    if scale:
        for name in ("uniform", "zipf 0.8", "zipf 1.2"):
            note(f"{name}: {' → '.join(map(str, SCALED))} ranks")
            (window,) = TRACES[name](np.random.default_rng(seed), 1, layers, experts)
            scaled += _scaled(name, window)
    if speed:
        for count, times in SPEED:
            note(f"planning for {count} ranks")
            planned.append(_planned(count, -(-experts * times // count), layers, experts, seed))
    return BalanceReport(
        this_machine(), seed, layers, experts, ranks, redundant, balanced, scaled, planned
    )


def moved(before: Placement | None, after: Placement) -> int:
    """Slots that must be loaded."""
    return sum(map(len, loads(before, after).values()))


def unavoidable(before: Placement, after_ranks: int, slots: int) -> int:
    """Loads that no plan is without that fills all slots: those that are free, and the experts that
    nobody of the ranks holds."""
    count = 0
    for layer in before.layers:
        stay = [layer.get(rank, []) for rank in range(after_ranks)]
        free = sum(slots - len(held) for held in stay)
        count += max(free, before.experts - len(set().union(*stay)))
    return count


def _balanced(name: str, trace: Trace, ranks: int, redundant: int) -> list[Balanced]:
    layers, experts = trace[0].shape
    slots = -(-(experts + redundant) // ranks)

    def even(_: Placement | None, __: object) -> Placement:
        return replan(None, range(ranks), experts=experts, layers=layers, redundant=redundant)

    def packed(_: Placement | None, window: np.ndarray) -> Placement:
        return replicate_and_pack(window.tolist(), ranks, slots)

    def ours(before: Placement | None, window: np.ndarray) -> Placement:
        return replan(
            before,
            range(ranks),
            experts=experts,
            layers=layers,
            redundant=redundant,
            loads=window,
            min_replicas=1,
        )

    result = []
    for way, plan in (("not balanced", even), ("from scratch", packed), ("flexpert", ours)):
        before: Placement | None = None
        own, following, moves, seconds = [], [], [], []
        for window, later in pairwise(trace):
            began = time.process_time()
            after = plan(before, window)
            seconds.append(time.process_time() - began)
            if before is not None:
                moves.append(moved(before, after))
            own += imbalance(after, window)
            following += imbalance(after, later)
            before = after
        rebalances = mean(moves) if moves else 0.0
        figures = mean(own), mean(following), max(own), rebalances, mean(seconds)
        result.append(Balanced(name, way, *figures))
    return result


def _scaled(name: str, window: np.ndarray) -> list[RanksChanged]:
    layers, experts = window.shape
    before: Placement | None = None
    result = []
    for count in SCALED:
        began = time.process_time()
        after = replan(
            before,
            range(count),
            experts=experts,
            layers=layers,
            slots=dict.fromkeys(range(count), SCALED_SLOTS),
            loads=window,
        )
        seconds = time.process_time() - began
        if before is not None:
            packed = replicate_and_pack(window.tolist(), count, SCALED_SLOTS)
            result.append(
                RanksChanged(
                    name,
                    [len(before.ranks), count],
                    moved(before, after),
                    unavoidable(before, count, SCALED_SLOTS),
                    max(imbalance(after, window)),
                    max(imbalance(packed, window)),
                    seconds,
                )
            )
        before = after
    return result


def _planned(ranks: int, slots: int, layers: int, experts: int, seed: int) -> Planned:
    random = np.random.default_rng(seed)
    (window,) = TRACES["zipf 0.8"](random, 1, layers, experts)
    most = {rank: max(slots, -(-2 * experts // ranks)) for rank in range(ranks)}

    def timed(
        before: Placement | None, count: int, loads_then: np.ndarray
    ) -> tuple[Placement, float]:
        began = time.process_time()
        after = replan(
            before, range(count), experts=experts, layers=layers, slots=most, loads=loads_then
        )
        return after, time.process_time() - began

    half, _ = timed(None, ranks // 2, window)
    whole, fresh_s = timed(None, ranks, window)
    _, join_s = timed(half, ranks, window)
    _, drift_s = timed(whole, ranks, window * random.uniform(0.5, 1.5, window.shape))
    return Planned(ranks, most[0], fresh_s, join_s, drift_s)
