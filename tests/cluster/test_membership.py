"""The state machine, driven by every order of events that hypothesis can think of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexpert.cluster.membership import (
    RULES,
    Do,
    EventKind,
    Membership,
    MembershipEvent,
    Phase,
    diagram,
)
from flexpert.cluster.state_machines import machines


def run(membership: Membership, *events: MembershipEvent) -> list[Do]:
    return [action for event in events for action in membership.handle(event)]


def started(*ranks: int) -> Membership:
    """A membership whose first change is done."""
    membership = Membership()
    membership.begin(ranks)
    run(membership, *(MembershipEvent(EventKind.HELLO, rank) for rank in ranks))
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in ranks))
    run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in ranks))
    assert membership.phase is Phase.IDLE
    assert membership.members == set(ranks)
    return membership


def test_a_scale_up_waits_for_everyone_in_each_phase() -> None:
    membership = started(0, 1)
    assert membership.begin({0, 1, 2}) == [Do.SPAWN]
    assert run(membership, MembershipEvent(EventKind.HELLO, 2)) == [Do.PREPARE]
    assert (
        run(
            membership,
            MembershipEvent(EventKind.PREPARED, 0),
            MembershipEvent(EventKind.PREPARED, 2),
        )
        == []
    )
    assert run(membership, MembershipEvent(EventKind.PREPARED, 1)) == [Do.COMMIT]
    assert membership.members == {0, 1}, "nothing is agreed before all have switched"
    assert (
        run(
            membership,
            MembershipEvent(EventKind.SWITCHED, 0),
            MembershipEvent(EventKind.SWITCHED, 1),
        )
        == []
    )
    assert run(membership, MembershipEvent(EventKind.SWITCHED, 2)) == [Do.STOP, Do.FINISH]
    assert membership.members == {0, 1, 2}
    assert membership.epoch == 2


def test_a_scale_down_skips_spawning_and_ends_when_the_leaver_is_gone() -> None:
    membership = started(0, 1, 2)
    assert membership.begin({0, 2}) == [Do.SPAWN, Do.PREPARE]
    assert run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2))) == [
        Do.OFFER
    ]
    assert run(membership, MembershipEvent(EventKind.MIGRATED, 1)) == [Do.COMMIT]
    run(membership, MembershipEvent(EventKind.SWITCHED, 0), MembershipEvent(EventKind.SWITCHED, 2))
    assert run(membership, MembershipEvent(EventKind.HANDED_OVER, 1)) == [Do.STOP]
    assert membership.phase is Phase.RELEASE
    assert run(membership, MembershipEvent(EventKind.EXITED, 1)) == [Do.FINISH]
    assert membership.members == {0, 2}


@pytest.mark.parametrize(
    "trouble",
    [
        MembershipEvent(EventKind.EXITED, 2, "rank 2 exited"),
        MembershipEvent(EventKind.FAILED, 0, "no such file"),
        MembershipEvent(EventKind.DEADLINE, reason="deadline"),
        MembershipEvent(EventKind.CANCEL, reason="cancelled"),
    ],
    ids=lambda event: event.kind.value,
)
def test_trouble_before_commit_undoes_the_change_and_the_next_one_works(
    trouble: MembershipEvent,
) -> None:
    membership = started(0, 1)
    membership.begin({0, 1, 2})
    run(membership, MembershipEvent(EventKind.HELLO, 2), MembershipEvent(EventKind.PREPARED, 0))
    actions = run(membership, trouble)
    assert Do.CANCEL in actions
    if trouble.kind is not EventKind.EXITED:
        assert membership.phase is Phase.UNDO, "the id is free only when the process is gone"
        assert run(membership, MembershipEvent(EventKind.EXITED, 2)) == [Do.FINISH]
    assert membership.phase is Phase.IDLE
    assert membership.members == {0, 1}
    assert membership.change is not None
    assert membership.change.error == trouble.reason
    assert membership.change.cancelled == (trouble.kind is EventKind.CANCEL)

    assert membership.begin({0, 1, 2}) == [Do.SPAWN]
    assert membership.change.epoch == 3, "a failed epoch's number is never used again"


def test_late_reports_of_a_change_that_failed_count_for_nothing() -> None:
    membership = started(0)
    membership.begin({0, 1})
    run(membership, MembershipEvent(EventKind.EXITED, 1, "gone"))
    assert (
        run(membership, MembershipEvent(EventKind.HELLO, 1), MembershipEvent(EventKind.PREPARED, 1))
        == []
    )
    assert membership.phase is Phase.IDLE


def test_a_failed_scale_down_touches_nobody() -> None:
    membership = started(0, 1)
    membership.begin({0})
    actions = run(membership, MembershipEvent(EventKind.FAILED, 0, "checkpoint file missing"))
    assert actions == [Do.CANCEL, Do.KILL_NEWCOMERS, Do.FINISH]
    assert membership.members == {0, 1}


@pytest.mark.parametrize("phase", ["idle", "spawn", "load", "commit"])
def test_a_member_that_dies_unasked_is_a_loss_in_every_phase(phase: str) -> None:
    membership = started(0, 1)
    if phase != "idle":
        membership.begin({0, 1, 2})
    if phase in ("load", "commit"):
        run(membership, MembershipEvent(EventKind.HELLO, 2))
    if phase == "commit":
        run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2)))
    assert membership.phase.value == phase
    assert Do.HALT in run(membership, MembershipEvent(EventKind.EXITED, 1, "killed"))
    assert membership.phase is Phase.RECOVER
    change = membership.change
    assert change is not None
    survivors = {0, 2} if phase == "commit" else {0}
    assert change.after == survivors
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in survivors))
    run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in survivors))
    if change.doomed:
        assert membership.phase is Phase.RELEASE, "the abandoned newcomer must end first"
        run(membership, MembershipEvent(EventKind.EXITED, 2))
    assert membership.phase is Phase.IDLE
    assert membership.members == survivors


@pytest.mark.parametrize("phase", ["idle", "spawn", "load", "commit", "release", "undo"])
def test_a_loss_begins_when_a_connection_ends_and_is_over_when_the_process_is_gone(
    phase: str,
) -> None:
    membership = started(0, 1)
    if phase != "idle":
        membership.begin({0, 2} if phase == "release" else {0, 1, 2})
    if phase in ("load", "commit", "release"):
        run(membership, MembershipEvent(EventKind.HELLO, 2))
    if phase in ("commit", "release"):
        run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2)))
    if phase == "release":
        run(membership, MembershipEvent(EventKind.MIGRATED, 1))
        run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in (0, 2)))
        run(membership, MembershipEvent(EventKind.HANDED_OVER, 1))
    if phase == "undo":
        run(membership, MembershipEvent(EventKind.CANCEL))
    assert membership.phase.value == phase
    lost = 0 if phase == "release" else 1
    assert Do.HALT in run(membership, MembershipEvent(EventKind.DISCONNECTED, lost))
    change = membership.change
    assert change is not None
    survivors = change.after
    assert lost not in survivors
    assert lost in change.doomed
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in change.everyone))
    run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in survivors))
    for leaver in change.leaving:
        run(membership, MembershipEvent(EventKind.HANDED_OVER, leaver))
    assert membership.members == survivors, "they serve before the process is gone"
    assert membership.phase is Phase.RELEASE, "its id is not free yet"
    for ending in change.exiting:
        run(membership, MembershipEvent(EventKind.EXITED, ending))
    assert membership.phase is Phase.IDLE
    assert membership.members == survivors


def test_a_leaver_that_closes_its_connection_and_the_last_member_are_no_loss_yet() -> None:
    membership = started(0, 1)
    membership.begin({0})
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1)))
    run(membership, MembershipEvent(EventKind.MIGRATED, 1))
    run(membership, MembershipEvent(EventKind.SWITCHED, 0))
    run(membership, MembershipEvent(EventKind.HANDED_OVER, 1))
    assert membership.phase is Phase.RELEASE
    assert run(membership, MembershipEvent(EventKind.DISCONNECTED, 1)) == []
    run(membership, MembershipEvent(EventKind.EXITED, 1))
    assert run(membership, MembershipEvent(EventKind.DISCONNECTED, 0)) == []
    assert membership.members == {0}


def test_losses_one_after_the_other_end_in_one_epoch_of_the_survivors() -> None:
    membership = started(0, 1, 2, 3)
    run(
        membership,
        MembershipEvent(EventKind.EXITED, 1),
        MembershipEvent(EventKind.PREPARED, 0),
        MembershipEvent(EventKind.EXITED, 3),
    )
    assert membership.change is not None
    assert membership.change.after == {0, 2}
    assert membership.change.reported == set(), "what was prepared for the older epoch is void"
    run(membership, MembershipEvent(EventKind.PREPARED, 0), MembershipEvent(EventKind.PREPARED, 2))
    run(membership, MembershipEvent(EventKind.SWITCHED, 0), MembershipEvent(EventKind.SWITCHED, 2))
    assert membership.members == {0, 2}
    assert membership.phase is Phase.IDLE


def test_a_broken_exchange_with_all_members_well_goes_on_with_the_same_members() -> None:
    membership = started(0, 1)
    actions = run(membership, MembershipEvent(EventKind.BROKEN, 0, "rank 1 did not answer"))
    assert actions == [Do.ABANDON, Do.HALT, Do.PREPARE]
    assert run(membership, MembershipEvent(EventKind.BROKEN, 1)) == [], (
        "one verdict for all reports"
    )
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1)))
    run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in (0, 1)))
    assert membership.phase is Phase.IDLE
    assert membership.members == {0, 1}
    assert membership.epoch == 2


@pytest.mark.parametrize("phase", [Phase.RECOVER, Phase.COMMIT], ids=lambda phase: phase.value)
def test_who_is_silent_until_the_deadline_is_killed_and_the_rest_goes_on(phase: Phase) -> None:
    membership = started(0, 1, 2)
    run(membership, MembershipEvent(EventKind.BROKEN, 0))
    if phase is Phase.COMMIT:
        run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2)))
    report = EventKind.PREPARED if phase is Phase.RECOVER else EventKind.SWITCHED
    run(membership, MembershipEvent(report, 0), MembershipEvent(report, 2))
    assert run(membership, MembershipEvent(EventKind.DEADLINE)) == [Do.KILL_SILENT]
    assert membership.phase is phase
    assert membership.change is not None
    assert membership.change.everyone - membership.change.reported == {1}
    assert Do.HALT in run(membership, MembershipEvent(EventKind.EXITED, 1))
    assert membership.change.after == {0, 2}


def test_a_recovery_that_fails_in_a_rank_that_lives_is_tried_again_and_not_for_ever() -> None:
    membership = started(0, 1, 2)
    run(membership, MembershipEvent(EventKind.EXITED, 1))
    epochs = []
    for _ in range(3):
        assert run(
            membership, MembershipEvent(EventKind.FAILED, 0, "rank 2 cannot be reached")
        ) == [
            Do.ABANDON,
            Do.HALT,
            Do.PREPARE,
        ]
        assert membership.change is not None
        assert membership.change.after == {0, 2}
        epochs.append(membership.change.epoch)
    assert epochs == sorted(set(epochs)), "each try is an epoch of its own"
    run(membership, MembershipEvent(EventKind.EXITED, 2))
    assert membership.change.after == {0}, "what had failed was the end of rank 2"
    for _ in range(3):
        assert Do.HALT in run(membership, MembershipEvent(EventKind.FAILED, 0, "no such file"))
    assert run(membership, MembershipEvent(EventKind.FAILED, 0, "no such file")) == [Do.ALARM]
    assert membership.phase is Phase.LOST


def test_a_rank_that_cannot_commit_makes_a_recovery_of_the_change() -> None:
    membership = started(0, 1)
    membership.begin({0, 1, 2})
    run(
        membership,
        MembershipEvent(EventKind.HELLO, 2),
        *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2)),
    )
    assert Do.HALT in run(
        membership, MembershipEvent(EventKind.FAILED, 1, "epoch 2 is not prepared")
    )
    run(membership, *(MembershipEvent(EventKind.PREPARED, rank) for rank in (0, 1, 2)))
    run(membership, *(MembershipEvent(EventKind.SWITCHED, rank) for rank in (0, 1, 2)))
    assert membership.phase is Phase.IDLE
    assert membership.members == {0, 1, 2}


def test_the_last_rank_lost_is_the_end() -> None:
    membership = started(0)
    assert run(membership, MembershipEvent(EventKind.EXITED, 0, "killed")) == [Do.ALARM]
    assert membership.phase is Phase.LOST


def test_survivors_without_the_memory_stay_members_until_a_change_adds_ranks() -> None:
    membership = started(0, 1, 2)
    assert Do.HALT in run(membership, MembershipEvent(EventKind.EXITED, 1, "killed"))
    assert run(membership, MembershipEvent(EventKind.SHORT, reason="no memory")) == [
        Do.HOLD,
        Do.FINISH,
    ]
    assert membership.phase is Phase.IDLE
    assert membership.members == {0, 2}
    assert membership.change is not None
    assert membership.change.error == "no memory"
    assert membership.begin({0, 1, 2}) == [Do.SPAWN]
    assert Do.HALT in run(membership, MembershipEvent(EventKind.EXITED, 0, "killed"))
    assert run(membership, MembershipEvent(EventKind.SHORT)) == [Do.HOLD]
    assert membership.phase is Phase.RELEASE, "the newcomer's id is free when it has exited"
    assert run(membership, MembershipEvent(EventKind.EXITED, 1)) == [Do.FINISH]
    assert membership.members == {2}


def test_a_second_change_is_refused_while_one_runs() -> None:
    membership = started(0)
    membership.begin({0, 1})
    with pytest.raises(ValueError, match="a change is in phase spawn"):
        membership.begin({0, 2})


def test_the_diagram_shows_every_phase_of_the_table() -> None:
    text = diagram()
    for phase in {entry.state for entry in RULES} | {entry.then for entry in RULES}:
        assert phase.value in text


class AnyOrder(RuleBasedStateMachine):
    """Random changes, reports from anybody in any order, exits, deadlines and cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.membership = Membership()
        self.alive: set[int] = set()
        self.highest_epoch = 0

    def feed(self, event: MembershipEvent) -> None:
        self.obey(self.membership.handle(event))

    def obey(self, actions: list[Do]) -> None:
        change = self.membership.change
        assert change is not None
        for action in actions:
            if action is Do.SPAWN:
                assert not (self.alive & change.joining), "an id is used again too early"
                self.alive |= change.joining

    @precondition(lambda self: self.membership.phase is Phase.IDLE)
    @rule(ranks=st.sets(st.integers(0, 4), min_size=1))
    def begin(self, ranks: set[int]) -> None:
        if ranks != self.membership.members:
            self.obey(self.membership.begin(ranks))

    @rule(
        kind=st.sampled_from(
            [EventKind.HELLO, EventKind.PREPARED, EventKind.SWITCHED, EventKind.HANDED_OVER]
        ),
        rank=st.integers(0, 4),
    )
    def report(self, kind: EventKind, rank: int) -> None:
        if rank in self.alive:
            self.feed(MembershipEvent(kind, rank))

    @rule(kind=st.sampled_from([EventKind.DEADLINE, EventKind.CANCEL]))
    def outside(self, kind: EventKind) -> None:
        if self.membership.phase is not Phase.IDLE:
            self.feed(MembershipEvent(kind, reason=kind.value))
            assert self.membership.phase is not Phase.LOST

    @rule(rank=st.integers(0, 4))
    def broken(self, rank: int) -> None:
        if rank in self.membership.members & self.alive:
            self.feed(MembershipEvent(EventKind.BROKEN, rank, "no answer"))
            assert self.membership.phase is not Phase.LOST

    @precondition(lambda self: self.membership.phase is Phase.RECOVER)
    @rule()
    def short(self) -> None:
        self.feed(MembershipEvent(EventKind.SHORT, reason="no memory"))

    @rule(rank=st.integers(0, 4))
    def exit(self, rank: int) -> None:
        change = self.membership.change
        expected = change is not None and (
            (self.membership.phase is Phase.RELEASE and rank in change.leaving)
            or (
                self.membership.phase in (Phase.SPAWN, Phase.LOAD, Phase.UNDO)
                and rank in change.joining
            )
        )
        if rank in self.alive and expected:
            self.alive.discard(rank)
            self.feed(MembershipEvent(EventKind.EXITED, rank, "exited"))
            assert self.membership.phase is not Phase.LOST

    @rule(rank=st.integers(0, 4))
    def die(self, rank: int) -> None:
        members = self.membership.members & self.alive
        if rank in self.alive and len(members - {rank}) and self.membership.phase is not Phase.LOST:
            self.alive.discard(rank)
            self.feed(MembershipEvent(EventKind.EXITED, rank, "died"))
            if members - {rank} == members:
                assert self.membership.phase is not Phase.LOST

    @invariant()
    def epochs_only_rise(self) -> None:
        assert self.membership.epoch >= self.highest_epoch
        self.highest_epoch = self.membership.epoch

    @invariant()
    def members_are_alive(self) -> None:
        if self.membership.phase in (Phase.IDLE, Phase.SPAWN, Phase.LOAD, Phase.UNDO):
            assert self.membership.members <= self.alive

    @invariant()
    def nobody_but_members_is_alive_when_idle(self) -> None:
        if self.membership.phase is Phase.IDLE:
            assert self.alive == self.membership.members


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_the_page_of_state_machines_is_the_one_of_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs/state-machines.md").read_text()
    assert machines() in page, "python -m flexpert.cluster.state_machines docs/state-machines.md"
