"""The coordinator: the only one who decides an epoch. A shell around `Membership`.

It turns reports, process ends and passed deadlines into events of the state machine and carries
out what the machine answers. Everything runs on the head's event loop; time comes from its ports.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import psutil

from flexpert.cluster import messages as msg
from flexpert.cluster.membership import Change, Do, Event, Kind, Membership, Phase
from flexpert.cluster.operation import Operation, resolve_target
from flexpert.cluster.views import (
    ClusterEvent,
    OperationView,
    PlacementView,
    RankState,
    RankView,
)
from flexpert.config import Config
from flexpert.engine.memory import planned_memory
from flexpert.errors import OperationConflict, OperationRefused, UnknownOperation
from flexpert.models.source import ModelSource
from flexpert.moe.placement import Placement, loads, replan

log = logging.getLogger("flexpert")

_KEPT_OPERATIONS = 256
_RELEASE_TIMEOUT_S = 5.0


class Timer(Protocol):
    """A call that is still to come."""

    def cancel(self) -> object: ...


class Ports(Protocol):
    """What the coordinator needs from the head around it."""

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer: ...

    def spawn(self, rank: int) -> None: ...
    def kill(self, rank: int) -> None: ...
    def send(self, rank: int, command: msg.Command) -> None: ...
    def moved(self, rank: int, ids: Iterable[str]) -> int: ...
    def lost(self, reason: str) -> None: ...
    def publish(self, event: ClusterEvent) -> None: ...


@dataclass(slots=True)
class RankRecord:
    """What the head knows of one rank."""

    id: int
    state: RankState = "starting"
    host: str = ""
    pid: int = 0
    address: bytes = b""
    load: msg.Load = field(default_factory=lambda: msg.Load(0, 0, 0.0, 0))
    memory: msg.Memory | None = None
    error: str = ""

    def view(self, placement: Placement | None) -> RankView:
        return RankView(
            id=self.id,
            state=self.state,
            host=self.host,
            pid=self.pid,
            running=self.load.running,
            waiting=self.load.waiting,
            kv_used=round(self.load.kv_used, 4),
            experts=placement.count(self.id) if placement else 0,
            memory_bytes=self.load.memory,
            planned_bytes=self.memory.total if self.memory else 0,
        )


class Coordinator:
    """Runs one change at a time; see `docs` and `membership.py` for the protocol."""

    def __init__(self, config: Config, source: ModelSource, ports: Ports) -> None:
        self._config = config
        self._source = source
        self._ports = ports
        self._membership = Membership()
        self._placement: Placement | None = None
        self._next: Placement | None = None
        self._ranks: dict[int, RankRecord] = {}
        self._operations: dict[str, Operation] = {}
        self._running: Operation | None = None
        self._deadline: Timer | None = None
        self._loss = ""
        self._before_loss: frozenset[int] = frozenset()
        self._halted: set[int] = set()  # who acknowledged the latest halt

    # ---- what it knows ----------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._membership.epoch

    @property
    def members(self) -> frozenset[int]:
        return self._membership.members

    @property
    def admitting(self) -> frozenset[int]:
        """Ids that may be given new sequences: members that are not on their way out."""
        change = self._membership.change
        if self._membership.phase in (Phase.COMMIT, Phase.RECOVER) and change:
            return change.before & change.after or change.after
        return self._membership.members

    @property
    def running(self) -> OperationView | None:
        return self._running.view() if self._running else None

    def ranks(self) -> list[RankView]:
        return [self._ranks[rank].view(self._placement) for rank in sorted(self._ranks)]

    def memory(self, rank: int) -> msg.Memory | None:
        """What a rank plans to use, in parts."""
        return self._ranks[rank].memory if rank in self._ranks else None

    def placement(self) -> PlacementView:
        info = self._source.info
        placement = self._placement
        counts = {str(rank): placement.count(rank) for rank in placement.ranks} if placement else {}
        return PlacementView(
            layers=info.moe_layers,
            experts=info.experts,
            replicas=sum(counts.values()),
            experts_per_rank=counts,
        )

    # ---- operations -------------------------------------------------------------------------

    def begin(
        self, *, ranks: int | None = None, add: int = 0, remove: Sequence[int] = ()
    ) -> OperationView:
        """Start a change, or return the running one with the same target.

        Raises:
            OperationRefused: it can never be reached. OperationConflict: another one runs.
        """
        if self._running:
            before = self._running.before
            wanted = self._same_as_running(before, ranks, add, remove)
            if wanted == self._running.after:
                return self._running.view()
            raise OperationConflict(
                f"operation {self._running.id} to ranks {sorted(self._running.after)} is running; "
                "wait for it or cancel it"
            )
        if self._membership.phase is Phase.LOST:
            raise OperationRefused("the service has lost a rank and is stopping")
        members = self.members
        target = resolve_target(
            members, self._config.cluster.max_ranks, ranks=ranks, add=add, remove=remove
        )
        return self._start(target).view()

    def _same_as_running(
        self, before: frozenset[int], ranks: int | None, add: int, remove: Sequence[int]
    ) -> frozenset[int] | None:
        try:
            return resolve_target(
                before, self._config.cluster.max_ranks, ranks=ranks, add=add, remove=remove
            )
        except OperationRefused:
            return None

    def begin_first(self, ranks: int) -> OperationView:
        """The change from nothing to the service's first ranks."""
        return self._start(frozenset(range(ranks))).view()

    def _start(self, target: frozenset[int]) -> Operation:
        members = self.members
        if target == members:
            operation = Operation(members, target, self.epoch)
            operation.end("done")
            self._remember(operation)
            return operation
        info = self._source.info
        self._next = replan(self._placement, target, experts=info.experts, layers=info.moe_layers)
        self._check_memory(target - members, self._next)
        actions = self._membership.begin(target)
        change = self._membership.change
        assert change is not None  # begin made it
        operation = Operation(members, target, change.epoch)
        operation.moved_experts = sum(map(len, loads(self._placement, self._next).values()))
        self._remember(operation)
        self._running = operation
        self._carry_out(actions)
        return operation

    def _remember(self, operation: Operation) -> None:
        self._operations[operation.id] = operation
        while len(self._operations) > _KEPT_OPERATIONS:
            self._operations.pop(next(iter(self._operations)))

    def _check_memory(self, joining: Iterable[int], placement: Placement) -> None:
        newcomers = list(joining)
        needs = {
            rank: planned_memory(
                self._source,
                self._config.engine,
                self._config.cluster.max_ranks,
                placement.count(rank),
                len(placement.ranks),
            )
            for rank in placement.ranks
        }
        totals = {rank: need.total for rank, need in needs.items()}
        limit = self._config.cluster.memory_per_rank
        worst = max(totals, key=lambda rank: totals[rank])
        if limit is not None and totals[worst] > limit:
            raise OperationRefused(
                f"{len(totals)} ranks cannot hold the experts: rank {worst} would need "
                f"{_mib(totals[worst])} of its {_mib(limit)} (memory_per_rank)"
            )
        memory = psutil.virtual_memory()
        free = memory.available - int(memory.total * self._config.cluster.memory_headroom)
        wanted = sum(totals[rank] for rank in newcomers)
        if wanted > free:
            raise OperationRefused(
                f"{len(newcomers)} more ranks need {_mib(wanted)} but {_mib(max(free, 0))} of "
                "memory are free; lower --kv-memory or the number of ranks"
            )

    def operation(self, operation_id: str) -> Operation:
        """Raises UnknownOperation."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise UnknownOperation(
                f"no operation {operation_id!r}; the last {_KEPT_OPERATIONS} are kept"
            ) from None

    def cancel(self, operation_id: str) -> OperationView:
        """Withdraw a change that has not begun to commit.

        Raises:
            UnknownOperation, OperationConflict
        """
        operation = self.operation(operation_id)
        if operation.over.is_set():
            raise OperationConflict(f"operation {operation.id} is over: {operation.state}")
        if self._membership.phase not in (Phase.SPAWN, Phase.LOAD):
            raise OperationConflict(
                f"operation {operation.id} is in phase {operation.phase} and cannot be withdrawn"
            )
        self._handle(Event(Kind.CANCEL, reason="cancelled"))
        return operation.view()

    # ---- events -----------------------------------------------------------------------------

    def on_report(self, rank: int, report: msg.Report) -> None:
        """A report of a rank that has proved itself."""
        record = self._ranks.get(rank)
        if record is None:
            return
        epoch = self._membership.change.epoch if self._membership.change else 0
        match report:
            case msg.Hello(_, pid, host, address):
                record.pid, record.host, record.address = pid, host, address
                record.state = "preparing"
                self._handle(Event(Kind.HELLO, rank))
            case msg.Unable(_, error):
                record.error = error
                self._ports.send(rank, msg.Stop())
            case msg.Progress(of, share) if of == epoch and self._running:
                self._running.shares[rank] = share
            case msg.Prepared(of, _, memory) if of == epoch:
                record.memory = memory
                if record.state == "preparing":
                    record.state = "ready"
                self._handle(Event(Kind.PREPARED, rank))
            case msg.Failed(of, error):
                record.error = error
                if of == epoch:
                    self._handle(Event(Kind.FAILED, rank, f"rank {rank}: {error}"))
            case msg.Switched(of, pause_ms, load) if of == epoch:
                record.state, record.load = "active", load
                if pause_ms is not None and self._running:
                    self._running.pause_ms = max(pause_ms, self._running.pause_ms or 0.0)
                self._handle(Event(Kind.SWITCHED, rank))
            case msg.HandedOver(of, ids):
                moved = self._ports.moved(rank, ids)
                if self._running:
                    self._running.moved_requests += moved
                record.state = "leaving"
                if of == epoch:
                    self._handle(Event(Kind.HANDED_OVER, rank))
            case msg.Published(_, load):
                record.load = load
            case msg.Halted(of) if of == epoch:
                self._halted.add(rank)
            case msg.Broken(of, _, error) if of in (epoch, self.epoch):
                log.warning("rank %d: %s", rank, error)
                self._ports.publish(_event("warning", {"rank": rank, "error": error}))
                self._loss, self._before_loss = f"rank {rank}: {error}", self.members
                self._handle(Event(Kind.BROKEN, rank, error))

    def on_exit(self, rank: int, status: int) -> None:
        """A rank's process is certainly gone."""
        record = self._ranks.pop(rank, None)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        reason = f"rank {rank} ended ({how})"
        if record and record.error:
            reason += f": {record.error}"
        self._ports.publish(_event("rank", {"id": rank, "state": "gone", "reason": reason}))
        self._loss, self._before_loss = reason, self.members
        self._handle(Event(Kind.EXITED, rank, reason))
        # only now: admission must not choose the lost rank again
        moved = self._ports.moved(rank, ())
        if self._running:
            self._running.moved_requests += moved

    def _handle(self, event: Event) -> None:
        self._carry_out(self._membership.handle(event))

    def _on_deadline(self) -> None:
        phase = self._membership.phase
        change = self._membership.change
        waited = sorted(change.everyone - change.reported - change.gone) if change else []
        self._handle(
            Event(Kind.DEADLINE, reason=f"deadline passed in {phase.value}, missing ranks {waited}")
        )

    # ---- actions ----------------------------------------------------------------------------

    def _carry_out(self, actions: list[Do]) -> None:
        change = self._membership.change
        if change is None:
            return
        for action in actions:
            match action:
                case Do.SPAWN:
                    self._phase("spawn", self._config.cluster.start_timeout_s)
                    for rank in sorted(change.joining):
                        self._ranks[rank] = RankRecord(rank)
                        self._ports.spawn(rank)
                case Do.PREPARE:
                    name = "recover" if self._membership.phase is Phase.RECOVER else "load"
                    self._phase(name, self._config.cluster.load_timeout_s)
                    self._prepare(change.epoch, change.after, change.everyone)
                case Do.COMMIT:
                    self._phase("commit", self._config.cluster.commit_timeout_s)
                    self._tell(change.everyone, msg.Commit(change.epoch))
                case Do.STOP:
                    self._switched(change.epoch)
                    self._phase("release", _RELEASE_TIMEOUT_S)
                    self._tell(change.leaving, msg.Stop())
                case Do.ABANDON:
                    self._abandon(change)
                case Do.HALT:
                    self._halt(change)
                case Do.KILL_SILENT:
                    self._phase(self._membership.phase.value, _RELEASE_TIMEOUT_S)
                    self._kill(change.everyone - change.reported - change.gone)
                case Do.CANCEL:
                    self._tell(change.before, msg.Cancel(change.epoch))
                case Do.KILL_NEWCOMERS:
                    self._phase("undo", _RELEASE_TIMEOUT_S)
                    self._kill(change.joining - change.gone)
                case Do.KILL_LEAVERS:
                    self._phase("release", _RELEASE_TIMEOUT_S)
                    self._kill(change.ending - change.gone)
                case Do.FINISH:
                    self._finish(change.error, change.cancelled)
                case Do.ALARM:
                    self._lost(change.error or "a rank was lost")
        if self._running:
            self._announce()

    def _halt(self, change: Change) -> None:
        self._halted = set()
        self._tell(change.before, msg.Halt(change.epoch))
        limit_s = self._config.cluster.stall_timeout_s
        self._ports.call_later(limit_s, lambda: self._end_stalled(change))

    def _end_stalled(self, change: Change) -> None:
        """Who did not even hear the halt has stalled; its end is an ordinary loss."""
        if change is self._membership.change and self._membership.phase is not Phase.IDLE:
            self._kill(change.before - change.gone - self._halted)

    def _abandon(self, recovery: Change) -> None:
        """A member is lost: what ran is over, and an operation of its own brings the rest back."""
        before = self._running.before if self._running else self._before_loss
        reason = self._loss
        if self._running:
            self._running.end("failed", reason)
            self._announce()
        self._kill(recovery.doomed)
        info = self._source.info
        self._next = replan(
            self._placement, recovery.after, experts=info.experts, layers=info.moe_layers
        )
        operation = Operation(before, recovery.after, recovery.epoch)
        operation.state = "committing"
        operation.reason = reason
        operation.moved_experts = sum(map(len, loads(self._placement, self._next).values()))
        self._remember(operation)
        self._running = operation

    def _phase(self, name: str, timeout_s: float) -> None:
        if self._running:
            self._running.enter(name)
            if name == "commit":
                self._running.state = "committing"
        self._stop_clock()
        self._deadline = self._ports.call_later(timeout_s, self._on_deadline)

    def _stop_clock(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _prepare(self, epoch: int, after: frozenset[int], everyone: frozenset[int]) -> None:
        assert self._next is not None  # _start planned it
        members = {rank: self._ranks[rank].address for rank in after}
        self._tell(everyone, msg.Prepare(epoch, members, self._next))

    def _tell(self, ranks: Iterable[int], command: msg.Command) -> None:
        for rank in sorted(ranks):
            if rank in self._ranks:
                self._ports.send(rank, command)

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in sorted(ranks):
            self._ports.kill(rank)

    def _switched(self, epoch: int) -> None:
        self._placement, self._next = self._next, None
        self._ports.publish(_event("epoch", {"epoch": epoch, "ranks": sorted(self.members)}))

    def _finish(self, error: str | None, cancelled: bool) -> None:
        self._stop_clock()
        operation, self._running = self._running, None
        self._next = None
        if operation is None:
            return
        if cancelled:
            operation.end("cancelled")
        elif error is not None:
            operation.end("failed", error)
        else:
            operation.end("done")
        self._ports.publish(_event("operation", msgspec.to_builtins(operation.view())))

    def _lost(self, reason: str) -> None:
        self._stop_clock()
        if self._running:
            self._running.end("failed", reason)
            self._running = None
        self._ports.lost(reason)

    def _announce(self) -> None:
        if self._running:
            self._ports.publish(_event("operation", msgspec.to_builtins(self._running.view())))


def _event(kind: str, data: dict[str, object]) -> ClusterEvent:
    return ClusterEvent(kind=kind, time=time.time(), data=data)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
