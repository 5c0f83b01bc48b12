"""The membership state machine: which change is under way and what must happen next (pure).

Theory of operation. A change goes from one set of ranks to another in five phases, and every phase
waits for a *report* from a known set of ranks. `RULES` is the whole behaviour: in this phase, on
this event, if that holds, do these actions and go to that phase; the first rule that fits wins, and
an event without a rule is ignored (late reports of a change that is over). `Membership.handle`
looks the rule up and keeps the books; it does no I/O, reads no clock and never waits. What carries
the actions out is `change_actions.py`; what makes reports into events is `rank_reports.py`.

    IDLE → SPAWN → LOAD → COMMIT → RELEASE → IDLE      a change that succeeds
                   LOAD → MIGRATE → COMMIT                one in which somebody leaves
           SPAWN, LOAD, MIGRATE → UNDO → IDLE             one that fails or is cancelled
    any  → RECOVER → COMMIT → RELEASE → IDLE           a member is lost, or an exchange broke
    any  → LOST → IDLE                                 nobody is left; all processes have exited

Until COMMIT nothing that serves has been touched, so UNDO only terminates the newcomers. From
COMMIT on a change cannot be withdrawn: some ranks may have switched. A loss is a change of its own,
which takes the place of the one under way: the survivors stop where they are, prepare an epoch
without the lost rank, and enter it without a vote. It begins when the lost rank's connection ends;
a process that gives back a GPU's memory takes a tenth of a second more to exit, or much longer, and
only the end of the change waits for that. So does a broken exchange: a rank that has
stalled does not acknowledge the halt and is terminated, which is a loss; if all are well, the same
members go on. Survivors without the memory for all experts stay halted, as members, until a change
adds ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from flexpert.cluster.rule_table import Rule, RuleTable, always


class Phase(Enum):
    """What the running change waits for."""

    IDLE = "idle"
    SPAWN = "spawn"
    LOAD = "load"
    MIGRATE = "migrate"
    COMMIT = "commit"
    RELEASE = "release"
    UNDO = "undo"
    RECOVER = "recover"
    LOST = "lost"


class EventKind(Enum):
    """What can happen."""

    BEGIN = "begin"
    HELLO = "hello"  # a newcomer is up
    PREPARED = "prepared"  # a rank that takes part is ready
    MIGRATED = "migrated"  # what a leaver offered of its KV is where it will be needed
    SWITCHED = "switched"  # a member's first vote in the new epoch is whole
    HANDED_OVER = "handed over"  # a leaver has left
    BROKEN = "broken"  # a member's exchange did not complete
    FAILED = "failed"  # a rank could not prepare
    SHORT = "short"  # the survivors have no memory for all experts
    DISCONNECTED = "disconnected"  # a process is ending unasked, and is not gone yet
    EXITED = "exited"  # a process is certainly gone
    CANCEL = "cancel"
    DEADLINE = "deadline"  # the phase took too long
    HALTED = "halted"  # a survivor's process has heard the halt
    HALT_DEADLINE = "halt deadline"  # that took too long
    ALL_EXITED = "all exited"  # no rank's process is left
    RESUMED = "resumed"  # another head has taken the ranks over


class Do(Enum):
    """What the coordinator must carry out."""

    SPAWN = "spawn newcomers"
    PREPARE = "send the plan"
    OFFER = "ask leavers for their KV"
    COMMIT = "arm"
    STOP = "take the epoch as current, stop leavers"
    KILL_NEWCOMERS = "kill newcomers"
    KILL_LEAVERS = "kill leavers"
    KILL_SILENT = "kill who has not reported"
    CANCEL = "withdraw the plan"
    ABANDON = "give the running change up"
    HALT = "stop the survivors' exchanges"
    KILL_NOT_HALTED = "kill who has not halted"
    HOLD = "let the survivors wait for more ranks, kill leavers"
    FINISH = "report the outcome"
    ALARM = "report the loss"
    RESET = "start again as at the beginning"


@dataclass(frozen=True, slots=True)
class MembershipEvent:
    """rank: whom it concerns, if anybody. reason: for people. target: of BEGIN. epoch: of the
    change that a HALT_DEADLINE is about."""

    kind: EventKind
    rank: int | None = None
    reason: str = ""
    target: frozenset[int] = frozenset()
    epoch: int | None = None


@dataclass(slots=True)
class Change:
    """The books of one change. reported: who has done what the phase waits for.

    halted: survivors that have acknowledged the halt, if it began with one.
    doomed: newcomers of a change that this one took the place of, and ranks that were lost, which
    must still exit.
    kept: the target of the change that this one took the place of is kept.
    retries: how many recoveries in a row before this one failed in a rank that lives on.
    cause: the latest exit or broken exchange during it or before it, for people.
    """

    epoch: int
    before: frozenset[int]
    after: frozenset[int]
    doomed: frozenset[int] = frozenset()
    kept: bool = False
    retries: int = 0
    cause: str = ""
    reported: set[int] = field(default_factory=set)
    halted: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    error: str | None = None
    cancelled: bool = False

    @property
    def joining(self) -> frozenset[int]:
        return self.after - self.before

    @property
    def leaving(self) -> frozenset[int]:
        return self.before - self.after

    @property
    def everyone(self) -> frozenset[int]:
        return self.before | self.after

    @property
    def exiting(self) -> frozenset[int]:
        """Whose processes must be gone before the change is over."""
        return self.leaving | self.doomed


_RETRIES = 3


def _newcomer(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.joining | change.doomed


def _exiting(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.exiting


def _all_joined(change: Change, event: MembershipEvent) -> bool:
    return change.reported >= change.joining


def _all_reported(change: Change, event: MembershipEvent) -> bool:
    return change.reported >= change.everyone


def _somebody_leaves(change: Change, event: MembershipEvent) -> bool:
    return _all_reported(change, event) and bool(change.leaving)


def _all_migrated(change: Change, event: MembershipEvent) -> bool:
    return change.reported >= change.leaving


def _last_to_exit(change: Change, event: MembershipEvent) -> bool:
    return (event.rank is None or event.rank in change.exiting) and change.gone >= change.exiting


def _last_newcomer(change: Change, event: MembershipEvent) -> bool:
    return (event.rank is None or event.rank in change.joining) and change.gone >= change.joining


def _participant(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.everyone


def _may_retry(change: Change, event: MembershipEvent) -> bool:
    # Who connects to a rank that has just died may fail before its exit is reported here.
    return event.rank in change.everyone and change.retries < _RETRIES


def _member_with_survivors(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.before and bool(change.before - change.gone)


def _part_with_survivors(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.everyone and bool(change.after - change.gone)


def _member_lost(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.before and bool(change.before - change.gone - {event.rank})


def _part_lost(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.everyone and bool(change.after - change.gone - {event.rank})


def _stayer_lost(change: Change, event: MembershipEvent) -> bool:
    return event.rank in change.after and _part_lost(change, event)


def _of_this_change(change: Change, event: MembershipEvent) -> bool:
    return event.epoch == change.epoch


P, K = Phase, EventKind

RULES = RuleTable[Phase, EventKind, Do](
    (
        Rule(P.IDLE, K.BEGIN, P.SPAWN, (Do.SPAWN,)),
        # prepare: while serving, and it can be withdrawn
        Rule(P.SPAWN, K.HELLO, P.LOAD, (Do.PREPARE,), _all_joined),
        Rule(P.LOAD, K.PREPARED, P.MIGRATE, (Do.OFFER,), _somebody_leaves),
        Rule(P.LOAD, K.PREPARED, P.COMMIT, (Do.COMMIT,), _all_reported),
        # what leavers have computed is copied while they go on, what is late at the switch
        Rule(P.MIGRATE, K.MIGRATED, P.COMMIT, (Do.COMMIT,), _all_migrated),
        Rule(P.MIGRATE, K.DEADLINE, P.COMMIT, (Do.COMMIT,)),
        Rule(P.SPAWN, K.EXITED, P.UNDO, (Do.KILL_NEWCOMERS,), _newcomer),
        Rule(P.SPAWN, K.DEADLINE, P.UNDO, (Do.KILL_NEWCOMERS,)),
        Rule(P.SPAWN, K.CANCEL, P.UNDO, (Do.KILL_NEWCOMERS,)),
        Rule(P.LOAD, K.DEADLINE, P.UNDO, (Do.CANCEL, Do.KILL_NEWCOMERS)),
        *(
            Rule(phase, kind, P.UNDO, (Do.CANCEL, Do.KILL_NEWCOMERS), guard)
            for phase in (P.LOAD, P.MIGRATE)
            for kind, guard in (
                (K.EXITED, _newcomer),
                (K.FAILED, _participant),
                (K.CANCEL, always),
            )
        ),
        # commit: every member votes for the epoch at the same step
        Rule(P.COMMIT, K.SWITCHED, P.RELEASE, (Do.STOP,), _all_reported),
        Rule(P.COMMIT, K.HANDED_OVER, P.RELEASE, (Do.STOP,), _all_reported),
        Rule(P.COMMIT, K.DEADLINE, P.COMMIT, (Do.KILL_SILENT,)),
        Rule(P.COMMIT, K.FAILED, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE), _may_retry),
        Rule(P.COMMIT, K.FAILED, P.LOST, (Do.ALARM,)),
        # release: what left is stopped, and its id is free only when its process is gone
        Rule(P.RELEASE, K.EXITED, P.IDLE, (Do.FINISH,), _last_to_exit),
        Rule(P.RELEASE, K.EXITED, P.RELEASE, (), _exiting),
        Rule(P.RELEASE, K.DEADLINE, P.RELEASE, (Do.KILL_LEAVERS,)),
        # undo: newcomers exit; the service never noticed
        Rule(P.UNDO, K.EXITED, P.IDLE, (Do.FINISH,), _last_newcomer),
        Rule(P.UNDO, K.EXITED, P.UNDO, (), _newcomer),
        Rule(P.UNDO, K.DEADLINE, P.UNDO, (Do.KILL_NEWCOMERS,)),
        # a member is lost without being asked to leave: the survivors go on in an epoch without it
        *(
            Rule(phase, K.EXITED, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE), guard)
            for phase, guard in (
                (P.IDLE, _member_with_survivors),
                (P.SPAWN, _member_with_survivors),
                (P.LOAD, _member_with_survivors),
                (P.MIGRATE, _member_with_survivors),
                (P.UNDO, _member_with_survivors),
                (P.COMMIT, _part_with_survivors),
                (P.RELEASE, _part_with_survivors),
                (P.RECOVER, _part_with_survivors),
            )
        ),
        # the same, before its process is gone
        *(
            Rule(phase, K.DISCONNECTED, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE), guard)
            for phase, guard in (
                (P.IDLE, _member_lost),
                (P.SPAWN, _member_lost),
                (P.LOAD, _member_lost),
                (P.MIGRATE, _member_lost),
                (P.UNDO, _member_lost),
                (P.COMMIT, _part_lost),
                (P.RELEASE, _stayer_lost),
                (P.RECOVER, _part_lost),
            )
        ),
        # an exchange broke: nobody is known to be lost, whoever does not answer will be
        *(
            Rule(phase, K.BROKEN, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE), _participant)
            for phase in (P.IDLE, P.SPAWN, P.LOAD, P.MIGRATE, P.UNDO, P.COMMIT, P.RELEASE)
        ),
        # another head: what the ranks were about is not known for certain, so all of them stop and
        # enter an epoch of their own, without those that ended meanwhile
        *(
            Rule(phase, K.RESUMED, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE))
            for phase in (
                P.SPAWN,
                P.LOAD,
                P.MIGRATE,
                P.COMMIT,
                P.RELEASE,
                P.UNDO,
                P.RECOVER,
            )
        ),
        Rule(P.RECOVER, K.PREPARED, P.COMMIT, (Do.COMMIT,), _all_reported),
        Rule(P.RECOVER, K.EXITED, P.RECOVER, (), _exiting),
        Rule(P.RECOVER, K.FAILED, P.RECOVER, (Do.ABANDON, Do.HALT, Do.PREPARE), _may_retry),
        Rule(P.RECOVER, K.FAILED, P.LOST, (Do.ALARM,), _participant),
        Rule(P.RECOVER, K.DEADLINE, P.RECOVER, (Do.KILL_SILENT,)),
        Rule(P.RECOVER, K.SHORT, P.RELEASE, (Do.HOLD,)),
        # who did not even hear the halt has stalled; its exit is an ordinary loss
        *(
            Rule(phase, K.HALT_DEADLINE, phase, (Do.KILL_NOT_HALTED,), _of_this_change)
            for phase in (P.RECOVER, P.COMMIT, P.RELEASE, P.LOST)
        ),
        # nobody is left
        Rule(P.COMMIT, K.EXITED, P.COMMIT, (), _exiting),
        *(
            Rule(phase, K.EXITED, P.LOST, (Do.ALARM,), _participant)
            for phase in (
                P.IDLE,
                P.SPAWN,
                P.LOAD,
                P.MIGRATE,
                P.COMMIT,
                P.RELEASE,
                P.UNDO,
                P.RECOVER,
            )
        ),
        Rule(P.LOST, K.ALL_EXITED, P.IDLE, (Do.RESET,)),
    )
)

# Events after which a rank is lost, or may be.
_LOSSES = {EventKind.DISCONNECTED, EventKind.EXITED, EventKind.BROKEN, EventKind.RESUMED}

# Phases from which a loss keeps the change's outcome: some ranks may have switched already.
_POINT_OF_NO_RETURN = {Phase.COMMIT, Phase.RELEASE, Phase.RECOVER}

# Phases in which this report counts towards what the phase waits for.
_COUNTS = {
    (P.SPAWN, K.HELLO),
    (P.LOAD, K.PREPARED),
    (P.MIGRATE, K.MIGRATED),
    (P.RECOVER, K.PREPARED),
    (P.COMMIT, K.SWITCHED),
    (P.COMMIT, K.HANDED_OVER),
}

# A phase that waits for nobody (nobody joins, nobody leaves) passes at once, by this event.
_PASSES = {
    P.SPAWN: (K.HELLO, _all_joined),
    P.RELEASE: (K.EXITED, _last_to_exit),
    P.UNDO: (K.EXITED, _last_newcomer),
}


def _ending(event: MembershipEvent) -> frozenset[int]:
    """Whose process is not gone yet, and will be."""
    if event.kind is EventKind.DISCONNECTED and event.rank is not None:
        return frozenset({event.rank})
    return frozenset()


class Membership:
    """The agreed members and the change under way.

    members: active ids. epoch: of the members. change: the books of the latest change, or None;
    it is over when phase is IDLE.
    """

    def __init__(self) -> None:
        self.members: frozenset[int] = frozenset()
        self.epoch = 0
        self.phase = Phase.IDLE
        self.change: Change | None = None
        self._epochs_used = 0  # a failed change uses its number up

    def begin(self, target: Iterable[int]) -> list[Do]:
        """Start a change to these ids; only in IDLE.

        Raises:
            ValueError: another change is under way, or the target is empty.
        """
        after = frozenset(target)
        if self.phase is not Phase.IDLE:
            raise ValueError(f"a change is in phase {self.phase.value}")
        if not after:
            raise ValueError("a service needs at least one rank")
        self._epochs_used += 1
        self.change = Change(self._epochs_used, self.members, after)
        return self.handle(MembershipEvent(EventKind.BEGIN, target=after))

    @property
    def epochs_used(self) -> int:
        """How many epochs were begun; numbers are never used again."""
        return self._epochs_used

    def restore(
        self,
        epoch: int,
        epochs_used: int,
        members: frozenset[int],
        phase: Phase,
        change: Change | None,
        gone: Iterable[int],
    ) -> bool:
        """The books of another head, whose ranks are taken over; `RESUMED` follows.

        gone: ranks whose processes have ended since. Returns whether somebody can go on; if not,
        nothing is restored but the numbers.
        """
        if change is None or phase is Phase.IDLE:
            phase, change = Phase.RELEASE, Change(epoch, members, members)
        change.gone |= set(gone)
        stay = change.after if phase in _POINT_OF_NO_RETURN else change.before
        self._epochs_used = epochs_used
        self.epoch = epoch
        if phase is Phase.LOST or not stay - change.gone:
            return False
        self.members, self.phase, self.change = members, phase, change
        return True

    def lose(self, somebody_is_left: bool) -> None:
        """Of another head's ranks nobody can go on: what is left is ended, then all begins anew."""
        self.phase = Phase.LOST if somebody_is_left else Phase.IDLE

    def handle(self, event: MembershipEvent) -> list[Do]:
        """Keep the books of an event and return what must be done, in order."""
        change = self.change
        if change is None or (self.phase is Phase.IDLE and event.kind is not EventKind.BEGIN):
            change = Change(self.epoch, self.members, self.members)
        if event.kind in _LOSSES:
            change.cause = event.reason
        if event.rank is not None:
            if (self.phase, event.kind) in _COUNTS and event.rank in change.everyone:
                change.reported.add(event.rank)
            if event.kind is EventKind.EXITED:
                change.gone.add(event.rank)
            if event.kind is EventKind.HALTED:
                change.halted.add(event.rank)
        rule = RULES.find(self.phase, event.kind, change, event)
        if rule is None:
            return []
        if rule.then is Phase.UNDO and self.phase is not Phase.UNDO:
            change.cancelled = event.kind is EventKind.CANCEL
            change.error = event.reason or None
        if rule.then is Phase.LOST or event.kind is EventKind.SHORT:
            change.error = event.reason or None
        if Do.HALT in rule.do:
            retries = change.retries + 1 if event.kind is EventKind.FAILED else 0
            change = self.change = self._recovery(change, retries, _ending(event))
        actions = list(rule.do)
        entered = rule.then is not self.phase
        self.phase = rule.then
        if entered:
            actions += self._enter(change)
        if Do.RESET in rule.do:  # as at the beginning, but for the numbers
            self.members, self.change = frozenset(), None
        return actions

    def _recovery(self, broken: Change, retries: int, ending: frozenset[int]) -> Change:
        """The change that goes on without those who are gone or `ending`, in the place of
        `broken`."""
        self._epochs_used += 1
        kept = self.phase in _POINT_OF_NO_RETURN
        if kept:
            before, after, doomed = broken.everyone, broken.after, broken.doomed
        else:
            before, after, doomed = broken.before, broken.before, broken.joining
        lost = broken.gone | ending
        return Change(
            self._epochs_used,
            before - lost,
            after - lost,
            (doomed | ending) - broken.gone,
            kept,
            retries,
            broken.cause,
        )

    def _enter(self, change: Change) -> list[Do]:
        change.reported = set()
        if self.phase is Phase.RELEASE:
            self.members, self.epoch = change.after, change.epoch
        if self.phase in _PASSES:
            kind, satisfied = _PASSES[self.phase]
            if satisfied(change, MembershipEvent(kind)):
                return self.handle(MembershipEvent(kind))
        return []


def diagram() -> str:
    """The table as a Mermaid state diagram."""
    return RULES.diagram(Phase.IDLE)
