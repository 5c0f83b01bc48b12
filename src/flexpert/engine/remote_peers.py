"""The memory of ranks on other machines: experts that this rank loads, KV that it takes over.

Two ranks whose machines have different names never open each other's memory by themselves, even if
one kernel runs both. They meet while an epoch is prepared and read over NIXL. What cannot be read
is loaded from the checkpoint or computed again, so that no failure here fails a change.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping

from flexpert.comm import CommError
from flexpert.comm.bounded import StoreKeys
from flexpert.comm.errors import PeerUnreachable
from flexpert.comm.peer_memory import ReadableMemory
from flexpert.comm.remote_memory import MemoryServer, RemoteMemory, ServedMemory
from flexpert.engine.rank_protocol import Prepare

log = logging.getLogger("flexpert")

EXPERTS, KV = "experts", "kv"

_MEET_S = 10.0
_MOST_AT_SWITCH_S = 1.0  # in which peers wait for this rank in a vote


def far_ranks(plan: Prepare, rank: int) -> frozenset[int]:
    """Those that take part on other machines than this one."""
    own = plan.machines.get(rank, "")
    return frozenset(other for other, name in plan.machines.items() if name != own)


def to_meet(plan: Prepare, rank: int) -> frozenset[int]:
    """Ranks of other machines with which this rank must make a link before it loads: newcomers
    with all that have experts, leavers with all that go on. Equal on both sides of a pair.

    Two ranks that stay use the link that they have, if they have one.
    """
    members, exporters = frozenset(plan.members), frozenset(plan.exporters)
    if rank not in members:
        met = members
    elif rank not in exporters:
        met = frozenset(plan.machines) - (members - exporters)
    else:
        met = frozenset(plan.machines) - (members & exporters)
    return met & far_ranks(plan, rank)


class RemotePeers:
    """Calls may come from several threads; those of `meet` one after the other."""

    def __init__(
        self,
        rank: int,
        store: StoreKeys,
        regions: Mapping[str, ServedMemory],
        *,
        exchange_timeout_s: float,
    ) -> None:
        """
        Args:
            store: in which ranks meet.
            regions: `EXPERTS` and `KV` → what peers may read.
            exchange_timeout_s: how long peers wait for this rank in a vote.
        """
        self._rank = rank
        self._store = store
        self._regions = regions
        self._at_switch_s = min(_MOST_AT_SWITCH_S, exchange_timeout_s / 3)
        self._far: frozenset[int] = frozenset()
        self._server: MemoryServer | None = None
        self._lock = threading.Lock()  # of the server

    def meet(self, plan: Prepare, cancelled: threading.Event) -> None:
        """Link to those of a change that this rank may read, or that may read it, and attend to
        them until `rest`. Who does not come is done without."""
        self._far = far_ranks(plan, self._rank)
        if not self._far:
            return
        peers = to_meet(plan, self._rank)
        try:
            server = self._started() if peers else self._server
            if server is None:
                return
            server.attend()
            if peers:
                server.connect(self._store, peers, timeout_s=_MEET_S, cancelled=cancelled.is_set)
        except (CommError, ValueError) as error:
            if not cancelled.is_set():
                log.warning("the memory of ranks on other machines cannot be read: %s", error)

    def is_far(self, rank: int) -> bool:
        """Whether a rank of the latest change is on another machine."""
        return rank in self._far

    def experts(self, plan: Prepare, cancelled: Callable[[], bool]) -> dict[int, ReadableMemory]:
        """What the far ranks of a change export, as far as they can be read."""
        server = self._server
        far = frozenset(plan.exporters) & far_ranks(plan, self._rank)
        if server is None:
            return {}
        return {rank: RemoteMemory(server, rank, EXPERTS, cancelled) for rank in far}

    def kv(self, rank: int, cancelled: Callable[[], bool]) -> ReadableMemory:
        """The KV cache of a far rank. Raises: PeerUnreachable: nothing of it can be read here."""
        if self._server is None:
            raise PeerUnreachable(f"no link to the memory of rank {rank}")
        return RemoteMemory(self._server, rank, KV, cancelled)

    def kv_at_switch(self, rank: int) -> ReadableMemory:
        """As `kv`, for reads that peers wait for: they must end soon, all of them together."""
        deadline = time.monotonic() + self._at_switch_s
        return self.kv(rank, lambda: time.monotonic() > deadline)

    def rest(self, members: Collection[int]) -> None:
        """Nobody reads here any more until `meet`; others than `members` are about to end."""
        if self._server is not None:
            self._server.rest(members)

    def close(self) -> None:
        """Part from all peers; nobody calls `meet` any more."""
        with self._lock:
            if self._server is not None:
                self._server.close()

    def _started(self) -> MemoryServer:
        """Raises: CommError: NIXL is missing."""
        with self._lock:
            if self._server is None:
                server = MemoryServer(self._rank)
                for name, memory in self._regions.items():
                    server.export(name, memory)
                self._server = server
            return self._server
