"""Whether requests are answered now, and if not, whether they will be (pure).

The table is `AVAILABILITY_RULES`. Requests wait in the journal while ranks are held or lost; once
the service is stopped they fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from flexpert.cluster.rule_table import Rule, RuleTable


class Availability(Enum):
    """What the service does for requests."""

    STARTING = "starting"
    SERVING = "serving"
    HELD = "held"  # survivors wait, halted: they have no memory for all experts
    LOST = "lost"  # nobody is left; the ranks start again as at the beginning
    WAITING = "waiting"  # there is no rank, and none starts by itself: hosts may join
    STOPPED = "stopped"


class AvailabilityKind(Enum):
    """What can happen to it."""

    SWITCHED = "switched"  # an epoch is entered
    SHORT = "short"  # the survivors have no memory for all experts
    ALL_LOST = "all lost"
    HOPELESS = "hopeless"  # nothing that begins by itself will end the waiting
    CANNOT_SPAWN = "cannot spawn"  # there is nothing to start ranks with any more


class AvailabilityAction(Enum):
    """What the coordinator must carry out."""

    ADMIT = "admit waiting requests"
    WARN_HELD = "report that requests wait for ranks"
    TERMINATE_ALL = "terminate whoever is left"
    ASK_FOR_RANKS = "report that only scaling up helps"
    ASK_FOR_HOSTS = "report that requests wait for hosts that join"
    STOP_SERVICE = "stop the service"


@dataclass(frozen=True, slots=True)
class AvailabilityEvent:
    """reason: for people. restartable: somebody is desired, who can be started again.

    joinable: hosts may join, and bring ranks of their own. blameless: whoever is terminated
    because of it has done nothing wrong.
    """

    kind: AvailabilityKind
    reason: str = ""
    restartable: bool = True
    joinable: bool = False
    blameless: bool = False


def _ranks_may_come(event: AvailabilityEvent) -> bool:
    return event.restartable or event.joinable


def _joinable(event: AvailabilityEvent) -> bool:
    return event.joinable


A, K, D = Availability, AvailabilityKind, AvailabilityAction

_NOT_STOPPED = (A.STARTING, A.SERVING, A.HELD, A.LOST, A.WAITING)

AVAILABILITY_RULES = RuleTable[Availability, AvailabilityKind, AvailabilityAction](
    (
        *(Rule(state, K.SWITCHED, A.SERVING, (D.ADMIT,)) for state in _NOT_STOPPED),
        *(Rule(state, K.SHORT, A.HELD, (D.WARN_HELD,)) for state in _NOT_STOPPED),
        *(
            rule
            for state in _NOT_STOPPED
            for rule in (
                Rule(state, K.ALL_LOST, A.LOST, (D.TERMINATE_ALL,), _ranks_may_come),
                Rule(state, K.ALL_LOST, A.STOPPED, (D.STOP_SERVICE,)),
            )
        ),
        Rule(A.HELD, K.HOPELESS, A.HELD, (D.ASK_FOR_RANKS,)),
        *(
            Rule(state, K.HOPELESS, A.WAITING, (D.ASK_FOR_HOSTS,), _joinable)
            for state in (A.STARTING, A.LOST)
        ),
        Rule(A.LOST, K.HOPELESS, A.STOPPED, (D.STOP_SERVICE,)),
        *(Rule(state, K.CANNOT_SPAWN, A.STOPPED, (D.STOP_SERVICE,)) for state in _NOT_STOPPED),
    )
)


class ServiceAvailability:
    """state: by `AVAILABILITY_RULES`. down: why nothing is computed now, or None."""

    def __init__(self) -> None:
        self.state = Availability.STARTING
        self.down: str | None = None

    def handle(self, event: AvailabilityEvent) -> tuple[AvailabilityAction, ...]:
        """What must be done, in order."""
        rule = AVAILABILITY_RULES.find(self.state, event.kind, event)
        if rule is None:
            return ()
        self.state = rule.then
        if rule.then is Availability.SERVING:
            self.down = None
        elif rule.then is Availability.WAITING:
            self.down = f"{self.down}; {event.reason}" if self.down else event.reason
        elif rule.then in (Availability.HELD, Availability.LOST) and (
            event.kind is not AvailabilityKind.HOPELESS
        ):
            self.down = event.reason
        return rule.do


def availability_diagram() -> str:
    """The table as a Mermaid state diagram."""
    return AVAILABILITY_RULES.diagram(Availability.STARTING)
