"""How the sequences of a rank that leaves or is lost come to others, with their KV if it leaves.

In a planned change a leaver tells what it holds, its heirs copy that while it goes on (`offered`,
`fetched`); at the switch it hands over the rest (`hand_over`), and ends once the last heir has read
it (`adopted`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexpert.cluster import messages as msg
from flexpert.cluster.ports import Ports
from flexpert.cluster.record import RankRecord
from flexpert.engine.request import HeldKV


class Moves:
    """Who still copies from whom. ranks: the coordinator's records, as they are."""

    def __init__(self, ranks: Mapping[int, RankRecord], ports: Ports) -> None:
        self._ranks = ranks
        self._ports = ports
        self._fetching: dict[int, set[int]] = {}  # leaver → heirs that copy what it offered
        self._adopting: dict[int, set[int]] = {}  # leaver → heirs that may still read its KV

    def clear(self) -> None:
        self._fetching.clear()
        self._adopting.clear()

    def offered(self, epoch: int, leaver: int, held: list[HeldKV], heirs: Iterable[int]) -> bool:
        """Tell heirs what to copy ahead; True: there is nothing to wait for."""
        moves = self._ports.bequeath(held, heirs)
        self._fetching[leaver] = set(moves)
        self._adopting[leaver] = set(moves)
        for heir, some in moves.items():
            self._ports.send(heir, msg.Fetch(epoch, leaver, self._ranks[leaver].kv, some))
        return not moves

    def fetched(self, leaver: int, heir: int) -> bool:
        """An heir has copied what was there; True: it was the last."""
        waited = self._fetching.get(leaver)
        if waited is None:
            return False
        waited.discard(heir)
        return not waited

    def hand_over(self, rank: int, held: list[HeldKV], heirs: Iterable[int]) -> int:
        """Others go on with a rank's sequences. Returns how many of them.

        held: what of their KV there is to copy; nothing if the rank is lost.
        """
        moves = self._ports.hand_over(rank, held, heirs)
        record = self._ranks.get(rank)
        if record is None:
            for heir, some in moves.items():
                self._ports.send(heir, msg.Admit([move.sequence for move in some]))
        else:
            # those who copied ahead hear in any case that no more comes
            told = set(moves) | self._adopting.get(rank, set())
            self._adopting[rank] = told
            for heir in sorted(told):
                self._ports.send(heir, msg.Adopt(rank, record.kv, moves.get(heir, [])))
        return sum(map(len, moves.values()))

    def adopted(self, leaver: int, heir: int) -> bool:
        """An heir reads nothing of a leaver's memory any more; True: nobody does."""
        waited = self._adopting.get(leaver)
        if waited is None:
            return False
        waited.discard(heir)
        return not waited

    def lost(self, heir: int) -> None:
        """A rank that reads nothing any more, because it is gone."""
        for heirs in self._adopting.values():
            heirs.discard(heir)

    def reads(self, leaver: int) -> bool:
        """Whether anybody may still read a leaver's memory."""
        return bool(self._adopting.get(leaver))
