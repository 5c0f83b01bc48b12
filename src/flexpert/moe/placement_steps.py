"""The way from one placement to another in single loads, all experts held at every moment (pure).

Each step loads one replica, and then drops what has become superfluous: nothing is dropped before
another rank holds it. So one slot more than a rank has before or afterwards is enough, and only one
rank needs it at a time. What gains the most for each load comes first, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from flexpert.moe.balance import rank_loads
from flexpert.moe.expert_loads import ExpertLoads
from flexpert.moe.placement import Placement


class PlacementStep(msgspec.Struct, frozen=True):
    """Of one layer. load: (rank, expert), or None if something is only dropped; drop: the same,
    after that. gain: of the layer's largest load, for each of its loads."""

    layer: int
    load: tuple[int, int] | None
    drop: list[tuple[int, int]]
    gain: float = 0.0


def moves(
    before: Placement, after: Placement, expert_loads: ExpertLoads | None = None
) -> list[PlacementStep]:
    """The steps from `before` to `after`; whoever stops after any of them has a whole placement.

    Ranks of both take part: those that leave drop what others have loaded. Layers go in the order
    of what they gain for each load, those in which experts would get lost first.

    Raises:
        ValueError: the placements are of different models, or see `load_array`.
    """
    if before.experts != after.experts or len(before.layers) != len(after.layers):
        raise ValueError("the placements are of different models")
    gains = np.zeros(len(after.layers))
    if expert_loads is not None:
        most = [rank_loads(one, expert_loads).max(axis=1) for one in (before, after)]
        gains = most[0] - most[1]
    found = []
    for layer, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        steps = list(_of_layer(layer, old, new))
        loaded = sum(step.load is not None for step in steps)
        worth = float(gains[layer]) / max(1, loaded)
        found.append([msgspec.structs.replace(step, gain=worth) for step in steps])
    found.sort(key=lambda steps: -steps[0].gain if steps else 0.0)  # stable: then by layer
    return [step for steps in found for step in steps]


def applied(placement: Placement, step: PlacementStep) -> Placement:
    """The placement after a step."""
    layers = list(placement.layers)
    layer = {rank: set(held) for rank, held in layers[step.layer].items()}
    if step.load is not None:
        layer.setdefault(step.load[0], set()).add(step.load[1])
    for rank, expert in step.drop:
        layer[rank].remove(expert)
    layers[step.layer] = {rank: sorted(held) for rank, held in layer.items()}
    return Placement(placement.experts, layers)


def _of_layer(
    layer: int, old: dict[int, list[int]], new: dict[int, list[int]]
) -> Iterator[PlacementStep]:
    ranks = sorted(old.keys() | new.keys())
    held = {rank: set(old.get(rank, ())) for rank in ranks}
    wanted = {rank: set(new.get(rank, ())) for rank in ranks}
    size = {rank: max(len(held[rank]), len(wanted[rank])) for rank in ranks}
    holders: dict[int, set[int]] = {}
    for rank in ranks:
        for expert in held[rank]:
            holders.setdefault(expert, set()).add(rank)

    def drops() -> list[tuple[int, int]]:
        gone = []
        for rank in ranks:
            for expert in sorted(held[rank] - wanted[rank]):
                if len(holders[expert]) > 1:
                    held[rank].remove(expert)
                    holders[expert].remove(rank)
                    gone.append((rank, expert))
        return gone

    if gone := drops():
        yield PlacementStep(layer, None, gone)
    while pending := [
        (rank, expert) for rank in ranks for expert in sorted(wanted[rank] - held[rank])
    ]:
        # what nobody has goes first, then what fits; else what makes room on a rank that is too
        # full, which needs one more slot on another one in its turn
        over = {rank for rank in ranks if len(held[rank]) > size[rank]}
        rank, expert = min(
            pending,
            key=lambda load: (
                len(held[load[0]]) >= size[load[0]],
                not holders.get(load[1], set()) & over,
                load[1] in holders,
                load,
            ),
        )
        held[rank].add(expert)
        holders.setdefault(expert, set()).add(rank)
        yield PlacementStep(layer, (rank, expert), drops())
