"""Which rank holds which expert, and how that changes with the fewest moves (pure).

A placement is balanced when, in each layer, the ranks' numbers of experts differ by at most one.
Among the balanced placements of a new set of ranks, `replan` returns one that loads the fewest
experts: every rank that stays keeps as many of its experts as its new share allows. With redundant
replicas it keeps what it can, without a search for the very fewest. After a loss, `keep` loads
nothing and may leave experts that nobody holds, `cover` loads only these; the next `replan`
restores balance and redundancy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import msgspec


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

    def owners(self, layer: int, viewer: int) -> tuple[list[int], list[int]]:
        """(owner's rank, slot) per expert as `viewer` should use them; -1 = nobody.

        A viewer prefers its own replica; otherwise viewers spread over the replicas.
        """
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.experts)]
        for rank in sorted(self.layers[layer]):
            for slot, expert in enumerate(self.layers[layer][rank]):
                places[expert].append((rank, slot))
        ranks, slots = [], []
        for replicas in places:
            own = [place for place in replicas if place[0] == viewer]
            chosen = own or replicas[viewer % len(replicas) :] if replicas else [(-1, -1)]
            ranks.append(chosen[0][0])
            slots.append(chosen[0][1])
        return ranks, slots


def replan(
    previous: Placement | None,
    ranks: Iterable[int],
    *,
    experts: int,
    layers: int,
    redundant: int = 0,
    hosts: Mapping[int, str] | None = None,
) -> Placement:
    """The balanced placement on `ranks` that loads the fewest experts, coming from `previous`.

    Args:
        redundant: replicas of each layer beyond one of each expert, spread over the experts as
            evenly as can be. No rank holds two of one expert: what does not fit is left out.
        hosts: rank → its machine. Replicas of an expert go to different ones, as shares allow,
            so that the loss of a machine loses no expert; default: all are on one.

    Raises:
        ValueError: no ranks.
    """
    ids = sorted(set(ranks))
    if not ids:
        raise ValueError("a placement needs at least one rank")
    before: Sequence[dict[int, list[int]]] = previous.layers if previous else [{}] * layers
    totals = dict.fromkeys(ids, 0)
    planned = []
    for index in range(layers):
        if redundant:
            copies = copies_of(experts, redundant, len(ids))
            layer = _replan_replicas(before[index], ids, copies, totals, hosts or {})
            _spread_over_hosts(layer, hosts or {}, experts)
        else:
            layer = _replan_layer(before[index], ids, experts, totals)
        for rank in ids:
            totals[rank] += len(layer[rank])
        planned.append(layer)
    return Placement(experts, planned)


def _replan_layer(
    before: dict[int, list[int]], ids: list[int], experts: int, totals: dict[int, int]
) -> dict[int, list[int]]:
    # An expert held twice needs only one keeper: the first holder by id.
    keeper: dict[int, int] = {}
    for rank in sorted(before):
        for expert in before[rank]:
            if rank in totals:
                keeper.setdefault(expert, rank)
    kept: dict[int, list[int]] = {rank: [] for rank in ids}
    for expert, rank in keeper.items():
        kept[rank].append(expert)

    # The larger shares go to those that hold most already (each such expert is a move saved), then
    # to those with the smallest total over the layers so far.
    share, extra = divmod(experts, len(ids))
    order = sorted(ids, key=lambda rank: (-len(kept[rank]), totals[rank], rank))
    quota = {rank: share + (position < extra) for position, rank in enumerate(order)}

    homeless = [e for e in range(experts) if e not in keeper]
    for rank in ids:
        kept[rank].sort()
        homeless += kept[rank][quota[rank] :]
        del kept[rank][quota[rank] :]
    homeless.sort()
    for rank in ids:
        take = quota[rank] - len(kept[rank])
        kept[rank] += homeless[:take]
        del homeless[:take]
    return kept


def copies_of(experts: int, redundant: int, ranks: int) -> list[int]:
    """How many replicas each expert has, at most one a rank."""
    share, extra = divmod(redundant, experts)
    return [min(ranks, 1 + share + (expert < extra)) for expert in range(experts)]


def _replan_replicas(
    before: dict[int, list[int]],
    ids: list[int],
    copies: list[int],
    totals: dict[int, int],
    hosts: Mapping[int, str],
) -> dict[int, list[int]]:
    share, extra = divmod(sum(copies), len(ids))
    order = sorted(ids, key=lambda rank: (-len(before.get(rank, ())), totals[rank], rank))
    # the larger shares go round the machines, so that each has room for its part of the replicas
    turn = {rank: _turn(order[:at], rank, hosts) for at, rank in enumerate(order)}
    order.sort(key=lambda rank: turn[rank])
    quota = {rank: share + (position < extra) for position, rank in enumerate(order)}
    held: dict[int, list[int]] = {rank: [] for rank in ids}
    left = list(copies)

    # What is held by the fewest is kept first: so each expert that somebody holds stays somewhere,
    # as far as shares allow.
    holders = {e: [r for r in ids if e in before.get(r, ())] for e in range(len(copies))}
    for expert in sorted(holders, key=lambda expert: (len(holders[expert]), expert)):
        for rank in sorted(holders[expert], key=lambda rank: len(held[rank]) - quota[rank]):
            if left[expert] and len(held[rank]) < quota[rank]:
                held[rank].append(expert)
                left[expert] -= 1

    for expert in sorted(range(len(copies)), key=lambda expert: (-left[expert], expert)):
        for _ in range(left[expert]):
            room = [rank for rank in ids if len(held[rank]) < quota[rank]]
            fresh = [rank for rank in room if expert not in held[rank]]
            if fresh:
                held[max(fresh, key=lambda rank: (quota[rank] - len(held[rank]), -rank))].append(
                    expert
                )
                continue
            # All with room hold it. One without it is full, and has one that those do not have.
            giver = next(rank for rank in ids if expert not in held[rank])
            taker = room[0]
            given = next(e for e in held[giver] if e not in held[taker])
            held[giver].remove(given)
            held[taker].append(given)
            held[giver].append(expert)
    return {rank: sorted(found) for rank, found in held.items()}


def _turn(before: list[int], rank: int, hosts: Mapping[int, str]) -> int:
    """How many of these are on the rank's machine; 0 for all if there is one machine only."""
    if len(set(hosts.values())) < 2:
        return 0
    return sum(hosts.get(other) == hosts.get(rank) for other in before)


def _spread_over_hosts(layer: dict[int, list[int]], hosts: Mapping[int, str], experts: int) -> None:
    """Exchange replicas between ranks until each expert is on as many machines as can be.

    Every exchange puts one expert on one more machine and takes none off its last of any, so it
    comes to an end.
    """
    machines = len({hosts.get(rank, "") for rank in layer})
    for expert in range(experts):
        while True:
            holders = [rank for rank in layer if expert in layer[rank]]
            there = [hosts.get(rank, "") for rank in holders]
            if len(set(there)) >= min(len(holders), machines):
                break
            double = [r for r, host in zip(holders, there, strict=True) if there.count(host) > 1]
            swap = next(
                (
                    (giver, taker, other)
                    for giver in double
                    for taker in layer
                    if hosts.get(taker, "") not in there
                    for other in layer[taker]
                    if other not in layer[giver] and _may_move(layer, hosts, other, taker, giver)
                ),
                None,
            )
            if swap is None:
                break
            giver, taker, other = swap
            layer[giver] = sorted({*layer[giver], other} - {expert})
            layer[taker] = sorted({*layer[taker], expert} - {other})


def _may_move(
    layer: dict[int, list[int]], hosts: Mapping[int, str], expert: int, giver: int, taker: int
) -> bool:
    """Whether an expert is on no fewer machines when its replica goes from giver to taker."""
    rest = [hosts.get(r, "") for r in layer if expert in layer[r] and r != giver]
    gained = hosts.get(taker, "") not in rest
    lost = hosts.get(giver, "") not in rest
    return gained or not lost


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
