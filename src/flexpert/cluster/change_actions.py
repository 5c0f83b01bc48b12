"""Carries out what the table of a change of ranks says (`membership.RULES`): messages to ranks,
processes started and killed, deadlines, the record of the operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexpert.cluster.availability import AvailabilityEvent, AvailabilityKind
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.membership import Change, Do, EventKind, MembershipEvent, Phase
from flexpert.cluster.operation import Operation
from flexpert.cluster.operations import Operations, moved_experts
from flexpert.cluster.phase_clock import CHANGES, PhaseClock
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.reconciler import Reconciler
from flexpert.cluster.reconciliation import ActivityEvent, ActivityKind
from flexpert.cluster.saved_state import Purpose
from flexpert.engine import rank_protocol as msg
from flexpert.errors import FlexpertError
from flexpert.moe.placement import keep

_RELEASE_TIMEOUT_S = 5.0

Step = Callable[[Change, MembershipEvent], None]


class ChangeActions:
    """One method for each of `Do`."""

    def __init__(
        self,
        cluster: ClusterState,
        operations: Operations,
        clock: PhaseClock,
        reconciler: Reconciler,
    ) -> None:
        self._cluster = cluster
        self._operations = operations
        self._clock = clock
        self._reconciler = reconciler
        self._steps: Mapping[Do, Step] = {
            Do.SPAWN: self._spawn,
            Do.PREPARE: self._prepare,
            Do.OFFER: self._offer,
            Do.COMMIT: self._commit,
            Do.STOP: self._stop,
            Do.ABANDON: self._abandon,
            Do.HALT: self._halt,
            Do.KILL_NOT_HALTED: self._kill_not_halted,
            Do.KILL_SILENT: self._kill_silent,
            Do.HOLD: self._hold,
            Do.CANCEL: self._cancel,
            Do.KILL_NEWCOMERS: self._kill_newcomers,
            Do.KILL_LEAVERS: self._kill_leavers,
            Do.FINISH: self._finish,
            Do.ALARM: self._alarm,
            Do.RESET: self._reset,
        }

    def carry_out(self, actions: list[Do], event: MembershipEvent) -> None:
        """In this order. event: what they answer."""
        change = self._cluster.membership.change or Change(0, frozenset(), frozenset())
        for action in actions:
            self._steps[action](change, event)
        if self._cluster.operation:
            self._cluster.notices.progress(self._cluster.operation)

    # ---- prepare ----------------------------------------------------------------------------

    def _spawn(self, change: Change, event: MembershipEvent) -> None:
        cluster = self._cluster
        if cluster.operation:
            cluster.operation.epoch = change.epoch
        limits = cluster.config.cluster
        self._enter("spawn", limits.wait_for_resources + limits.start_timeout)
        try:
            for rank in sorted(change.joining):
                cluster.ranks[rank] = RankState(rank)
                cluster.head.spawn(rank, cluster.verdicts)
        except FlexpertError as error:  # there is nothing to start ranks with any more
            if cluster.operation is None or cluster.operation.purpose is not Purpose.RESTART:
                raise
            names = ", ".join(map(str, sorted(change.joining)))
            self._reconciler.change_availability(
                AvailabilityEvent(
                    AvailabilityKind.CANNOT_SPAWN, f"rank {names} cannot be replaced: {error}"
                )
            )

    def _prepare(self, change: Change, event: MembershipEvent) -> None:
        cluster = self._cluster
        if cluster.planned is None:
            too_small = cluster.memory_budget.too_small(change.after)
            reason = f"{change.cause}; {too_small}"
            cluster.events.post(MembershipEvent(EventKind.SHORT, reason=reason))
            return
        recovers = cluster.membership.phase is Phase.RECOVER
        if change.joining and not recovers:
            self._place_newcomers(change)
        timeout_s, bandwidth = cluster.config.cluster.load_timeout, 0
        running = cluster.operation
        if running and running.purpose is Purpose.REBALANCE:
            bandwidth = cluster.config.cluster.balance_bandwidth
            timeout_s += running.moved_experts * cluster.memory_budget.expert_bytes / bandwidth
        self._enter("recover" if recovers else "load", timeout_s)
        members = {rank: cluster.ranks[rank].address for rank in change.after}
        holders = set(cluster.placement.ranks) if cluster.placement else set()
        # of those that are lost the processes may not be gone yet
        living = holders & set(cluster.ranks) & change.everyone
        exporters = {rank: cluster.ranks[rank].experts for rank in living}
        cache = cluster.head.expert_cache
        machines = cluster.machines(change.everyone)
        plan = msg.Prepare(
            change.epoch, members, cluster.planned, exporters, cache, machines, bandwidth
        )
        cluster.tell(change.everyone, plan)

    def _place_newcomers(self, change: Change) -> None:
        """Newcomers have said on which machines they are: plan anew if there are several.

        What was planned before they were started stays where the other does not fit.
        """
        cluster = self._cluster
        if len(set(cluster.machines(change.after).values())) < 2:
            return
        found = cluster.plan(change.after)
        if cluster.memory_budget.fits(found):
            cluster.planned = found
            if cluster.operation:
                cluster.operation.moved_experts = moved_experts(cluster.placement, found)

    def _offer(self, change: Change, event: MembershipEvent) -> None:
        self._enter("migrate", self._cluster.config.cluster.migration_timeout)
        self._cluster.tell(change.leaving, msg.Offer(change.epoch))

    def _cancel(self, change: Change, event: MembershipEvent) -> None:
        self._cluster.tell(change.before, msg.Cancel(change.epoch))

    def _kill_newcomers(self, change: Change, event: MembershipEvent) -> None:
        self._enter("undo", _RELEASE_TIMEOUT_S)
        newcomers = change.joining - change.gone
        self._cluster.withdraw(newcomers, blameless=_others_were_lost(event))

    # ---- commit and release -----------------------------------------------------------------

    def _commit(self, change: Change, event: MembershipEvent) -> None:
        cluster = self._cluster
        self._enter("commit", cluster.config.cluster.commit_timeout)
        if cluster.operation and cluster.head.saves:
            cluster.head.save_operation(cluster.operation.record(), urgent=True)
        self._cluster.tell(change.everyone, msg.Commit(change.epoch))

    def _stop(self, change: Change, event: MembershipEvent) -> None:
        """The new epoch is current; leavers exit once nobody reads their KV."""
        cluster = self._cluster
        cluster.placement, cluster.planned = cluster.planned, None
        self._reconciler.change_availability(AvailabilityEvent(AvailabilityKind.SWITCHED))
        running = cluster.operation
        desired = cluster.restart_policy.desired
        if running and not running.automatic:
            desired = running.after
        entered: dict[str, object] = {
            "epoch": change.epoch,
            "ranks": sorted(cluster.members),
            "desired": sorted(desired),
        }
        cluster.notices.publish("epoch", entered)
        self._enter("release", _RELEASE_TIMEOUT_S)
        read = set(filter(cluster.migrations.reads, change.leaving))
        cluster.tell(change.leaving - read, msg.Stop())

    def _kill_silent(self, change: Change, event: MembershipEvent) -> None:
        phase = self._cluster.membership.phase.value
        self._enter(phase, _RELEASE_TIMEOUT_S)
        silent = change.everyone - change.reported - change.gone
        self._cluster.watch.terminate(silent, f"did not report in {phase}")

    def _kill_leavers(self, change: Change, event: MembershipEvent) -> None:
        self._enter("release", _RELEASE_TIMEOUT_S)
        self._cluster.kill(change.exiting - change.gone)

    def _finish(self, change: Change, event: MembershipEvent) -> None:
        cluster = self._cluster
        self._clock.stop()
        cluster.migrations.clear()
        operation, cluster.operation, cluster.planned = cluster.operation, None, None
        if operation is not None:
            if operation.purpose is Purpose.RELOAD:
                failed = change.cancelled or change.error is not None
                self._reconciler.reloaded(failed=failed)
            self._end(operation, change)
        cluster.events.post(ActivityEvent(ActivityKind.OVER))

    def _end(self, operation: Operation, change: Change) -> None:
        cluster = self._cluster
        if change.cancelled:
            operation.end("cancelled")
        elif change.error is not None:
            operation.end("failed", change.error)
        else:
            operation.end("done")
            cluster.head.impair(CHANGES, None)  # if they were, they work again
            if not operation.automatic:
                cluster.restart_policy.set_desired(operation.after)
        cluster.notices.operation(operation)

    # ---- a loss -----------------------------------------------------------------------------

    def _abandon(self, recovery: Change, event: MembershipEvent) -> None:
        """What ran is over; an operation of its own takes the survivors into the next epoch."""
        cluster, running = self._cluster, self._cluster.operation
        before = running.before if running else cluster.members
        if running:
            if not running.automatic and recovery.kept:
                cluster.restart_policy.set_desired(running.after)
            running.end("failed", recovery.cause)
            cluster.notices.operation(running)
        cluster.withdraw(recovery.doomed, blameless=_others_were_lost(event))
        cluster.planned = cluster.expert_recovery.after_loss(
            cluster.placement,
            recovery.after,
            cluster.memory_budget.fits,
            machines=cluster.machines(recovery.after),
        )
        reason = recovery.cause or "a rank was lost"
        operation = Operation(before, recovery.after, recovery.epoch, reason, Purpose.RECOVERY)
        operation.state = "committing"
        if cluster.planned:
            operation.moved_experts = moved_experts(cluster.placement, cluster.planned)
        self._operations.register(operation)
        cluster.events.post(ActivityEvent(ActivityKind.LOSS))

    def _halt(self, change: Change, event: MembershipEvent) -> None:
        self._cluster.migrations.clear()
        self._cluster.tell(change.before, msg.Halt(change.epoch))
        self._clock.expect_halted(change)

    def _kill_not_halted(self, change: Change, event: MembershipEvent) -> None:
        limit_s = self._cluster.config.cluster.stall_timeout
        stalled = change.before - change.gone - change.halted
        self._cluster.watch.terminate(
            stalled, f"did not hear within {limit_s:g} s that others were lost"
        )

    def _hold(self, change: Change, event: MembershipEvent) -> None:
        """The survivors wait, halted but with all they hold, until there are ranks for the rest."""
        cluster = self._cluster
        if cluster.placement:
            cluster.placement = keep(cluster.placement, change.after)
        for rank in change.after & set(cluster.ranks):
            cluster.ranks[rank].state = "ready"
        short = AvailabilityEvent(AvailabilityKind.SHORT, change.error or "")
        self._reconciler.change_availability(short)
        self._enter("release", _RELEASE_TIMEOUT_S)
        cluster.kill(change.leaving)  # no epoch comes in which they could hand over what they run
        cluster.tell(change.after, msg.Hold(sorted(change.after)))

    def _alarm(self, change: Change, event: MembershipEvent) -> None:
        """Nobody can go on."""
        self._clock.stop()
        self._cluster.migrations.clear()
        self._cluster.events.post(
            ActivityEvent(
                ActivityKind.ALL_LOST,
                reason=change.error or "a rank was lost",
                blameless=_others_were_lost(event),
            )
        )

    def _reset(self, change: Change, event: MembershipEvent) -> None:
        self._cluster.placement = self._cluster.planned = None
        self._cluster.events.post(ActivityEvent(ActivityKind.OVER))

    def _enter(self, phase: str, timeout_s: float) -> None:
        running = self._cluster.operation
        if running:
            running.enter(phase)
            if phase == "commit":
                running.state = "committing"
        self._clock.start(timeout_s)


def _others_were_lost(event: MembershipEvent) -> bool:
    losses = (EventKind.DISCONNECTED, EventKind.EXITED, EventKind.BROKEN, EventKind.RESUMED)
    return event.kind in losses
