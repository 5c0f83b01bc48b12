"""The real coordinator over ranks that answer at once, to see what the head itself takes (pure but
for a clock): no processes, no messages in flight, nothing is loaded."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, TypeVar, cast

from flexpert.cluster.coordinator import Coordinator
from flexpert.cluster.interfaces import Computed, Timer, Work
from flexpert.cluster.journal import Journal
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.saved_state import SavedCluster, SavedOperation
from flexpert.cluster.served_model import ServedModel
from flexpert.cluster.views import ClusterEvent, OperationView
from flexpert.config import Config, load_config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import HeldKV, KVMigration
from flexpert.errors import FlexpertError
from flexpert.moe.placement import Placement

T = TypeVar("T")

ADDRESS_BYTES = 256  # of a window, experts, KV
_LOAD = msg.Load(0, 0, 0.0)
_MEMORY = msg.Memory(1, 1, 1, 1, 1)
_MOST_EVENTS = 10_000_000


class _Shape:
    """What of a model the coordinator asks for."""

    def __init__(self, experts: int, layers: int) -> None:
        self.experts = experts
        self.moe_layers = layers


class _EndlessMemory(MemoryBudget):
    """There is room for everything."""

    def planned(self, placement: Placement, previous: Placement | None = None) -> dict[int, int]:
        return dict.fromkeys(placement.ranks, 0)

    def check_free(self, needs: dict[int, int]) -> None:
        return None

    @property
    def expert_bytes(self) -> int:
        return 1

    def check_moves(self, experts: int) -> None:
        return None


class _Call:
    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class _Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class ImmediateRanks:
    """A `HeadInterface`. messages, sizes: commands that were sent, and the bytes of each kind."""

    expert_cache = b""
    saves = False
    reserved: frozenset[int] = frozenset()
    draining: frozenset[int] = frozenset()

    def __init__(self, ranks: int, capacity: int, experts: int, layers: int) -> None:
        self.journal = Journal()
        self.messages = 0
        self.sizes: dict[str, int] = {}
        self._clock = 0.0
        self._number = count()
        self._calls: list[tuple[float, int, _Call, Callable[[], None]]] = []
        self._prepared: dict[int, msg.Prepare] = {}
        self._members: set[int] = set()
        self.coordinator = Coordinator(
            _config(ranks, capacity),
            cast(ServedModel, _Shape(experts, layers)),
            self,
            _EndlessMemory(_config(ranks, capacity), cast(ServedModel, _Shape(experts, layers))),
        )
        self._through(self.coordinator.begin_first(ranks))

    def change(self, **asked: Any) -> OperationView:
        """From being asked for to its end. Raises: FlexpertError: it fails."""
        return self._through(self.coordinator.begin(**asked))

    def _through(self, view: OperationView | None) -> OperationView:
        assert view is not None
        for _ in range(_MOST_EVENTS):
            view = self.coordinator.operation(view.id).view()
            if view.state == "done":
                return view
            if view.state in ("failed", "cancelled") or not self._calls:
                raise FlexpertError(f"a change {view.state} at {view.phase}: {view.error}")
            self._clock, _, call, action = heapq.heappop(self._calls)
            if not call.cancelled:
                action()
        raise FlexpertError(f"a change does not end: {view.phase}")

    # ---- HeadInterface --------------------------------------------------------------------------

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        call = _Call()
        heapq.heappush(self._calls, (self._clock + delay_s, next(self._number), call, action))
        return call

    def compute(self, work: Callable[[], T], then: Callable[[Computed[T]], None]) -> None:
        done = _Done(work())
        self.call_later(0.0, lambda: then(done))

    def now(self) -> float:
        return self._clock

    def spawn(self, rank: int, verdicts: bytes) -> None:
        address = rank.to_bytes(4, "little") * (ADDRESS_BYTES // 4)
        hello = msg.Hello(rank + 1, "host", address, address, address, machine="host")
        self._tell(rank, hello)

    def on_this_host(self, newcomers: frozenset[int]) -> frozenset[int]:
        return newcomers

    def kill(self, rank: int) -> None:
        self.call_later(0.0, lambda: self.coordinator.on_exit(rank, -9))

    def work(self, rank: int) -> Work | None:
        return Work(self._clock, 0)

    def send(self, rank: int, command: msg.Command) -> None:
        """Encoded as for a socket."""
        self.messages += 1
        name = type(command).__name__
        self.sizes[name] = self.sizes.get(name, 0) + len(msg.encode(command))
        match command:
            case msg.Prepare():
                self._prepared[rank] = command
                self._tell(rank, msg.Prepared(command.epoch, 0, _MEMORY))
            case msg.Commit(epoch):
                plan = self._prepared.pop(rank)
                if rank in plan.members:
                    pause_ms = 0.0 if rank in self._members else None
                    self._members.add(rank)
                    self._tell(rank, msg.Switched(epoch, pause_ms, _LOAD))
                else:
                    self._members.discard(rank)
                    self._tell(rank, msg.HandedOver(epoch, []))
            case msg.Offer(epoch):
                self._tell(rank, msg.Offered(epoch, []))
            case msg.Fetch():
                self._tell(rank, msg.Fetched(command.epoch, command.source, 0))
            case msg.Adopt():
                self._tell(rank, msg.Adopted(command.source, len(command.migrations), 0, 0))
            case msg.Stop():
                self.call_later(0.0, lambda: self.coordinator.on_exit(rank, 0))

    def _tell(self, rank: int, report: msg.Report) -> None:
        self.call_later(0.0, lambda: self.coordinator.on_report(rank, report))

    def assign_destinations(
        self, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self.journal.assign_destinations(held, destinations)

    def hand_over(
        self, rank: int, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        return self.journal.hand_over(rank, held, destinations)

    def rank_exited(self, rank: int, own_fault: bool) -> None:
        self.journal.rank_exited(rank, own_fault=own_fault)

    def admit_waiting(self) -> None: ...

    def service_lost(self, reason: str) -> None:
        raise FlexpertError(reason)

    def publish(self, event: ClusterEvent) -> None: ...
    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None: ...
    def save_operation(self, record: SavedOperation, *, urgent: bool) -> None: ...
    def forget_operation(self, operation_id: str) -> None: ...
    def impair(self, part: str, why: str | None) -> None: ...

    def heard(self) -> bool:
        return False


def _config(ranks: int, capacity: int) -> Config:
    """Beyond the number of ranks that a service takes, too."""
    found = load_config(environment={}, overrides={})
    more = {"ranks": ranks, "max_ranks": capacity}
    return found.model_copy(update={"cluster": found.cluster.model_copy(update=more)})
