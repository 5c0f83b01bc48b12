"""One layer's replicas in even numbers on its ranks, with the fewest loads (pure).

Every rank that stays keeps as many of its experts as its new share allows. With redundant replicas
it keeps what it can, without a search for the very fewest.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Mapping
from heapq import heapify, heappop, heappush


def even_layer(
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


def even_replicas(
    before: dict[int, list[int]],
    machines: Mapping[int, str],
    copies: list[int],
    totals: dict[int, int],
) -> dict[int, list[int]]:
    """One layer on the ranks that `machines` names, each expert on copies[expert] of them."""
    ids = sorted(machines)
    quota = shares(before, machines, sum(copies), totals)
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


def shares(
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


def spread_over_machines(
    layer: dict[int, list[int]], machines: Mapping[int, str], experts: int, most: int = 2**20
) -> None:
    """Exchange replicas between ranks until each expert is on as many machines as can be, or on
    `most`.

    Every exchange puts one expert on one more machine and takes none off its last of any, so it
    comes to an end.
    """
    most = min(most, len(set(machines.values())))
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
