"""How the sequences of a rank that leaves or is lost come to others, with their KV if it leaves.

In a planned change a leaver tells what it holds, its destinations copy that while it goes on
(`offered`, `fetched`); at the switch it hands over the rest (`hand_over`), and exits once the last
destination has read it (`adopted`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexpert.cluster.interfaces import HeadInterface
from flexpert.cluster.rank_state import RankState
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import CachedBlock, HeldKV


class KVMigrations:
    """Who still copies from whom. ranks: the coordinator's records, as they are."""

    def __init__(self, ranks: Mapping[int, RankState], head: HeadInterface) -> None:
        self._ranks = ranks
        self._head = head
        self._fetching: dict[int, set[int]] = {}  # leaver → destinations that copy what it offered
        self._adopting: dict[int, set[int]] = {}  # leaver → destinations that may still read its KV

    def clear(self) -> None:
        self._fetching.clear()
        self._adopting.clear()

    def offered(
        self, epoch: int, leaver: int, offer: msg.Offered, destinations: Iterable[int]
    ) -> bool:
        """Tell destinations what to copy ahead; True: there is nothing to wait for.

        What is cached of conversations goes to one of them, where its parts find each other.
        """
        destinations = list(destinations)
        migrations = self._head.assign_destinations(offer.held, destinations)
        cached: dict[int, list[CachedBlock]] = {}
        if offer.cached and destinations:
            emptiest = sorted(destinations, key=lambda rank: (self._ranks[rank].load.kv_used, rank))
            cached[emptiest[len(self._fetching) % len(emptiest)]] = offer.cached
        told = set(migrations) | set(cached)
        self._fetching[leaver] = set(told)
        self._adopting[leaver] = set(told)
        kv = self._ranks[leaver].kv
        for rank in sorted(told):
            some = migrations.get(rank, [])
            self._head.send(rank, msg.Fetch(epoch, leaver, kv, some, cached.get(rank, [])))
        return not told

    def fetched(self, leaver: int, destination: int) -> bool:
        """A destination has copied what was there; True: it was the last."""
        waited = self._fetching.get(leaver)
        if waited is None:
            return False
        waited.discard(destination)
        return not waited

    def hand_over(self, rank: int, held: list[HeldKV], destinations: Iterable[int]) -> int:
        """Others go on with a rank's sequences. Returns how many of them.

        held: what of their KV there is to copy; nothing if the rank is lost.
        """
        migrations = self._head.hand_over(rank, held, destinations)
        rank_state = self._ranks.get(rank)
        if rank_state is None:
            for destination, some in migrations.items():
                self._head.send(destination, msg.Admit([move.sequence for move in some]))
        else:
            # those who copied ahead hear in any case that no more comes
            told = set(migrations) | self._adopting.get(rank, set())
            self._adopting[rank] = told
            for destination in sorted(told):
                self._head.send(
                    destination, msg.Adopt(rank, rank_state.kv, migrations.get(destination, []))
                )
        return sum(map(len, migrations.values()))

    def adopted(self, leaver: int, destination: int) -> bool:
        """A destination reads nothing of a leaver's memory any more; True: nobody does."""
        waited = self._adopting.get(leaver)
        if waited is None:
            return False
        waited.discard(destination)
        return not waited

    def lost(self, destination: int) -> None:
        """A rank that reads nothing any more, because it is gone."""
        for destinations in self._adopting.values():
            destinations.discard(destination)

    def reads(self, leaver: int) -> bool:
        """Whether anybody may still read a leaver's memory."""
        return bool(self._adopting.get(leaver))
