"""What the head begins next, by itself or because somebody asked (pure).

The table is `ACTIVITY_RULES`. One change of the ranks runs at a time. When it is over the machine
decides: lost experts are loaded first, then a request that was queued begins, then lost ranks are
restarted when they are due. A change that somebody asks for goes before one that the head has
begun: a restart is withdrawn if it can be, and the requested change begins after it. Experts move
to even the load only while there is nothing else to do, and make way for everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.rule_table import Rule, RuleTable
from flexpert.cluster.saved_state import Purpose
from flexpert.moe.placement import Placement


class Activity(Enum):
    """What the head is about."""

    IDLE = "idle"
    SCHEDULED = "scheduled"  # a restart, or another try to load experts, comes later
    REQUESTED = "requested"  # a change that somebody asked for runs
    RECOVERING = "recovering"  # the survivors of a loss enter an epoch of their own
    RESTARTING = "restarting"  # lost ranks join again
    RELOADING = "reloading"  # experts that nobody holds are loaded
    REBALANCING = "rebalancing"  # experts move between the same ranks
    YIELDING = "yielding"  # a change that the head began runs, and a requested one is queued
    DECIDING = "deciding"  # nothing runs; what is next is being looked at
    CLOSED = "closed"  # the service stops, nothing begins any more


class ActivityKind(Enum):
    """What can happen."""

    REQUEST = "request"
    CANCEL_QUEUED = "cancel queued"
    REBALANCE = "rebalance"  # moving experts is worth it, or was asked for
    LOSS = "loss"
    OVER = "over"  # no change runs any more, or none could begin
    NEXT = "next"  # the facts for a decision are there
    DUE = "due"  # what was scheduled
    ALL_LOST = "all lost"
    CLOSE = "close"


class ActivityAction(Enum):
    """What the coordinator must carry out."""

    LAUNCH = "begin the requested change"
    QUEUE = "queue the requested change"
    WITHDRAW = "withdraw the running change"
    DROP_QUEUED = "end the queued change"
    DECIDE = "find out what is next"
    LOAD_EXPERTS = "begin to load lost experts"
    MOVE_EXPERTS = "begin to move experts"
    START_QUEUED = "begin the queued change"
    REPORT_LEFT_OUT = "report who is left out"
    SCHEDULE = "set the timer"
    SCHEDULE_ALL = "set the timer for all"
    RESTART = "begin to restart ranks"
    GIVE_UP = "report that nothing will follow"
    FAIL_OPERATIONS = "end all operations"
    REPORT_LOSS = "report that nobody is left"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a decision depends on.

    reload: the placement with which experts that nobody holds can be loaded now. queued: a
    requested change waits. wait_s: until something is due, None: nothing is. down: requests wait.
    due: ranks to restart now. fits: they and the members have the memory for all experts.
    later: others follow. later_s: until all are due. why: nothing will follow.
    """

    reload: Placement | None = None
    queued: bool = False
    wait_s: float | None = None
    down: bool = False
    due: frozenset[int] = frozenset()
    fits: bool = True
    later: bool = False
    later_s: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class ActivityEvent:
    """operation, placement: of REQUEST and REBALANCE. request: of REQUEST. facts: of NEXT and DUE.
    purpose: of the running change, of CANCEL_QUEUED. reason: for people. blameless: ranks that are
    left when all are lost have done nothing wrong."""

    kind: ActivityKind
    operation: Operation | None = None
    request: TargetRequest | None = None
    placement: Placement | None = None
    facts: Facts = Facts()
    purpose: Purpose | None = None
    reason: str = ""
    blameless: bool = False


def _experts_can_be_loaded(event: ActivityEvent) -> bool:
    return event.facts.reload is not None


def _request_is_queued(event: ActivityEvent) -> bool:
    return event.facts.queued


def _something_is_due_later(event: ActivityEvent) -> bool:
    return event.facts.wait_s is not None


def _down(event: ActivityEvent) -> bool:
    return event.facts.down


def _nobody_is_due(event: ActivityEvent) -> bool:
    return not event.facts.due


def _too_few_and_more_follow(event: ActivityEvent) -> bool:
    return not event.facts.fits and event.facts.later


def _too_few_and_down(event: ActivityEvent) -> bool:
    return not event.facts.fits and event.facts.down


def _recovery_runs(event: ActivityEvent) -> bool:
    return event.purpose is Purpose.RECOVERY


def _restart_runs(event: ActivityEvent) -> bool:
    return event.purpose is Purpose.RESTART


def _rebalance_runs(event: ActivityEvent) -> bool:
    return event.purpose is Purpose.REBALANCE


S, K, D = Activity, ActivityKind, ActivityAction

_WITHOUT_QUEUE = (
    S.IDLE,
    S.SCHEDULED,
    S.REQUESTED,
    S.RECOVERING,
    S.RESTARTING,
    S.RELOADING,
    S.REBALANCING,
)
_OPEN = (*_WITHOUT_QUEUE, S.YIELDING)

ACTIVITY_RULES = RuleTable[Activity, ActivityKind, ActivityAction](
    (
        # somebody asks for a change
        Rule(S.IDLE, K.REQUEST, S.REQUESTED, (D.LAUNCH,)),
        Rule(S.SCHEDULED, K.REQUEST, S.REQUESTED, (D.LAUNCH,)),
        Rule(S.RECOVERING, K.REQUEST, S.YIELDING, (D.QUEUE,)),
        Rule(S.RELOADING, K.REQUEST, S.YIELDING, (D.QUEUE,)),
        Rule(S.RESTARTING, K.REQUEST, S.YIELDING, (D.QUEUE, D.WITHDRAW)),
        Rule(S.REBALANCING, K.REQUEST, S.YIELDING, (D.QUEUE, D.WITHDRAW)),
        Rule(S.YIELDING, K.CANCEL_QUEUED, S.RECOVERING, (D.DROP_QUEUED,), _recovery_runs),
        Rule(S.YIELDING, K.CANCEL_QUEUED, S.RESTARTING, (D.DROP_QUEUED,), _restart_runs),
        Rule(S.YIELDING, K.CANCEL_QUEUED, S.REBALANCING, (D.DROP_QUEUED,), _rebalance_runs),
        Rule(S.YIELDING, K.CANCEL_QUEUED, S.RELOADING, (D.DROP_QUEUED,)),
        # experts move when there is nothing else to do
        Rule(S.IDLE, K.REBALANCE, S.REBALANCING, (D.MOVE_EXPERTS,)),
        # the survivors of a loss go on: that takes the place of whatever ran
        Rule(S.YIELDING, K.LOSS, S.YIELDING),
        *(Rule(state, K.LOSS, S.RECOVERING) for state in _WITHOUT_QUEUE),
        # nothing runs any more: what is next?
        *(Rule(state, K.OVER, S.DECIDING, (D.DECIDE,)) for state in _OPEN),
        Rule(S.DECIDING, K.NEXT, S.RELOADING, (D.LOAD_EXPERTS,), _experts_can_be_loaded),
        Rule(S.DECIDING, K.NEXT, S.REQUESTED, (D.START_QUEUED,), _request_is_queued),
        Rule(
            S.DECIDING,
            K.NEXT,
            S.SCHEDULED,
            (D.REPORT_LEFT_OUT, D.SCHEDULE),
            _something_is_due_later,
        ),
        Rule(S.DECIDING, K.NEXT, S.IDLE, (D.REPORT_LEFT_OUT, D.GIVE_UP), _down),
        Rule(S.DECIDING, K.NEXT, S.IDLE, (D.REPORT_LEFT_OUT,)),
        # the timer
        Rule(S.SCHEDULED, K.DUE, S.DECIDING, (D.DECIDE,), _nobody_is_due),
        Rule(S.SCHEDULED, K.DUE, S.SCHEDULED, (D.SCHEDULE_ALL,), _too_few_and_more_follow),
        Rule(S.SCHEDULED, K.DUE, S.IDLE, (D.GIVE_UP,), _too_few_and_down),
        Rule(S.SCHEDULED, K.DUE, S.RESTARTING, (D.RESTART,)),
        # ends
        *(Rule(state, K.ALL_LOST, S.IDLE, (D.FAIL_OPERATIONS, D.REPORT_LOSS)) for state in _OPEN),
        Rule(S.CLOSED, K.ALL_LOST, S.CLOSED, (D.FAIL_OPERATIONS, D.REPORT_LOSS)),
        *(Rule(state, K.CLOSE, S.CLOSED) for state in (*_OPEN, S.DECIDING)),
    )
)


class Reconciliation:
    """state: by `ACTIVITY_RULES`."""

    def __init__(self) -> None:
        self.state = Activity.IDLE

    def handle(self, event: ActivityEvent) -> tuple[ActivityAction, ...]:
        """What must be done, in order."""
        rule = ACTIVITY_RULES.find(self.state, event.kind, event)
        if rule is None:
            return ()
        self.state = rule.then
        return rule.do


def activity_diagram() -> str:
    """The table as a Mermaid state diagram."""
    return ACTIVITY_RULES.diagram(Activity.IDLE)
