"""Which rank holds which expert, and how that changes with the fewest moves (pure).

A placement is balanced when, in each layer, the ranks' numbers of experts differ by at most one.
Among the balanced placements of a new set of ranks, `replan` returns one that loads the fewest
experts: every rank that stays keeps as many of its experts as its new share allows. With redundant
replicas it keeps what it can, without a search for the very fewest. After a loss, `keep` loads
nothing and may leave experts that nobody holds, `cover` loads only these; the next `replan`
restores balance and redundancy.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain

import msgspec

from flexpert.moe.expert_loads import ExpertLoads, load_array


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
    """The balanced placement on `ranks` that loads the fewest experts, coming from `previous`.

    Args:
        redundant: replicas of each layer beyond one of each expert, spread over the experts as
            evenly as can be. No rank holds two of one expert: what does not fit is left out.
        machines: rank → its machine. Replicas of an expert go to different ones, as shares allow:
            with two of each, the loss of a machine loses no expert unless more than half of the
            ranks are on it. Default: all are on one.
        loads: [layers][experts], what each expert has to do, in any unit (`moe/balance.py` says
            how they count). Default: all are equal.
        slots: rank → replicas of each layer it can hold, in place of `redundant`.
        min_replicas: every expert has as many when there is room for that (with loads or slots).
        max_moves: loads beyond those that are needed to hold every expert (with loads or slots).

    Raises:
        ValueError: no ranks, too few slots, or loads of another shape.
    """
    ids = sorted(set(ranks))
    if not ids:
        raise ValueError("a placement needs at least one rank")
    if loads is not None:
        load_array(loads, layers, experts)
    before: Sequence[dict[int, list[int]]] = previous.layers if previous else [{}] * layers
    names = {rank: (machines or {}).get(rank, "") for rank in ids}
    totals = dict.fromkeys(ids, 0)
    planned = []
    for index in range(layers):
        if redundant:
            copies = copies_of(experts, redundant, len(ids))
            layer = _replan_replicas(before[index], names, copies, totals)
            _spread_over_machines(layer, names, experts)
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


class _Room:
    """Which rank of one layer takes the next replica. left: rank → how many more it takes.

    Per machine a heap of (-left, rank); an entry that no longer says what `left` says is dropped
    when it comes up.
    """

    def __init__(self, left: dict[int, int], machines: Mapping[int, str]) -> None:
        self.left = left
        self._machines = machines
        self._on = dict.fromkeys(machines.values(), 0)
        self._heaps: dict[str, list[tuple[int, int]]] = {name: [] for name in self._on}
        for rank, free in left.items():
            self._on[machines[rank]] += free
            self._heaps[machines[rank]].append((-free, rank))
        for heap in self._heaps.values():
            heapify(heap)

    def take(self, rank: int) -> None:
        """One replica more is on this rank."""
        name = self._machines[rank]
        self.left[rank] -= 1
        self._on[name] -= 1
        heappush(self._heaps[name], (-self.left[rank], rank))

    def best(self, holders: Collection[int]) -> int | None:
        """The rank with the most room that is not a holder; None: all with room are.

        A machine without a holder goes first, and of those the one with the most room.
        """
        there = {self._machines[rank] for rank in holders}
        for name in sorted(self._on, key=lambda name: (name in there, -self._on[name])):
            if (rank := self._best_on(name, holders)) is not None:
                return rank
        return None

    def _best_on(self, name: str, holders: Collection[int]) -> int | None:
        heap, passed, found = self._heaps[name], [], None
        while heap and heap[0][0] < 0:
            free, rank = heap[0]
            if -free != self.left[rank]:
                heappop(heap)
            elif rank in holders:
                passed.append(heappop(heap))
            else:
                found = rank
                break
        for entry in passed:
            heappush(heap, entry)
        return found


def _replan_replicas(
    before: dict[int, list[int]],
    machines: Mapping[int, str],
    copies: list[int],
    totals: dict[int, int],
) -> dict[int, list[int]]:
    """One layer on the ranks that `machines` names, each expert on copies[expert] of them."""
    ids = sorted(machines)
    quota = _quotas(before, machines, sum(copies), totals)
    held, kept = _kept(before, quota, copies, machines)
    wanting = [want - len(there) for want, there in zip(copies, kept, strict=True)]
    room = _Room({rank: quota[rank] - len(held[rank]) for rank in ids}, machines)
    for expert in sorted(range(len(copies)), key=lambda expert: (-wanting[expert], expert)):
        for _ in range(wanting[expert]):
            taker = room.best(kept[expert])
            if taker is not None:
                held[taker][expert] = None
                kept[expert].add(taker)
                room.take(taker)
                continue
            # All with room hold it. One without it is full, and has one that those do not have.
            giver = next(rank for rank in ids if expert not in held[rank])
            taker = next(rank for rank in ids if room.left[rank])
            given = next(e for e in held[giver] if e not in held[taker])
            del held[giver][given]
            held[taker][given] = None
            held[giver][expert] = None
            kept[given] = kept[given] - {giver} | {taker}
            kept[expert].add(giver)
            room.take(taker)
    return {rank: sorted(found) for rank, found in held.items()}


def _kept(
    before: dict[int, list[int]],
    quota: dict[int, int],
    copies: list[int],
    machines: Mapping[int, str],
) -> tuple[dict[int, dict[int, None]], list[set[int]]]:
    """What ranks keep of a layer within their quotas: (rank → experts in the order they were
    chosen, per expert who keeps it).

    What is held by the fewest is kept first: so each expert that somebody holds stays somewhere,
    as far as shares allow. With several machines each expert is kept once before any is kept twice,
    so that what is loaded is a second replica, which any other machine may take.
    """
    held: dict[int, dict[int, None]] = {rank: {} for rank in sorted(quota)}
    kept: list[set[int]] = [set() for _ in copies]
    holders: list[list[int]] = [[] for _ in copies]
    for rank in held:
        for expert in before.get(rank, ()):
            holders[expert].append(rank)
    order = sorted(range(len(copies)), key=lambda expert: (len(holders[expert]), expert))
    several, most = len(set(machines.values())) > 1, max(copies)
    for limit in range(1, most + 1) if several else (most,):
        for expert in order:
            there = {machines[rank] for rank in kept[expert]}
            for rank in sorted(
                holders[expert],
                key=lambda rank: (machines[rank] in there, len(held[rank]) - quota[rank]),
            ):
                more = len(kept[expert]) < min(limit, copies[expert])
                if more and rank not in kept[expert] and len(held[rank]) < quota[rank]:
                    held[rank][expert] = None
                    kept[expert].add(rank)
    return held, kept


def _quotas(
    before: dict[int, list[int]],
    machines: Mapping[int, str],
    replicas: int,
    totals: dict[int, int],
) -> dict[int, int]:
    """rank → its share of a layer's replicas; the larger shares go round the machines, so that
    each machine has room for its part."""
    share, extra = divmod(replicas, len(machines))
    order = sorted(machines, key=lambda rank: (-len(before.get(rank, ())), totals[rank], rank))
    if len(set(machines.values())) > 1:
        seen: Counter[str] = Counter()
        turn = {}
        for rank in order:
            turn[rank] = seen[machines[rank]]
            seen[machines[rank]] += 1
        order.sort(key=lambda rank: turn[rank])
    return {rank: share + (position < extra) for position, rank in enumerate(order)}


def _spread_over_machines(
    layer: dict[int, list[int]], machines: Mapping[int, str], experts: int
) -> None:
    """Exchange replicas between ranks until each expert is on as many machines as can be.

    Every exchange puts one expert on one more machine and takes none off its last of any, so it
    comes to an end.
    """
    most = len(set(machines.values()))
    if most < 2:
        return
    holders: list[set[int]] = [set() for _ in range(experts)]
    for rank, held in layer.items():
        for expert in held:
            holders[expert].add(rank)
    for expert in range(experts):
        while len({machines[rank] for rank in holders[expert]}) < min(len(holders[expert]), most):
            swap = _exchange(expert, layer, holders, machines)
            if swap is None:
                break
            giver, taker, other = swap
            for given, source, target in ((expert, giver, taker), (other, taker, giver)):
                layer[source].remove(given)
                insort(layer[target], given)
                holders[given] = holders[given] - {source} | {target}


def _exchange(
    expert: int,
    layer: dict[int, list[int]],
    holders: list[set[int]],
    machines: Mapping[int, str],
) -> tuple[int, int, int] | None:
    """(giver, taker, other): the giver's replica for another of the taker, who is on a machine
    without this expert; None: there is no such exchange."""
    there = Counter(machines[rank] for rank in holders[expert])
    for giver in sorted(holders[expert]):
        if there[machines[giver]] < 2:
            continue
        for taker, held in layer.items():
            if machines[taker] in there:
                continue
            for other in held:
                if giver not in holders[other] and _may_move(
                    holders[other] - {taker}, taker, giver, machines
                ):
                    return giver, taker, other
    return None


def _may_move(rest: set[int], source: int, target: int, machines: Mapping[int, str]) -> bool:
    """Whether an expert that `rest` hold besides is on no fewer machines when its replica goes from
    source to target."""
    there = {machines[rank] for rank in rest}
    return machines[target] not in there or machines[source] in there


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
