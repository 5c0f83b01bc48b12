"""Which rank holds which expert, and how that changes with few moves (pure).

`replan` is the one call for a join, a leave, a loss and a rebalance: even numbers of experts on all
ranks (`even_placement.py`), or even loads (`load_placement.py`). After a loss, `keep` loads nothing
and may leave experts that nobody holds, `cover` loads only these; the next `replan` restores
balance and redundancy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from flexpert.moe.even_placement import (
    copies_of,
    even_layer,
    even_replicas,
    spread_over_machines,
)

if TYPE_CHECKING:
    from flexpert.moe.expert_loads import ExpertLoads

__all__ = ["Placement", "copies_of", "cover", "keep", "loads", "replan"]


class Placement(msgspec.Struct, frozen=True):
    """Per layer: rank id → the experts it holds; an expert's slot is its position there.

    experts: logical experts of each layer, numbered from 0.
    layers: one mapping per MoE layer.
    """

    experts: int
    layers: list[dict[int, list[int]]]

    @property
    def ranks(self) -> list[int]:
        """The ids that take part, sorted."""
        return sorted(self.layers[0]) if self.layers else []

    def held_by(self, rank: int) -> list[list[int]]:
        """Per layer, the experts of a rank in slot order."""
        return [layer.get(rank, []) for layer in self.layers]

    def count(self, rank: int) -> int:
        """Replicas a rank holds, over all layers."""
        return sum(map(len, self.held_by(rank)))

    def missing(self) -> list[tuple[int, int]]:
        """(layer, expert) pairs that nobody holds; tokens are routed around them."""
        return [
            (index, expert)
            for index, layer in enumerate(self.layers)
            for expert in sorted(set(range(self.experts)).difference(*layer.values()))
        ]

    def thinner_than(self, copies: Sequence[int]) -> int:
        """How many (layer, expert) pairs have a holder, but fewer than copies[expert]."""
        held = [Counter(chain.from_iterable(layer.values())) for layer in self.layers]
        return sum(0 < of[expert] < want for of in held for expert, want in enumerate(copies))

    def owners(
        self, layer: int, viewer: int, machines: Mapping[int, str] | None = None
    ) -> tuple[list[int], list[int]]:
        """(owner's rank, slot) per expert as `viewer` should use them; -1 = nobody.

        The first of those that `nearest` has.
        """
        first = [near[0] if near else (-1, -1) for near in self.nearest(layer, viewer, machines)]
        return [rank for rank, _ in first], [slot for _, slot in first]

    def nearest(
        self, layer: int, viewer: int, machines: Mapping[int, str] | None = None
    ) -> list[list[tuple[int, int]]]:
        """Per expert the replicas, as (rank, slot), that `viewer` should use: its own, else those
        on its machine, else all.

        Viewers begin with different ones. machines: rank → its machine; default: all are on one.
        """
        held = self.layers[layer]
        names = {rank: (machines or {}).get(rank, "") for rank in (*held, viewer)}
        home, turn = names[viewer], viewer
        if len(set(names.values())) > 1:  # ids of one machine may all be even: neighbours are not
            turn = sorted(names, key=lambda rank: (names[rank], rank)).index(viewer)
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.experts)]
        for rank in sorted(held):
            for slot, expert in enumerate(held[rank]):
                places[expert].append((rank, slot))
        found = []
        for replicas in places:
            own = [place for place in replicas if place[0] == viewer]
            near = own or [place for place in replicas if names[place[0]] == home] or replicas
            first = turn % len(near) if near else 0
            found.append(near[first:] + near[:first])
        return found


def replan(
    previous: Placement | None,
    ranks: Iterable[int],
    *,
    experts: int,
    layers: int,
    redundant: int = 0,
    machines: Mapping[int, str] | None = None,
    loads: ExpertLoads | None = None,
    slots: Mapping[int, int] | None = None,
    min_replicas: int = 2,
    max_moves: int | None = None,
) -> Placement:
    """The balanced placement on `ranks` that loads few experts, coming from `previous`.

    Without `loads` and `slots` the numbers of experts differ by at most one in each layer, and no
    balanced placement loads fewer if none is redundant. With them the aims are, in this order:
    every expert is held, by two machines if there is room for two replicas of each; no rank has
    much more to do in a layer than in a fresh placement (`load_placement.TOLERANCE`); few loads.
    Slots that are free before are filled; a slot that is emptied to avoid loads may stay so until
    the next change. The load of a replicated expert counts in equal parts on those who hold it.

    Args:
        redundant: replicas of each layer beyond one of each expert, spread over the experts as
            evenly as can be, or by load. No rank holds two of one expert: what does not fit is left
            out.
        machines: rank → its machine. Replicas of an expert go to different ones, as shares allow:
            with two of each, the loss of a machine loses no expert unless more than half of the
            ranks are on it. Default: all are on one.
        loads: [layers][experts], what each expert has to do, in any unit. A layer without any has
            all equal, and so have all by default.
        slots: rank → replicas of each layer it can hold, in place of `redundant`.
        min_replicas: every expert has as many when there is room for that (with loads or slots).
        max_moves: loads beyond those that are needed to hold every expert (with loads or slots).

    Raises:
        ValueError: no ranks, too few slots, or loads of another shape.
    """
    ids = sorted(set(ranks))
    if not ids:
        raise ValueError("a placement needs at least one rank")
    before: Sequence[dict[int, list[int]]] = previous.layers if previous else [{}] * layers
    names = {rank: (machines or {}).get(rank, "") for rank in ids}
    if loads is not None or slots is not None:
        # here, because of numpy: commands that only talk to a service know placements, too
        from flexpert.moe.expert_loads import load_array
        from flexpert.moe.load_plan import layers_by_load

        return Placement(
            experts,
            layers_by_load(
                before,
                names,
                load_array([[1.0] * experts] * layers if loads is None else loads, layers, experts),
                sum(copies_of(experts, redundant, len(ids))) if slots is None else slots,
                min_replicas,
                max_moves,
            ),
        )
    totals = dict.fromkeys(ids, 0)
    planned = []
    for index in range(layers):
        if redundant:
            copies = copies_of(experts, redundant, len(ids))
            layer = even_replicas(before[index], names, copies, totals)
            spread_over_machines(layer, names, experts)
        else:
            layer = even_layer(before[index], ids, experts, totals)
        for rank in ids:
            totals[rank] += len(layer[rank])
        planned.append(layer)
    return Placement(experts, planned)


def keep(previous: Placement, ranks: Iterable[int]) -> Placement:
    """What `ranks` hold of `previous`, and nothing else: see `Placement.missing`.

    Raises:
        ValueError: no ranks.
    """
    ids = sorted(set(ranks))
    if not ids:
        raise ValueError("a placement needs at least one rank")
    layers = [{rank: list(layer.get(rank, ())) for rank in ids} for layer in previous.layers]
    return Placement(previous.experts, layers)


def cover(previous: Placement, ranks: Iterable[int]) -> Placement:
    """What `ranks` hold of `previous`, and besides only the experts that none of them holds.

    Machines do not matter here: one replica is on one machine, wherever it is, so each goes to the
    rank that holds the fewest; the next `replan` spreads them.

    Raises:
        ValueError: no ranks.
    """
    layers = []
    for held in keep(previous, ranks).layers:
        ids = list(held)
        for expert in sorted(set(range(previous.experts)).difference(*held.values())):
            held[min(ids, key=lambda rank: (len(held[rank]), rank))].append(expert)
        layers.append(held)
    return Placement(previous.experts, layers)


def loads(before: Placement | None, after: Placement) -> dict[int, list[tuple[int, int]]]:
    """rank → the (layer, expert) pairs it must load to go from one placement to the next."""
    result = {}
    for rank in after.ranks:
        held = before.held_by(rank) if before else [[] for _ in after.layers]
        result[rank] = [
            (layer, expert)
            for layer, desired in enumerate(after.held_by(rank))
            for expert in desired
            if expert not in set(held[layer])
        ]
    return result
