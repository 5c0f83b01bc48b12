"""Carries out what the head begins next (`reconciliation.ACTIVITY_RULES`) and what becomes of
requests meanwhile (`availability.AVAILABILITY_RULES`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexpert.cluster.availability import (
    AvailabilityAction,
    AvailabilityEvent,
    AvailabilityKind,
)
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.interfaces import Timer
from flexpert.cluster.membership import EventKind, MembershipEvent
from flexpert.cluster.operation import Operation
from flexpert.cluster.operations import Operations
from flexpert.cluster.phase_clock import PhaseClock
from flexpert.cluster.reconciliation import (
    ActivityAction,
    ActivityEvent,
    ActivityKind,
    Facts,
)
from flexpert.cluster.saved_state import Purpose
from flexpert.errors import OperationRefused
from flexpert.moe.placement import Placement

_HOSTS_JOIN = "hosts may join (flexpert join)"


@dataclass(slots=True)
class ReloadTries:
    """How often in a row loading lost experts has failed, and when it may be tried again (seconds,
    of the head's clock)."""

    failed: int = 0
    not_before: float = 0.0


class Reconciler:
    """One method for each of `ActivityAction`; availability changes by `change_availability`."""

    def __init__(self, cluster: ClusterState, operations: Operations, clock: PhaseClock) -> None:
        self._cluster = cluster
        self._operations = operations
        self._clock = clock
        self._timer: Timer | None = None
        self._reloads = ReloadTries()
        self._steps: Mapping[ActivityAction, Callable[[ActivityEvent], None]] = {
            ActivityAction.LAUNCH: self._launch,
            ActivityAction.QUEUE: self._queue,
            ActivityAction.WITHDRAW: self._withdraw,
            ActivityAction.DROP_QUEUED: self._drop_queued,
            ActivityAction.DECIDE: self._decide,
            ActivityAction.LOAD_EXPERTS: self._load_experts,
            ActivityAction.MOVE_EXPERTS: self._launch,
            ActivityAction.START_QUEUED: self._start_queued,
            ActivityAction.REPORT_LEFT_OUT: self._report_left_out,
            ActivityAction.SCHEDULE: self._schedule,
            ActivityAction.SCHEDULE_ALL: self._schedule_all,
            ActivityAction.RESTART: self._restart,
            ActivityAction.GIVE_UP: self._give_up,
            ActivityAction.FAIL_OPERATIONS: self._fail_operations,
            ActivityAction.REPORT_LOSS: self._report_loss,
        }

    def carry_out(self, actions: tuple[ActivityAction, ...], event: ActivityEvent) -> None:
        """In this order. event: what they answer."""
        for action in actions:
            self._steps[action](event)

    def close(self) -> None:
        self._stop_timer()

    def reloaded(self, *, failed: bool) -> None:
        """Loading lost experts is over; if it failed, the next try waits longer each time."""
        if failed:
            cluster, tries = self._cluster.config.cluster, self._reloads
            wait_s = min(cluster.restart_backoff * 2**tries.failed, cluster.restart_backoff_max)
            tries.failed += 1
            tries.not_before = self._cluster.head.now() + wait_s

    # ---- a requested change -----------------------------------------------------------------

    def _launch(self, event: ActivityEvent) -> None:
        assert event.operation is not None
        assert event.placement is not None
        self._operations.launch(event.operation, event.placement)

    def _queue(self, event: ActivityEvent) -> None:
        assert event.operation is not None
        assert event.request is not None
        self._cluster.queued = event.operation, event.request

    def _withdraw(self, event: ActivityEvent) -> None:
        """Of use until it commits: then the table of the change has no rule for it."""
        self._cluster.events.post(MembershipEvent(EventKind.CANCEL, reason=event.reason))

    def _drop_queued(self, event: ActivityEvent) -> None:
        cluster = self._cluster
        if cluster.queued:
            (operation, _), cluster.queued = cluster.queued, None
            operation.end("cancelled")
            cluster.notices.operation(operation)

    def _start_queued(self, event: ActivityEvent) -> None:
        if not self._operations.start_queued():
            self._cluster.events.post(ActivityEvent(ActivityKind.OVER))

    # ---- what is next? ----------------------------------------------------------------------

    def _decide(self, event: ActivityEvent) -> None:
        cluster = self._cluster
        # whoever came while a change had nobody to give him to, as when its only newcomer had died
        cluster.head.admit_waiting()
        reload = self._reloadable()
        now = cluster.head.now()
        wait_s = cluster.restart_policy.next_s(cluster.members, now)
        if self._reloads.failed:
            again_s = max(0.0, self._reloads.not_before - now)
            wait_s = again_s if wait_s is None else min(wait_s, again_s)
        facts = Facts(
            reload=reload,
            queued=cluster.queued is not None,
            wait_s=wait_s,
            down=cluster.availability.down is not None,
            why="no rank is started again by itself",
        )
        cluster.events.post(ActivityEvent(ActivityKind.NEXT, facts=facts))

    def _reloadable(self) -> Placement | None:
        """With which placement the members can load the experts that nobody holds, if now."""
        cluster = self._cluster
        serves = cluster.members and not cluster.availability.down
        missing = cluster.placement.missing() if cluster.placement and serves else []
        if not missing:
            self._reloads.failed = 0
            return None
        if self._reloads.failed and cluster.head.now() < self._reloads.not_before:
            return None
        placement = cluster.expert_recovery.whole(
            cluster.placement, cluster.members, cluster.memory_budget.fits
        )
        if placement is None:
            self._reloads.failed = 0  # time changes nothing about it, only more ranks do
            cluster.notices.warn_once(
                f"ranks {sorted(cluster.members)} have no memory for {len(missing)} experts that "
                "were lost (memory_per_rank); answers are degraded until more ranks are up"
            )
        return placement

    def _load_experts(self, event: ActivityEvent) -> None:
        cluster, placement = self._cluster, event.facts.reload
        assert cluster.placement is not None
        assert placement is not None
        members, missing = cluster.members, cluster.placement.missing()
        reason = f"loads {len(missing)} experts that were lost"
        epoch = cluster.membership.epoch
        operation = Operation(members, members, epoch, reason, Purpose.RELOAD)
        self._operations.launch(operation, placement)

    # ---- restarts ---------------------------------------------------------------------------

    def _report_left_out(self, event: ActivityEvent) -> None:
        self._stop_timer()
        self._cluster.notices.left_out(self._cluster.restart_policy.left_out)

    def _schedule(self, event: ActivityEvent) -> None:
        assert event.facts.wait_s is not None
        self._timer = self._clock.later(event.facts.wait_s, self._due)

    def _schedule_all(self, event: ActivityEvent) -> None:
        """All of them together may have the memory."""
        self._timer = self._clock.later(event.facts.later_s, self._due)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _due(self) -> None:
        cluster = self._cluster
        policy, members, now = cluster.restart_policy, cluster.members, cluster.head.now()
        due = policy.due(members, now) - set(cluster.ranks)
        everybody = sorted(members | due)
        facts = Facts(
            due=due,
            fits=not due or cluster.memory_budget.fits(cluster.plan(everybody)),
            later=due < policy.missing(members),
            later_s=policy.all_s(members, now),
            down=cluster.availability.down is not None,
            why=f"ranks {everybody} together could not hold all experts, either",
        )
        cluster.events.post(ActivityEvent(ActivityKind.DUE, facts=facts))

    def _restart(self, event: ActivityEvent) -> None:
        cluster, due = self._cluster, event.facts.due
        names = ", ".join(map(str, sorted(due)))
        members, target = cluster.members, cluster.members | due
        operation = Operation(
            members, target, cluster.membership.epoch, f"replaces rank {names}", Purpose.RESTART
        )
        try:
            placement = self._operations.prepare(operation, target)
            assert placement is not None  # somebody joins
        except OperationRefused as error:
            cluster.notices.warn(f"rank {names} cannot be replaced: {error}")
            for rank in due:
                cluster.restart_policy.exited(rank, 1, cluster.head.now())
            cluster.events.post(ActivityEvent(ActivityKind.OVER))
            return
        self._operations.launch(operation, placement)

    def _give_up(self, event: ActivityEvent) -> None:
        """Nothing that begins by itself will end the waiting."""
        joinable = self._joinable and not self._cluster.restart_policy.left_out
        why = f"{event.facts.why}: {_HOSTS_JOIN}" if joinable else event.facts.why
        self.change_availability(
            AvailabilityEvent(AvailabilityKind.HOPELESS, why, joinable=joinable)
        )

    def wait_for_hosts(self) -> None:
        """There are no ranks to begin with."""
        nobody = f"no rank is up: {_HOSTS_JOIN}"
        self.change_availability(
            AvailabilityEvent(AvailabilityKind.HOPELESS, nobody, joinable=self._joinable)
        )

    @property
    def _joinable(self) -> bool:
        return self._cluster.config.cluster.join_listen is not None

    # ---- nobody is left ---------------------------------------------------------------------

    def _fail_operations(self, event: ActivityEvent) -> None:
        cluster = self._cluster
        running, cluster.operation = cluster.operation, None
        waiting, cluster.queued = cluster.queued, None
        for operation in (running, waiting[0] if waiting else None):
            if operation:
                operation.end("failed", event.reason)
                cluster.notices.operation(operation)

    def _report_loss(self, event: ActivityEvent) -> None:
        self.change_availability(
            AvailabilityEvent(
                AvailabilityKind.ALL_LOST,
                event.reason,
                restartable=bool(self._cluster.restart_policy.desired),
                joinable=self._joinable,
                blameless=event.blameless,
            )
        )

    # ---- availability -----------------------------------------------------------------------

    def change_availability(self, event: AvailabilityEvent) -> None:
        """Look the rule up and carry it out, at once: nothing that follows from it is an event."""
        cluster = self._cluster
        before = cluster.availability.down
        for action in cluster.availability.handle(event):
            match action:
                case AvailabilityAction.ADMIT:
                    cluster.head.admit_waiting()
                case AvailabilityAction.WARN_HELD:
                    cluster.notices.warn(f"{event.reason}; requests wait until more ranks are up")
                case AvailabilityAction.TERMINATE_ALL:
                    cluster.notices.warn(
                        f"{event.reason}; nobody can go on: requests wait until ranks are up again"
                    )
                    cluster.withdraw(list(cluster.ranks), blameless=event.blameless)
                case AvailabilityAction.ASK_FOR_HOSTS:
                    cluster.notices.warn(f"{event.reason}; requests wait until one has")
                case AvailabilityAction.ASK_FOR_RANKS:
                    self._ask_for_ranks(event.reason)
                case AvailabilityAction.STOP_SERVICE:
                    hopeless = event.kind is AvailabilityKind.HOPELESS
                    why = f"{before}; {event.reason}" if hopeless else event.reason
                    cluster.head.service_lost(why)

    def _ask_for_ranks(self, why: str) -> None:
        availability = self._cluster.availability
        if availability.down and why not in availability.down:
            availability.down += f"; {why}: scale up"
            self._cluster.notices.warn(availability.down)
