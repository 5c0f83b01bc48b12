"""What the coordinator needs from the head around it: time, processes, messages, the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from flexpert.cluster.saved_state import SavedCluster, SavedOperation
from flexpert.cluster.views import ClusterEvent
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import HeldKV, KVMigration

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank's process has done so far.

    processor_s: its threads' processor time. faults: pages it had to wait for, or be given.
    runnable: its threads that have a processor just now, or wait for one.
    """

    processor_s: float
    faults: int
    runnable: frozenset[int] = frozenset()


class Timer(Protocol):
    """A call that is still to come."""

    def cancel(self) -> object: ...


class Computed(Protocol[T_co]):
    """Of work that is over: what it returned, or raised."""

    def result(self) -> T_co: ...


class HeadInterface(Protocol):
    """The head, or a simulation of it."""

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer: ...

    def compute(self, work: Callable[[], T], then: Callable[[Computed[T]], None]) -> None:
        """Do what takes long in a thread, and tell of its outcome here."""
        ...

    def now(self) -> float:
        """Seconds, of a clock that only goes forward."""
        ...

    def spawn(self, rank: int, verdicts: bytes) -> None:
        """verdicts: what an earlier rank found of the model's modules; b"": nothing yet."""
        ...

    @property
    def reserved(self) -> frozenset[int]:
        """Ids that hosts have been promised: no process is started here for one."""
        ...

    @property
    def draining(self) -> frozenset[int]:
        """Ids whose hosts have asked to leave, and wait for the change that runs."""
        ...

    def on_this_host(self, newcomers: frozenset[int]) -> frozenset[int]:
        """Those whose processes will be on this machine, and take of its memory."""
        ...

    def kill(self, rank: int) -> None: ...
    def send(self, rank: int, command: msg.Command) -> None: ...
    def work(self, rank: int) -> Work | None:
        """Of the rank's process until now; None if it is gone or not there yet."""
        ...

    def assign_destinations(
        self, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        """Who will go on with a leaver's sequences; see `Journal.assign_destinations`."""
        ...

    def hand_over(
        self, rank: int, held: list[HeldKV], destinations: Iterable[int]
    ) -> dict[int, list[KVMigration]]:
        """A rank has left or is lost: who goes on with its sequences; see `Journal.hand_over`."""
        ...

    def rank_exited(self, rank: int, own_fault: bool) -> None:
        """A rank has exited unasked: what may have caused it is not tried for ever; see
        `Journal.rank_exited`."""
        ...

    @property
    def expert_cache(self) -> bytes:
        """Address of the host's copy of the experts; b"": there is none."""
        ...

    def admit_waiting(self) -> None: ...
    def service_lost(self, reason: str) -> None:
        """Nobody is left and nobody will be started again: the service stops."""
        ...

    def publish(self, event: ClusterEvent) -> None: ...
    @property
    def saves(self) -> bool:
        """Whether what is known is written down for another head."""
        ...

    def save_cluster(self, record: SavedCluster, *, urgent: bool) -> None:
        """urgent: it is written when this returns."""
        ...

    def save_operation(self, record: SavedOperation, *, urgent: bool) -> None: ...
    def forget_operation(self, operation_id: str) -> None: ...
    def impair(self, part: str, why: str | None) -> None:
        """A part of the service does not do its work now, or does again (None)."""
        ...

    def heard(self) -> bool:
        """Whether anybody listens to how an operation goes on; its end is always published."""
        ...
