"""A rank's states: each way through a change, and any order of events against a plain account."""

from __future__ import annotations

import re
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.config import EngineConfig
from flexpert.engine import rank_protocol as msg
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.rank_states import (
    EXCHANGE_RULES,
    PLAN_RULES,
    ExchangeState,
    PlanState,
    RankAction,
    RankEvent,
    RankEventKind,
    RankStates,
    diagram,
)
from flexpert.models.source import ModelSource

E, P, K, Do = ExchangeState, PlanState, RankEventKind, RankAction


def feed(states: RankStates, *events: RankEvent) -> list[RankAction]:
    return [action for event in events for action in states.handle(event)]


def member(epoch: int = 1) -> RankStates:
    states = RankStates()
    feed(
        states,
        RankEvent(K.PREPARE, epoch),
        RankEvent(K.LOADED),
        RankEvent(K.COMMIT, epoch),
        RankEvent(K.VOTED),
    )
    return states


def test_a_newcomer_enters_when_it_is_told_and_is_a_member_after_the_first_vote() -> None:
    states = RankStates()
    assert feed(states, RankEvent(K.PREPARE, 7)) == [Do.WITHDRAW, Do.PREPARE]
    assert feed(states, RankEvent(K.LOADED)) == [Do.REPORT_PREPARED]
    assert not states.takes_part
    assert feed(states, RankEvent(K.COMMIT, 7)) == [Do.ARM, Do.ENTER]
    assert (states.exchange, states.plan, states.armed_for) == (E.ENTERING, P.NONE, 0)
    assert feed(states, RankEvent(K.VOTED)) == [Do.REPORT_SWITCHED]
    assert feed(states, RankEvent(K.VOTED)) == []
    assert states.exchange is E.MEMBER


def test_a_member_votes_for_an_epoch_until_all_do() -> None:
    states = member()
    feed(states, RankEvent(K.PREPARE, 2), RankEvent(K.LOADED))
    assert feed(states, RankEvent(K.COMMIT, 2)) == [Do.ARM]
    assert states.armed_for == 2
    assert feed(states, RankEvent(K.VOTED)) == []
    assert feed(states, RankEvent(K.AGREED)) == [Do.ENTER]
    assert (states.exchange, states.armed_for) == (E.ENTERING, 0)


def test_a_leaver_hands_over_by_vote_or_from_a_halt() -> None:
    for halted in (False, True):
        states = member()
        if halted:
            assert feed(states, RankEvent(K.HALT)) == [Do.WITHDRAW, Do.PAUSE]
        feed(states, RankEvent(K.PREPARE, 2, stays=False), RankEvent(K.LOADED))
        last = [RankEvent(K.COMMIT, 2)] + [RankEvent(K.AGREED)] * (not halted)
        assert feed(states, *last) == [Do.ARM, Do.HAND_OVER]
        assert states.exchange is E.LEFT


def test_an_armed_rank_does_not_go_back_but_for_a_halt() -> None:
    states = member()
    feed(states, RankEvent(K.PREPARE, 2), RankEvent(K.LOADED), RankEvent(K.COMMIT, 2))
    assert feed(states, RankEvent(K.CANCEL, 2)) == []
    assert states.armed_for == 2
    assert feed(states, RankEvent(K.HALT)) == [Do.WITHDRAW, Do.PAUSE]
    assert (states.exchange, states.armed_for) == (E.HALTED, 0)


def test_a_broken_exchange_keeps_the_plan_until_the_halt() -> None:
    states = member()
    feed(states, RankEvent(K.PREPARE, 2), RankEvent(K.LOADED))
    assert feed(states, RankEvent(K.BROKEN)) == [Do.PAUSE, Do.REPORT_BROKEN]
    assert states.plan is P.PREPARED
    assert feed(states, RankEvent(K.HALT)) == [Do.WITHDRAW]
    assert (states.exchange, states.plan) == (E.HALTED, P.NONE)


def test_kv_moves_for_the_prepared_epoch_alone() -> None:
    states = member()
    assert feed(states, RankEvent(K.OFFER, 2), RankEvent(K.FETCH, 2)) == []
    feed(states, RankEvent(K.PREPARE, 2))
    assert feed(states, RankEvent(K.OFFER, 2)) == []
    feed(states, RankEvent(K.LOADED))
    assert feed(states, RankEvent(K.OFFER, 2), RankEvent(K.FETCH, 2)) == [Do.OFFER, Do.FETCH]
    assert feed(states, RankEvent(K.OFFER, 1), RankEvent(K.FETCH, 3)) == []


class Account:
    """What a rank would note down without a table: flags, and a few ifs."""

    def __init__(self) -> None:
        self.member = self.left = self.entering = self.halted = False
        self.preparing = self.prepared = self.armed = 0  # epochs
        self.stays = False

    def handle(self, event: RankEvent) -> list[RankAction]:
        done: list[RankAction] = []
        match event.kind:
            case K.PREPARE:
                self.prepared = self.armed = 0
                self.preparing, self.stays = event.epoch, event.stays
                done = [Do.WITHDRAW, Do.PREPARE]
            case K.LOADED if self.preparing:
                self.prepared, self.preparing = self.preparing, 0
                done = [Do.REPORT_PREPARED]
            case K.NOT_LOADED if self.preparing:
                self.preparing = 0
                done = [Do.UNDO]
            case K.OFFER if self.prepared == event.epoch:
                done = [Do.OFFER]
            case K.FETCH if self.prepared == event.epoch:
                done = [Do.FETCH]
            case K.COMMIT if self.prepared != event.epoch:
                done = [Do.REFUSE]
            case K.COMMIT if self.member:
                self.armed = event.epoch
                done = [Do.ARM]
            case K.COMMIT:
                done = [Do.ARM, self.switch()]
            case K.AGREED if self.armed and self.member and not self.entering:
                done = [self.switch()]
            case K.CANCEL if not self.armed:
                self.preparing = self.prepared = 0
                done = [Do.WITHDRAW]
            case K.VOTED if self.entering:
                self.entering = False
                done = [Do.REPORT_SWITCHED]
            case K.HALT:
                self.preparing = self.prepared = self.armed = 0
                done = [Do.WITHDRAW, *self.leave()]
            case K.INTERRUPTED:
                done = self.leave()
            case K.BROKEN if self.member:
                done = [*self.leave(), Do.REPORT_BROKEN]
        return done

    def switch(self) -> RankAction:
        self.prepared = self.armed = 0
        self.halted = False
        self.member = self.entering = self.stays
        self.left = not self.stays
        return Do.ENTER if self.stays else Do.HAND_OVER

    def leave(self) -> list[RankAction]:
        if not self.member:
            return []
        self.member = self.entering = False
        self.halted = True
        return [Do.PAUSE]


EVENTS = st.builds(RankEvent, st.sampled_from(K), st.integers(1, 3), st.booleans())


@settings(max_examples=500, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_is_answered_as_by_a_plain_account(events: list[RankEvent]) -> None:
    states, account = RankStates(), Account()
    for event in events:
        if event.kind is K.AGREED and not (states.armed_for and states.exchange is E.MEMBER):
            continue  # a whole vote comes before it, and both only to an armed member
        assert feed(states, event) == account.handle(event), event
        assert states.takes_part == account.member
        assert states.armed_for == account.armed
        assert (states.exchange is E.LEFT) == account.left
        assert (states.exchange is E.HALTED) == account.halted
        assert (states.exchange is E.ENTERING) == account.entering


def test_the_engine_knows_every_command_and_every_action() -> None:
    engine = RankEngine(
        0,
        ModelSource.open("tiny"),
        EngineConfig(kv_memory=2**20, max_tokens_per_step=16, max_running=1),
        capacity=1,
        exchange_timeout_s=1.0,
        report=lambda report: None,
    )
    try:
        queued = set(get_args(msg.Command)) - {msg.StoreAnswer, msg.Persisted}
        assert queued <= set(engine._handlers)
        assert set(engine._actions) == set(Do)
    finally:
        engine.submit(msg.Stop())
        engine.run()


def test_each_state_and_each_action_is_in_some_rule() -> None:
    rules = [*PLAN_RULES, *EXCHANGE_RULES]
    assert {rule.state for rule in rules} == {*E, *P}
    assert {rule.event for rule in rules} == set(K)
    assert {action for rule in rules for action in rule.do} == set(Do)


def test_the_diagram_draws_every_rule() -> None:
    arrows = re.findall(r"^ +(\w+) --> (\w+): ", diagram(), re.MULTILINE)
    rules = [*EXCHANGE_RULES, *PLAN_RULES]
    assert arrows == [(rule.state.value, rule.then.value) for rule in rules]
