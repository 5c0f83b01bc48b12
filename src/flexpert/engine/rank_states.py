"""The states of one rank: where it stands in the exchange, and how far its next epoch is (pure).

Theory of operation. A rank has two states at a time. `ExchangeState` says whether it takes part in
the steps of its group, `PlanState` how far the plan of the next epoch has come. `RULES` is the
whole behaviour: for an event, each of the two tables is searched for the first rule whose state,
event and guard fit; both searches see the states as they were before the event, the actions of the
plan come before those of the exchange, and an event without a rule changes nothing. `RankEngine`
brings the events, all in the thread of its step loop, and carries the actions out.

    plan       NONE → PREPARING → PREPARED → ARMED → NONE
    exchange   OUTSIDE → ENTERING → MEMBER → ENTERING → … → LEFT, or → HALTED → ENTERING

A member that is told to commit is ARMED and says so in its votes; in the first vote in which all
members are, all of them change epochs. A rank outside of the exchange has nobody to agree with and
enters at once. From then on until its first vote is whole it is ENTERING. A halt or a broken
exchange ends the membership without an agreement: the rank waits for the next epoch, HALTED. Only a
halt also drops the plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar


class ExchangeState(Enum):
    """Where a rank stands in the exchange of its group."""

    OUTSIDE = "outside"  # a newcomer
    ENTERING = "entering"  # in a new epoch, whose first vote is not whole yet
    MEMBER = "member"
    HALTED = "halted"  # its epoch is broken
    LEFT = "left"


class PlanState(Enum):
    """How far the plan for the next epoch has come."""

    NONE = "none"
    PREPARING = "preparing"
    PREPARED = "prepared"
    ARMED = "armed"  # it votes for the epoch


class RankEventKind(Enum):
    """What can happen to a rank."""

    # commands
    PREPARE = "prepare"
    OFFER = "offer"
    FETCH = "fetch"
    COMMIT = "commit"
    CANCEL = "cancel"
    HALT = "halt"
    # of its preparation
    LOADED = "loaded"
    NOT_LOADED = "not loaded"
    # of its exchanges
    VOTED = "voted"  # a vote is whole
    AGREED = "agreed"  # and in it all members are armed for the plan
    INTERRUPTED = "interrupted"  # by a halt that is still to come
    BROKEN = "broken"  # peers do not answer


class RankAction(Enum):
    """What the engine must carry out."""

    WITHDRAW = "drop the plan"
    PREPARE = "prepare in a thread"
    REPORT_PREPARED = "report prepared"
    UNDO = "undo, report failed"
    OFFER = "offer KV"
    FETCH = "fetch KV"
    REFUSE = "report not prepared"
    ARM = "be ready to vote"
    ENTER = "enter the epoch"
    HAND_OVER = "hand sequences over"
    REPORT_SWITCHED = "report switched"
    PAUSE = "note since when nothing is served"
    REPORT_BROKEN = "report broken"


@dataclass(frozen=True, slots=True)
class RankEvent:
    """epoch: of a command that names one. stays: with PREPARE, whether this rank is in the plan."""

    kind: RankEventKind
    epoch: int = 0
    stays: bool = True


@dataclass(slots=True)
class RankBooks:
    """What guards look at. epoch: of the latest plan. stays: whether this rank is in it."""

    exchange: ExchangeState = ExchangeState.OUTSIDE
    plan: PlanState = PlanState.NONE
    epoch: int = 0
    stays: bool = False

    @property
    def takes_part(self) -> bool:
        """Whether peers wait for this rank in votes and steps."""
        return self.exchange in (ExchangeState.ENTERING, ExchangeState.MEMBER)


Guard = Callable[[RankBooks, RankEvent], bool]


def _always(books: RankBooks, event: RankEvent) -> bool:
    return True


def _this_plan(books: RankBooks, event: RankEvent) -> bool:
    return event.epoch == books.epoch


def _this_plan_takes_part(books: RankBooks, event: RankEvent) -> bool:
    return _this_plan(books, event) and books.takes_part


def _committed(books: RankBooks, event: RankEvent) -> bool:
    ready = books.plan in (PlanState.PREPARED, PlanState.ARMED)
    return ready and _this_plan(books, event)


def _committed_stays(books: RankBooks, event: RankEvent) -> bool:
    return _committed(books, event) and books.stays


def _stays(books: RankBooks, event: RankEvent) -> bool:
    return books.stays


S = TypeVar("S", ExchangeState, PlanState)


@dataclass(frozen=True, slots=True)
class RankRule(Generic[S]):
    """In `state`, on `event`, if `when` holds: `do`, and go to `then`."""

    state: S
    event: RankEventKind
    then: S
    do: tuple[RankAction, ...] = ()
    when: Guard = _always


E, P, K, Do = ExchangeState, PlanState, RankEventKind, RankAction

PLAN_RULES: tuple[RankRule[PlanState], ...] = (
    # a new plan takes the place of whatever was prepared
    *(
        RankRule(state, K.PREPARE, P.PREPARING, (Do.WITHDRAW, Do.PREPARE))
        for state in (P.NONE, P.PREPARING, P.PREPARED, P.ARMED)
    ),
    RankRule(P.PREPARING, K.LOADED, P.PREPARED, (Do.REPORT_PREPARED,)),
    RankRule(P.PREPARING, K.NOT_LOADED, P.NONE, (Do.UNDO,)),
    # KV that moves ahead of the epoch; once the plan is withdrawn nobody needs it
    *(
        RankRule(state, kind, state, (do,), _this_plan)
        for state in (P.PREPARED, P.ARMED)
        for kind, do in ((K.OFFER, Do.OFFER), (K.FETCH, Do.FETCH))
    ),
    *(
        rule
        for state in (P.PREPARED, P.ARMED)
        for rule in (
            RankRule(state, K.COMMIT, P.ARMED, (Do.ARM,), _this_plan_takes_part),
            RankRule(state, K.COMMIT, P.NONE, (Do.ARM,), _this_plan),
        )
    ),
    *(
        RankRule(state, K.COMMIT, state, (Do.REFUSE,))
        for state in (P.NONE, P.PREPARING, P.PREPARED, P.ARMED)
    ),
    RankRule(P.ARMED, K.AGREED, P.NONE),
    # armed it is too late: the epoch may already be agreed
    *(
        RankRule(state, K.CANCEL, P.NONE, (Do.WITHDRAW,))
        for state in (P.NONE, P.PREPARING, P.PREPARED)
    ),
    *(
        RankRule(state, K.HALT, P.NONE, (Do.WITHDRAW,))
        for state in (P.NONE, P.PREPARING, P.PREPARED, P.ARMED)
    ),
)

EXCHANGE_RULES: tuple[RankRule[ExchangeState], ...] = (
    # who takes no part in the exchange has nobody to agree with
    *(
        rule
        for state in (E.OUTSIDE, E.HALTED, E.LEFT)
        for rule in (
            RankRule(state, K.COMMIT, E.ENTERING, (Do.ENTER,), _committed_stays),
            RankRule(state, K.COMMIT, E.LEFT, (Do.HAND_OVER,), _committed),
        )
    ),
    RankRule(E.ENTERING, K.VOTED, E.MEMBER, (Do.REPORT_SWITCHED,)),
    RankRule(E.MEMBER, K.AGREED, E.ENTERING, (Do.ENTER,), _stays),
    RankRule(E.MEMBER, K.AGREED, E.LEFT, (Do.HAND_OVER,)),
    *(
        RankRule(state, kind, E.HALTED, do)
        for state in (E.ENTERING, E.MEMBER)
        for kind, do in (
            (K.HALT, (Do.PAUSE,)),
            (K.INTERRUPTED, (Do.PAUSE,)),
            (K.BROKEN, (Do.PAUSE, Do.REPORT_BROKEN)),
        )
    ),
)


def _by_state_and_event(
    rules: tuple[RankRule[S], ...],
) -> dict[tuple[S, RankEventKind], list[RankRule[S]]]:
    found: dict[tuple[S, RankEventKind], list[RankRule[S]]] = defaultdict(list)
    for rule in rules:
        found[rule.state, rule.event].append(rule)
    return dict(found)


_PLAN, _EXCHANGE = _by_state_and_event(PLAN_RULES), _by_state_and_event(EXCHANGE_RULES)


class RankStates:
    """The two states of a rank, moved by `handle` alone."""

    def __init__(self) -> None:
        self._books = RankBooks()

    @property
    def exchange(self) -> ExchangeState:
        return self._books.exchange

    @property
    def plan(self) -> PlanState:
        return self._books.plan

    @property
    def takes_part(self) -> bool:
        """Whether peers wait for this rank in votes and steps."""
        return self._books.takes_part

    @property
    def armed_for(self) -> int:
        """The epoch this rank votes for; 0: none."""
        return self._books.epoch if self._books.plan is PlanState.ARMED else 0

    def handle(self, event: RankEvent) -> tuple[RankAction, ...]:
        """Change the states by an event and return what must be done, in order."""
        books = self._books
        if event.kind is RankEventKind.PREPARE:
            books.epoch, books.stays = event.epoch, event.stays
        plan = _first(_PLAN.get((books.plan, event.kind), ()), books, event)
        exchange = _first(_EXCHANGE.get((books.exchange, event.kind), ()), books, event)
        actions: tuple[RankAction, ...] = ()
        if plan is not None:
            books.plan, actions = plan.then, plan.do
        if exchange is not None:
            books.exchange, actions = exchange.then, actions + exchange.do
        return actions


def _first(
    rules: list[RankRule[S]] | tuple[()], books: RankBooks, event: RankEvent
) -> RankRule[S] | None:
    for rule in rules:
        if rule.when(books, event):
            return rule
    return None


def diagram() -> str:
    """Both tables as one Mermaid state diagram with two parallel regions."""
    return "\n".join(
        [
            "stateDiagram-v2",
            "    [*] --> rank",
            "    state rank {",
            *_region(E.OUTSIDE, EXCHANGE_RULES),
            "        --",
            *_region(P.NONE, PLAN_RULES),
            "    }",
        ]
    )


def _region(start: S, rules: tuple[RankRule[S], ...]) -> Iterator[str]:
    yield f"        [*] --> {start.value}"
    for rule in rules:
        guard = "" if rule.when is _always else f" [{rule.when.__name__.strip('_')}]"
        do = f" / {', '.join(action.value for action in rule.do)}" if rule.do else ""
        label = f"{rule.event.value}{guard}{do}".replace("_", " ")
        yield f"        {rule.state.value} --> {rule.then.value}: {label}"
