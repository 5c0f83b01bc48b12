"""What the head begins next, what becomes of requests, and that events come in order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from flexpert.cluster.availability import (
    AVAILABILITY_RULES,
    Availability,
    AvailabilityAction,
    AvailabilityEvent,
    AvailabilityKind,
    ServiceAvailability,
)
from flexpert.cluster.event_queue import EventQueue
from flexpert.cluster.membership import RULES
from flexpert.cluster.reconciliation import (
    ACTIVITY_RULES,
    Activity,
    ActivityAction,
    ActivityEvent,
    ActivityKind,
    Facts,
    Reconciliation,
)
from flexpert.cluster.rule_table import Rule, always
from flexpert.cluster.saved_state import Purpose
from flexpert.moe.placement import replan

PLACEMENT = replan(None, {0}, experts=2, layers=1)


def after(*events: ActivityEvent | ActivityKind) -> tuple[Activity, tuple[ActivityAction, ...]]:
    machine, actions = Reconciliation(), ()
    for event in events:
        actions = machine.handle(
            event if isinstance(event, ActivityEvent) else ActivityEvent(event)
        )
    return machine.state, actions


def next_is(**facts: Any) -> Activity:
    event = ActivityEvent(ActivityKind.NEXT, facts=Facts(**facts))
    return after(ActivityKind.LOSS, ActivityKind.OVER, event)[0]


def test_lost_experts_come_before_a_request_and_that_before_a_restart() -> None:
    assert next_is(reload=PLACEMENT, queued=True, wait_s=0.0) is Activity.RELOADING
    assert next_is(queued=True, wait_s=0.0) is Activity.REQUESTED
    assert next_is(wait_s=0.0, down=True) is Activity.SCHEDULED
    assert next_is() is Activity.IDLE


def test_when_nothing_will_end_the_waiting_that_is_reported() -> None:
    event = ActivityEvent(ActivityKind.NEXT, facts=Facts(down=True))
    state, actions = after(ActivityKind.OVER, event)
    assert (state, actions[-1]) == (Activity.IDLE, ActivityAction.GIVE_UP)


def due(**facts: Any) -> tuple[ActivityEvent | ActivityKind, ...]:
    scheduled = ActivityEvent(ActivityKind.NEXT, facts=Facts(wait_s=0.0))
    event = ActivityEvent(ActivityKind.DUE, facts=Facts(**facts))
    return ActivityKind.OVER, scheduled, event


def test_ranks_that_are_due_are_restarted_if_all_that_come_have_the_memory() -> None:
    assert after(*due())[0] is Activity.DECIDING
    some = frozenset({1})
    assert after(*due(due=some))[0] is Activity.RESTARTING
    assert after(*due(due=some, fits=False, later=True))[0] is Activity.SCHEDULED
    assert after(*due(due=some, fits=False, down=True))[0] is Activity.IDLE


def test_a_restart_makes_way_for_a_request_and_a_recovery_is_waited_for() -> None:
    restart = due(due=frozenset({1}))
    state, actions = after(*restart, ActivityKind.REQUEST)
    assert (state, actions[-1]) == (Activity.YIELDING, ActivityAction.WITHDRAW)
    assert after(*restart, ActivityKind.REQUEST, ActivityKind.LOSS)[0] is Activity.YIELDING
    state, actions = after(ActivityKind.LOSS, ActivityKind.REQUEST)
    assert (state, actions) == (Activity.YIELDING, (ActivityAction.QUEUE,))


@pytest.mark.parametrize("purpose", [Purpose.RECOVERY, Purpose.RESTART, Purpose.RELOAD])
def test_without_the_queued_request_the_running_change_is_what_it_was(purpose: Purpose) -> None:
    cancel = ActivityEvent(ActivityKind.CANCEL_QUEUED, purpose=purpose)
    state, actions = after(ActivityKind.LOSS, ActivityKind.REQUEST, cancel)
    assert actions == (ActivityAction.DROP_QUEUED,)
    assert state.value.startswith(purpose.value[:6])


def test_a_service_that_stops_begins_nothing() -> None:
    assert after(ActivityKind.CLOSE, ActivityKind.OVER) == (Activity.CLOSED, ())


def test_held_or_lost_a_service_says_why_until_an_epoch_is_entered() -> None:
    service = ServiceAvailability()
    service.handle(AvailabilityEvent(AvailabilityKind.SWITCHED))
    assert service.down is None
    service.handle(AvailabilityEvent(AvailabilityKind.SHORT, "no memory"))
    assert service.down == "no memory"
    hopeless = AvailabilityEvent(AvailabilityKind.HOPELESS, "for ever")
    assert service.handle(hopeless) == (AvailabilityAction.ASK_FOR_RANKS,)
    service.handle(AvailabilityEvent(AvailabilityKind.SWITCHED))
    assert service.down is None
    lost = AvailabilityEvent(AvailabilityKind.ALL_LOST, "killed")
    assert service.handle(lost) == (AvailabilityAction.TERMINATE_ALL,)
    assert service.down == "killed"
    assert service.handle(hopeless) == (AvailabilityAction.STOP_SERVICE,)


def test_a_service_that_nobody_restarts_stops_when_all_are_lost() -> None:
    lost = AvailabilityEvent(AvailabilityKind.ALL_LOST, "killed", restartable=False)
    assert ServiceAvailability().handle(lost) == (AvailabilityAction.STOP_SERVICE,)


def test_where_hosts_may_join_a_service_without_ranks_waits_for_them() -> None:
    hopeless = AvailabilityEvent(AvailabilityKind.HOPELESS, "hosts may join", joinable=True)
    service = ServiceAvailability()
    assert service.handle(hopeless) == (AvailabilityAction.ASK_FOR_HOSTS,)
    assert (service.state, service.down) == (Availability.WAITING, "hosts may join")
    assert service.handle(hopeless) == ()
    service.handle(AvailabilityEvent(AvailabilityKind.SWITCHED))
    assert service.down is None
    lost = AvailabilityEvent(AvailabilityKind.ALL_LOST, "killed", restartable=False, joinable=True)
    assert service.handle(lost) == (AvailabilityAction.TERMINATE_ALL,)
    assert service.state is Availability.LOST, "until all processes are gone"
    assert service.handle(hopeless) == (AvailabilityAction.ASK_FOR_HOSTS,)
    assert service.down == "killed; hosts may join"


@pytest.mark.parametrize("table", [RULES, ACTIVITY_RULES, AVAILABILITY_RULES])
def test_every_rule_can_be_reached(table: Iterable[Rule[Any, Any, Any]]) -> None:
    """None stands behind one for the same event that holds always."""
    closed = set()
    for rule in table:
        assert (rule.state, rule.event) not in closed, rule
        if rule.when is always:
            closed.add((rule.state, rule.event))


def test_what_an_event_causes_comes_behind_those_that_are_there() -> None:
    handled = []

    def handle(event: str) -> None:
        if event == "first":
            queue.post("second")
            queue.post("third")
        handled.append(event)

    queue: EventQueue[str] = EventQueue(handle)
    queue.post("first")
    assert handled == ["first", "second", "third"]


def test_after_an_event_that_failed_the_queue_goes_on() -> None:
    handled = []

    def handle(event: str) -> None:
        if event == "bad":
            queue.post("caused")
            raise RuntimeError
        handled.append(event)

    queue: EventQueue[str] = EventQueue(handle)
    with pytest.raises(RuntimeError):
        queue.post("bad")
    queue.post("next")
    assert handled == ["caused", "next"]


def test_an_event_that_fails_does_not_hold_up_those_behind_it() -> None:
    handled: list[str] = []

    def handle(event: str) -> None:
        handled.append(event)
        if event == "first":
            queue.post("second")
            queue.post("third")
        if event != "third":
            raise ValueError(event)

    queue: EventQueue[str] = EventQueue(handle)
    with pytest.raises(ValueError, match="first"):
        queue.post("first")
    assert handled == ["first", "second", "third"]
    queue.post("third")
    assert handled[3:] == ["third"], "nothing is left, and the queue goes on"
