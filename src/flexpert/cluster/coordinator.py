"""The coordinator: the only one who decides an epoch. A shell around `Membership`.

It turns reports, process ends and passed deadlines into events of the state machine and carries
out what the machine answers. Everything runs on the head's event loop; time comes from the head.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from flexpert.cluster.expert_recovery import ExpertRecovery
from flexpert.cluster.formatting import describe_change, outcome_line
from flexpert.cluster.interfaces import HeadInterface, Timer
from flexpert.cluster.kv_migration import KVMigrations
from flexpert.cluster.membership import Change, Do, EventKind, Membership, MembershipEvent, Phase
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.operation import Operation, resolve_target
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.restart_policy import RestartPolicy
from flexpert.cluster.stall_detector import Watch
from flexpert.cluster.views import ClusterEvent, OperationView, PlacementView, RankView
from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import HeldKV
from flexpert.errors import FlexpertError, OperationConflict, OperationRefused, UnknownOperation
from flexpert.models.source import ModelSource
from flexpert.moe.placement import Placement, keep, loads

log = logging.getLogger("flexpert")

CHANGES = "changes of the ranks"  # the part of the service that this is
_KEPT_OPERATIONS = 256
# Signals that a process brings upon itself.
_FAULTS = {
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGSEGV,
    signal.SIGSYS,
    signal.SIGTRAP,
}
_RELEASE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asked for; see `resolve_target`."""

    ranks: int | None
    add: int
    remove: tuple[int, ...]


class Coordinator:
    """Runs one change at a time; see `docs` and `membership.py` for the protocol."""

    def __init__(
        self,
        config: Config,
        source: ModelSource,
        head: HeadInterface,
        capacity: MemoryBudget | None = None,
    ) -> None:
        self._config = config
        self._source = source
        self._head = head
        self._memory_budget = capacity or MemoryBudget(config, source)
        self._membership = Membership()
        self._placement: Placement | None = None
        self._next: Placement | None = None
        self._ranks: dict[int, RankState] = {}
        self._migrations = KVMigrations(self._ranks, head)
        self._watch = Watch(self._ranks, head, config.cluster.stall_timeout, self._warn)
        self._operations: dict[str, Operation] = {}
        self._running: Operation | None = None
        self._deadline: Timer | None = None
        self._loss = ""
        self._cause = EventKind.BEGIN  # the latest event
        self._before_loss: frozenset[int] = frozenset()
        self._halted: set[int] = set()  # who acknowledged the latest halt
        cluster = config.cluster
        self._restart_policy = RestartPolicy(
            cluster.restart_policy,
            limit=cluster.restart_limit,
            backoff_s=cluster.restart_backoff,
            longest_backoff_s=cluster.restart_backoff_max,
        )
        self._expert_recovery = ExpertRecovery(
            source.info.experts,
            source.info.moe_layers,
            cluster.redundant_experts,
            degrade=cluster.on_missing_expert == "degrade",
        )
        self._restoring: Operation | None = None  # it loads experts that nobody holds
        self._restore_tries = 0
        self._restore_not_before = 0.0
        self._warned = ""  # the latest text that is not to be repeated
        self._queued: tuple[Operation, Wish] | None = None
        self._replace_timer: Timer | None = None
        self._told: frozenset[int] = frozenset()  # those left out that were warned of
        self._down: str | None = None
        self._closed = False

    # ---- what it knows ----------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        return self._membership.epoch

    @property
    def members(self) -> frozenset[int]:
        return self._membership.members

    @property
    def _staying(self) -> frozenset[int]:
        """Ranks that cannot have left: nobody has told them to switch to an epoch without them."""
        change, phase = self._membership.change, self._membership.phase
        if change is None or phase is Phase.LOST:
            return frozenset()
        if phase in (Phase.COMMIT, Phase.RELEASE, Phase.RECOVER):
            return change.after
        return frozenset(self._ranks)

    @property
    def admitting(self) -> frozenset[int]:
        """Ids that may be given new sequences: members that are not on their way out."""
        change = self._membership.change
        if self._membership.phase is Phase.LOST or self._down:
            return frozenset()
        if self._membership.phase in (Phase.MIGRATE, Phase.COMMIT, Phase.RECOVER) and change:
            return change.before & change.after or change.after
        return self._membership.members

    @property
    def running(self) -> OperationView | None:
        return self._running.view() if self._running else None

    @property
    def desired(self) -> frozenset[int]:
        """The ids that the last change that was asked for left active."""
        return self._restart_policy.desired

    @property
    def left_out(self) -> frozenset[int]:
        """Wanted ids that kept dying and are not started again."""
        return self._restart_policy.left_out

    @property
    def down(self) -> str | None:
        """Why nothing is computed now and requests wait, or None."""
        return self._down

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
            missing_experts=len(placement.missing()) if placement else 0,
            under_replicated_experts=(
                self._expert_recovery.under_replicated(placement, len(self.desired | self.members))
                if placement
                else 0
            ),
        )

    # ---- operations -------------------------------------------------------------------------

    def begin(
        self, *, ranks: int | None = None, add: int = 0, remove: Sequence[int] = ()
    ) -> OperationView:
        """Start a change, or return the running one with the same target.

        One that the head began by itself makes way: it is withdrawn if it can be, and this one
        begins after it.

        Raises:
            OperationRefused: it can never be reached. OperationConflict: another one runs.
        """
        if self._membership.phase is Phase.LOST or (self._down and not self.members):
            raise OperationRefused(f"all ranks are lost and start again: {self._down}")
        wish = Wish(ranks, add, tuple(remove))
        if self._running is None:
            return self._start(self._resolve(wish, self.members)).view()
        running = self._running
        if self._queued is not None:
            if self._queued[1] == wish:
                return self._queued[0].view()
            running = self._queued[0]
        elif self._same_as_running(running.before, wish) == running.after:
            if running.automatic:
                self._memory_budget.check((), self._replan(running.after))
                self._restart_policy.set_desired(running.after)
            return running.view()
        elif running.automatic:
            return self._queue(wish).view()
        raise OperationConflict(
            f"operation {running.id} to ranks {sorted(running.after)} is running; "
            "wait for it or cancel it"
        )

    def _queue(self, wish: Wish) -> Operation:
        members = self.members
        operation = Operation(members, self._resolve(wish, members), self.epoch)
        operation.enter("waiting")
        self._remember(operation)
        self._queued = operation, wish
        in_time = self._membership.phase in (Phase.SPAWN, Phase.LOAD, Phase.MIGRATE)
        if in_time and self._running is not self._restoring:
            self._handle(
                MembershipEvent(EventKind.CANCEL, reason=f"operation {operation.id} was asked for")
            )
        return operation

    def _resolve(self, wish: Wish, members: frozenset[int]) -> frozenset[int]:
        return resolve_target(
            members,
            self._config.cluster.max_ranks,
            ranks=wish.ranks,
            add=wish.add,
            remove=wish.remove,
        )

    def _same_as_running(self, before: frozenset[int], wish: Wish) -> frozenset[int] | None:
        try:
            return self._resolve(wish, before)
        except OperationRefused:
            return None

    def begin_first(self, ranks: int) -> OperationView:
        """The change from nothing to the service's first ranks."""
        self._watch.start()
        return self._start(frozenset(range(ranks))).view()

    def close(self) -> None:
        """Nothing begins by itself any more."""
        self._closed = True
        self._watch.close()
        for timer in (self._deadline, self._replace_timer):
            if timer:
                timer.cancel()

    def _start(
        self, target: frozenset[int], operation: Operation | None = None, reason: str | None = None
    ) -> Operation:
        members = self.members
        operation = operation or Operation(members, target, self.epoch, reason)
        operation.before, operation.after, operation.epoch = members, target, self.epoch
        if target == members:
            if not operation.automatic:  # they may be what a loss has left, and too few
                self._memory_budget.check((), self._replan(target))
            operation.end("done")
            self._remember(operation)
            if not operation.automatic:
                self._restart_policy.set_desired(target)
            return operation
        placement = self._replan(target)
        self._memory_budget.check(target - members, placement)
        return self._run(operation, placement)

    def _run(self, operation: Operation, placement: Placement) -> Operation:
        self._next = placement
        actions = self._membership.begin(operation.after)
        change = self._membership.change
        assert change is not None  # begin made it
        operation.epoch = change.epoch
        operation.moved_experts = sum(map(len, loads(self._placement, self._next).values()))
        self._begin(operation)
        self._carry_out(actions)
        return operation

    def _begin(self, operation: Operation) -> None:
        self._remember(operation)
        self._running = operation
        view = operation.view()
        because = f" ({view.reason})" if view.reason else ""
        log.info("%s: %s%s", view.id, describe_change(view), because)

    def _replan(self, target: frozenset[int]) -> Placement:
        hosts = self._hosts(target)
        return self._expert_recovery.spread(
            self._placement, target, self._memory_budget.fits, hosts=hosts
        )

    def _hosts(self, ranks: Iterable[int]) -> dict[int, str]:
        """The machine of each rank; those that are still to be started will be on this one."""
        known = {
            rank: rank_state.host for rank, rank_state in self._ranks.items() if rank_state.host
        }
        return {rank: known.get(rank) or socket.gethostname() for rank in ranks}

    def _remember(self, operation: Operation) -> None:
        self._operations[operation.id] = operation
        while len(self._operations) > _KEPT_OPERATIONS:
            self._operations.pop(next(iter(self._operations)))

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
        if self._queued and operation is self._queued[0]:
            self._queued = None
            operation.end("cancelled")
            self._publish(operation)
            return operation.view()
        if self._membership.phase not in (Phase.SPAWN, Phase.LOAD, Phase.MIGRATE):
            raise OperationConflict(
                f"operation {operation.id} is in phase {operation.phase} and cannot be withdrawn"
            )
        self._handle(MembershipEvent(EventKind.CANCEL, reason="cancelled"))
        return operation.view()

    # ---- events -----------------------------------------------------------------------------

    def on_report(self, rank: int, report: msg.Report) -> None:
        """Raises: Contradiction: it cannot be true."""
        rank_state = self._ranks.get(rank)
        if rank_state is None:
            return
        epoch = self._membership.change.epoch if self._membership.change else 0
        self._watch.heard(rank_state)
        match report:
            case msg.Alive(stuck_s):
                self._watch.stuck(rank, stuck_s)
            case msg.Published(_, load):
                rank_state.load = load
            case msg.Hello(pid, host, address, kv, experts):
                if rank_state.state != "starting":
                    raise msg.Contradiction(f"it says hello, and is {rank_state.state} already")
                rank_state.pid, rank_state.host, rank_state.address = pid, host, address
                rank_state.kv, rank_state.experts = kv, experts
                rank_state.state = "preparing"
                self._handle(MembershipEvent(EventKind.HELLO, rank))
            case msg.Unable(error):
                if rank_state.state != "starting":
                    raise msg.Contradiction(f"it cannot come up, and is {rank_state.state} already")
                rank_state.error = error
                self._head.send(rank, msg.Stop())
            case msg.Progress(of, share) if of == epoch and self._running:
                self._running.shares[rank] = share
            case msg.Prepared(of, copied, memory) if of == epoch:
                rank_state.memory = memory
                if self._running:
                    self._running.copied_experts += copied
                if rank_state.state == "preparing":
                    rank_state.state = "ready"
                self._handle(MembershipEvent(EventKind.PREPARED, rank))
            case msg.Failed(of, error):
                rank_state.error = error
                if of == epoch:
                    self._handle(MembershipEvent(EventKind.FAILED, rank, f"rank {rank}: {error}"))
            case msg.Switched(of, pause_ms, load) if of == epoch:
                rank_state.state, rank_state.load = "active", load
                self._restart_policy.active(rank, self._head.now())
                if pause_ms is not None and self._running:
                    self._running.pause_ms = max(pause_ms, self._running.pause_ms or 0.0)
                self._handle(MembershipEvent(EventKind.SWITCHED, rank))
            case msg.Offered(of, held) if of == epoch and self._membership.phase is Phase.MIGRATE:
                if self._migrations.offered(epoch, rank, held, self._destinations()):
                    self._handle(MembershipEvent(EventKind.MIGRATED, rank))
            case msg.Fetched(of, source, size) if of == epoch:
                if self._running:
                    self._running.moved_kv_bytes += size
                if self._migrations.fetched(source, rank):
                    self._handle(MembershipEvent(EventKind.MIGRATED, source))
            case msg.HandedOver(of, held):
                if rank in self._staying:
                    raise msg.Contradiction("it has left, and was not asked to")
                self._hand_over(rank, held if of == epoch else [])
                rank_state.state = "leaving"
                if of == epoch:
                    self._handle(MembershipEvent(EventKind.HANDED_OVER, rank))
            case msg.Adopted(source, moved, size, recomputed):
                if self._running:
                    self._running.moved_with_kv += moved
                    self._running.moved_kv_bytes += size
                    self._running.recomputed_tokens += recomputed
                self._adopted(source, rank)
            case msg.Halted(of) if of == epoch:
                self._halted.add(rank)
            case msg.Broken(of, _, error) if of in (epoch, self.epoch):
                log.warning("rank %d: %s", rank, error)
                self._head.publish(_event("warning", {"rank": rank, "error": error}))
                self._loss, self._before_loss = f"rank {rank}: {error}", self.members
                self._handle(MembershipEvent(EventKind.BROKEN, rank, error))

    def expel(self, rank: int, why: str) -> None:
        """A rank cannot be understood: it is ended, which is an ordinary loss. why: a predicate."""
        self._watch.end([rank], why)

    def on_exit(self, rank: int, status: int, why: str = "") -> None:
        """A rank's process is certainly gone. why: what is known beyond the status."""
        rank_state = self._ranks.pop(rank, None)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        reason = f"rank {rank} ended ({how})"
        if error := why or (rank_state.error if rank_state else ""):
            reason += f": {error}"
        gone = {
            "id": rank,
            "state": "gone",
            "pid": rank_state.pid if rank_state else 0,
            "status": status,
            "evicted": rank_state is not None and rank_state.state == "stalled",
            "reason": reason,
        }
        self._head.publish(_event("rank", gone))
        change, phase = self._membership.change, self._membership.phase
        asked = change is not None and phase is not Phase.IDLE and rank in change.leaving
        asked |= change is not None and phase is Phase.UNDO and change.cancelled
        asked |= rank_state is not None and rank_state.blameless
        log.log(logging.INFO if asked else logging.WARNING, "%s", reason)
        if asked:
            self._restart_policy.left(rank)
        else:
            self._restart_policy.ended(rank, status, self._head.now())
        self._loss, self._before_loss = reason, self.members
        self._handle(MembershipEvent(EventKind.EXITED, rank, reason))
        self._migrations.lost(rank)
        if not asked:
            by_us = rank_state is not None and rank_state.state == "stalled"
            self._head.rank_exited(rank, not by_us and (status > 0 or -status in _FAULTS))
        # only now: admission must not choose the lost rank again
        self._hand_over(rank, [])
        if self._down and not self._ranks and self._membership.phase is Phase.LOST:
            self._membership.restart()
            self._placement = self._next = None
            self._go_on()

    def _handle(self, event: MembershipEvent) -> None:
        self._cause = event.kind
        self._carry_out(self._membership.handle(event))

    def _on_deadline(self) -> None:
        phase = self._membership.phase
        change = self._membership.change
        waited = sorted(change.everyone - change.reported - change.gone) if change else []
        self._handle(
            MembershipEvent(
                EventKind.DEADLINE,
                reason=f"deadline passed in {phase.value}, missing ranks {waited}",
            )
        )

    def _destinations(self) -> frozenset[int]:
        """Ranks of the next epoch that are up."""
        change = self._membership.change
        return change.after & set(self._ranks) if change else frozenset()

    def _hand_over(self, rank: int, held: list[HeldKV]) -> None:
        """A rank has left or is lost: others go on with its sequences."""
        leaves = self._membership.phase is Phase.COMMIT and bool(held)
        moved = self._migrations.hand_over(
            rank, held, self._destinations() if leaves else self.admitting
        )
        if self._running:
            self._running.moved_requests += moved

    def _adopted(self, leaver: int, destination: int) -> None:
        change = self._membership.change
        last = self._migrations.adopted(leaver, destination)
        if last and self._membership.phase is Phase.RELEASE and change:
            self._tell({leaver} & change.leaving, msg.Stop())

    # ---- actions ----------------------------------------------------------------------------

    def _carry_out(self, actions: list[Do]) -> None:
        change = self._membership.change
        if change is None:
            return
        for action in actions:
            match action:
                case Do.SPAWN:
                    self._phase("spawn", self._config.cluster.start_timeout)
                    for rank in sorted(change.joining):
                        self._ranks[rank] = RankState(rank)
                        self._head.spawn(rank)
                case Do.PREPARE:
                    if self._next is None:
                        too_small = self._memory_budget.too_small(change.after)
                        self._handle(
                            MembershipEvent(EventKind.SHORT, reason=f"{self._loss}; {too_small}")
                        )
                        return
                    name = "recover" if self._membership.phase is Phase.RECOVER else "load"
                    self._phase(name, self._config.cluster.load_timeout)
                    self._prepare(change.epoch, change.after, change.everyone)
                case Do.OFFER:
                    self._phase("migrate", self._config.cluster.migration_timeout)
                    self._tell(change.leaving, msg.Offer(change.epoch))
                case Do.COMMIT:
                    self._phase("commit", self._config.cluster.commit_timeout)
                    self._tell(change.everyone, msg.Commit(change.epoch))
                case Do.STOP:
                    self._switched(change.epoch)
                    self._phase("release", _RELEASE_TIMEOUT_S)
                    read = set(filter(self._migrations.reads, change.leaving))
                    self._tell(change.leaving - read, msg.Stop())
                case Do.ABANDON:
                    self._abandon(change)
                case Do.HALT:
                    self._halt(change)
                case Do.KILL_SILENT:
                    self._phase(self._membership.phase.value, _RELEASE_TIMEOUT_S)
                    silent = change.everyone - change.reported - change.gone
                    self._watch.end(silent, f"did not report in {self._membership.phase.value}")
                case Do.HOLD:
                    self._hold(change)
                case Do.CANCEL:
                    self._tell(change.before, msg.Cancel(change.epoch))
                case Do.KILL_NEWCOMERS:
                    self._phase("undo", _RELEASE_TIMEOUT_S)
                    self._withdraw(change.joining - change.gone)
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
        self._migrations.clear()
        self._halted = set()
        self._tell(change.before, msg.Halt(change.epoch))
        self._expect_halted(change)

    def _expect_halted(self, change: Change) -> None:
        limit_s = self._config.cluster.stall_timeout
        due = self._head.now() + limit_s
        self._later(limit_s, lambda: self._end_stalled(change, due))

    def _end_stalled(self, change: Change, due: float) -> None:
        """Who did not even hear the halt has stalled; its end is an ordinary loss."""
        if change is not self._membership.change or self._membership.phase is Phase.IDLE:
            return
        if self._watch.late(due):
            self._expect_halted(change)
        else:
            limit_s = self._config.cluster.stall_timeout
            deaf = change.before - change.gone - self._halted
            self._watch.end(deaf, f"did not hear within {limit_s:g} s that others were lost")

    def _abandon(self, recovery: Change) -> None:
        """A member is lost: what ran is over, and an operation of its own brings the rest back."""
        if self._running and not self._running.automatic and recovery.kept:
            self._restart_policy.set_desired(self._running.after)
        before = self._running.before if self._running else self._before_loss
        reason = self._loss
        if self._running:
            self._running.end("failed", reason)
            self._publish(self._running)
        self._withdraw(recovery.doomed)
        self._next = self._expert_recovery.after_loss(
            self._placement, recovery.after, self._memory_budget.fits
        )
        operation = Operation(before, recovery.after, recovery.epoch, reason or "a rank was lost")
        operation.state = "committing"
        if self._next:
            operation.moved_experts = sum(map(len, loads(self._placement, self._next).values()))
        self._begin(operation)

    def _hold(self, change: Change) -> None:
        """The survivors wait, halted but with all they hold, until there are ranks for the rest."""
        self._down = change.error
        if self._placement:
            self._placement = keep(self._placement, change.after)
        for rank in change.after & set(self._ranks):
            self._ranks[rank].state = "ready"
        self._warn(f"{self._down}; requests wait until more ranks are up")
        self._phase("release", _RELEASE_TIMEOUT_S)
        self._kill(change.leaving)  # no epoch comes in which they could hand over what they run
        self._tell(change.after, msg.Hold(sorted(change.after)))

    def _phase(self, name: str, timeout_s: float) -> None:
        if self._running:
            self._running.enter(name)
            if name == "commit":
                self._running.state = "committing"
        self._stop_clock()
        self._start_clock(timeout_s)

    def _start_clock(self, timeout_s: float) -> None:
        due = self._head.now() + timeout_s
        self._deadline = self._later(timeout_s, lambda: self._clock_is_up(due))

    def _clock_is_up(self, due: float) -> None:
        if self._watch.late(due):
            self._start_clock(self._config.cluster.stall_timeout)
        else:
            self._on_deadline()

    def _later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Nobody waits for a timer: what it raises is logged, and the service says so."""

        def run() -> None:
            try:
                action()
            except Exception as error:
                log.exception("what was due in a change of the ranks could not be done")
                self._head.impair(CHANGES, f"what was due could not be done: {error!r}")

        return self._head.call_later(delay_s, run)

    def _stop_clock(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _prepare(self, epoch: int, after: frozenset[int], everyone: frozenset[int]) -> None:
        assert self._next is not None  # _start planned it
        members = {rank: self._ranks[rank].address for rank in after}
        holders = set(self._placement.ranks) if self._placement else set()
        exporters = {rank: self._ranks[rank].experts for rank in holders & set(self._ranks)}
        self._tell(everyone, msg.Prepare(epoch, members, self._next, exporters))

    def _tell(self, ranks: Iterable[int], command: msg.Command) -> None:
        for rank in sorted(ranks):
            if rank in self._ranks:
                self._head.send(rank, command)

    def _withdraw(self, ranks: Iterable[int]) -> None:
        """End ranks whose change is over. It is not held against them if others were lost."""
        for rank in ranks:
            rank_state = self._ranks.get(rank)
            if (
                rank_state
                and not rank_state.error
                and self._cause in (EventKind.EXITED, EventKind.BROKEN)
            ):
                rank_state.blameless = True
        self._kill(ranks)

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in sorted(ranks):
            self._head.kill(rank)

    def _switched(self, epoch: int) -> None:
        self._placement, self._next = self._next, None
        self._down = None
        self._head.admit_waiting()
        asked = self._running and not self._running.automatic
        desired = self._running.after if self._running and asked else self.desired
        entered = {"epoch": epoch, "ranks": sorted(self.members), "desired": sorted(desired)}
        self._head.publish(_event("epoch", entered))

    def _finish(self, error: str | None, cancelled: bool) -> None:
        self._stop_clock()
        self._migrations.clear()
        operation, self._running = self._running, None
        self._next = None
        if operation is not None and operation is self._restoring:
            self._restored(failed=cancelled or error is not None)
        if operation is not None:
            if cancelled:
                operation.end("cancelled")
            elif error is not None:
                operation.end("failed", error)
            else:
                operation.end("done")
                self._head.impair(CHANGES, None)  # if they were, they work again
                if not operation.automatic:
                    self._restart_policy.set_desired(operation.after)
            self._publish(operation)
        self._go_on()

    def _publish(self, operation: Operation) -> None:
        view = operation.view()
        if operation.over.is_set():
            level = logging.WARNING if view.state == "failed" else logging.INFO
            log.log(level, "%s: %s", view.id, outcome_line(view))
        self._head.publish(_event("operation", msgspec.to_builtins(view)))

    # ---- what begins by itself --------------------------------------------------------------

    def _go_on(self) -> None:
        """Nothing runs: begin what was asked for meanwhile, or replace who is missing."""
        if self._closed or self._restore():
            return
        if self._queued:
            (operation, wish), self._queued = self._queued, None
            try:
                self._start(self._resolve(wish, self.members), operation)
            except OperationRefused as error:
                operation.end("failed", str(error))
            if self._running:
                return
            self._publish(operation)
        if self._replace_timer:
            self._replace_timer.cancel()
        self._replace_timer = None
        for rank in sorted(self.left_out - self._told):
            self._warn(f"rank {rank} keeps ending and is left out; scale to have it tried again")
        self._told = self.left_out
        wait_s = self._restart_policy.next_s(self.members, self._head.now())
        if self._restore_tries:
            again_s = max(0.0, self._restore_not_before - self._head.now())
            wait_s = again_s if wait_s is None else min(wait_s, again_s)
        if wait_s is not None:
            self._replace_timer = self._later(wait_s, self._replace)
        elif self._down:
            self._never("no rank is started again by itself")

    def _restore(self) -> bool:
        """Begin to load the experts that nobody holds, if there are any; False: not now."""
        serves = self.members and not self._down
        missing = self._placement.missing() if self._placement and serves else []
        if not missing:
            self._restore_tries = 0
            return False
        if self._restore_tries and self._head.now() < self._restore_not_before:
            return False
        placement = self._expert_recovery.whole(
            self._placement, self.members, self._memory_budget.fits
        )
        if placement is None:
            self._restore_tries = 0  # time changes nothing about it, only more ranks do
            self._warn_once(
                f"ranks {sorted(self.members)} have no memory for {len(missing)} experts that were "
                "lost (memory_per_rank); answers are degraded until more ranks are up"
            )
            return False
        members, reason = self.members, f"loads {len(missing)} experts that were lost"
        self._restoring = Operation(members, members, self.epoch, reason)
        self._run(self._restoring, placement)
        return True

    def _restored(self, failed: bool) -> None:
        """Loading the lost experts is over; if it failed, the next try waits longer each time."""
        cluster = self._config.cluster
        self._restoring = None
        if failed:
            wait_s = cluster.restart_backoff * 2**self._restore_tries
            self._restore_tries += 1
            self._restore_not_before = self._head.now() + min(wait_s, cluster.restart_backoff_max)

    def _replace(self) -> None:
        if self._closed or self._running or self._membership.phase is not Phase.IDLE:
            return  # `_go_on` comes when that is over
        due = self._restart_policy.due(self.members, self._head.now()) - set(self._ranks)
        if not due:
            self._go_on()
            return
        if not self._memory_budget.fits(self._replan(self.members | due)):
            missing = self._restart_policy.missing(self.members)
            if due < missing:  # all of them together may have the memory
                wait_s = self._restart_policy.all_s(self.members, self._head.now())
                self._replace_timer = self._later(wait_s, self._replace)
                return
            if self._down:
                everybody = sorted(self.members | due)
                self._never(f"ranks {everybody} together could not hold all experts, either")
                return
        names = ", ".join(map(str, sorted(due)))
        try:
            self._start(self.members | due, reason=f"replaces rank {names}")
        except OperationRefused as error:
            self._warn(f"rank {names} cannot be replaced: {error}")
            for rank in due:
                self._restart_policy.ended(rank, 1, self._head.now())
            self._go_on()
        except FlexpertError as error:  # there is nothing to start ranks with any more
            self._head.service_lost(f"rank {names} cannot be replaced: {error}")

    def _never(self, why: str) -> None:
        """Nothing that begins by itself will end the waiting."""
        if not self.members:
            self._head.service_lost(f"{self._down}; {why}")
        elif self._down and why not in self._down:
            self._down += f"; {why}: scale up"
            self._warn(self._down)

    def _warn(self, text: str) -> None:
        log.warning("%s", text)
        self._head.publish(_event("warning", {"error": text}))

    def _warn_once(self, text: str) -> None:
        if text != self._warned:
            self._warned = text
            self._warn(text)

    def _lost(self, reason: str) -> None:
        self._stop_clock()
        self._migrations.clear()
        if self._running:
            self._running.end("failed", reason)
            self._publish(self._running)
            self._running = None
        if self._queued:
            self._queued[0].end("failed", reason)
            self._publish(self._queued[0])
            self._queued = None
        if not self._restart_policy.desired:
            self._head.service_lost(reason)
            return
        self._down = reason
        self._warn(f"{reason}; nobody can go on: requests wait until ranks are up again")
        self._withdraw(list(self._ranks))  # whoever is left cannot go on, either

    def _announce(self) -> None:
        if self._running and self._head.heard():
            self._publish(self._running)


def _event(kind: str, data: dict[str, object]) -> ClusterEvent:
    return ClusterEvent(kind=kind, time=time.time(), data=data)
