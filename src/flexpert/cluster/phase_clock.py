"""Deadlines of the phases of a change, on the head's clock."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.interfaces import Timer
from flexpert.cluster.membership import Change, EventKind, MembershipEvent

log = logging.getLogger("flexpert")

CHANGES = "changes of the ranks"  # the part of the service that this is


class PhaseClock:
    """A deadline that passes is an event; one that passed while the head itself was held up begins
    anew, because reports may lie there unread."""

    def __init__(self, cluster: ClusterState) -> None:
        self._cluster = cluster
        self._deadline: Timer | None = None

    def start(self, timeout_s: float) -> None:
        """Of the phase that has begun; the one before has none any more."""
        self.stop()
        due = self._cluster.head.now() + timeout_s
        self._deadline = self.later(timeout_s, lambda: self._due(due))

    def stop(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def expect_halted(self, change: Change) -> None:
        """The survivors acknowledge the halt within the stall timeout."""
        limit_s = self._cluster.config.cluster.stall_timeout
        due = self._cluster.head.now() + limit_s
        self.later(limit_s, lambda: self._halt_due(change, due))

    def expire(self) -> None:
        """The deadline of the phase has passed."""
        change, phase = self._cluster.membership.change, self._cluster.membership.phase
        waited = sorted(change.everyone - change.reported - change.gone) if change else []
        reason = f"deadline passed in {phase.value}, missing ranks {waited}"
        self._cluster.events.post(MembershipEvent(EventKind.DEADLINE, reason=reason))

    def later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        """Nobody waits for a timer: what it raises is logged, and the service says so."""
        head = self._cluster.head

        def run() -> None:
            try:
                action()
            except Exception as error:
                log.exception("what was due in a change of the ranks could not be done")
                head.impair(CHANGES, f"what was due could not be done: {error!r}")

        return head.call_later(delay_s, run)

    def _due(self, due: float) -> None:
        if self._cluster.watch.late(due):
            self.start(self._cluster.config.cluster.stall_timeout)
        else:
            self.expire()

    def _halt_due(self, change: Change, due: float) -> None:
        if change is not self._cluster.membership.change:
            return  # another halt came, with a limit of its own
        if self._cluster.watch.late(due):
            self.expect_halted(change)
        else:
            event = MembershipEvent(EventKind.HALT_DEADLINE, epoch=change.epoch)
            self._cluster.events.post(event)
