"""Simulated histories hold every invariant, and a broken rule of the control plane is found."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from support import simulation
from support.simulated_crashes import CRASHES_FROM, CrashingSimulation
from support.simulation import MACHINES_FROM, Simulation, Violation, histories, history

from flexpert.cluster import expert_recovery as coverage
from flexpert.cluster import membership
from flexpert.cluster import stall_detector as watch
from flexpert.cluster.change_actions import ChangeActions
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.membership import Change, Do, EventKind, Membership, Phase
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.rank_reports import RankReports
from flexpert.cluster.reconciler import Reconciler
from flexpert.cluster.restart_policy import RestartPolicy
from flexpert.cluster.rule_table import RuleTable
from flexpert.cluster.views import ClusterEvent
from flexpert.engine.request import RequestSequence, TokenEvent
from flexpert.moe.placement import Placement, replan

HISTORIES = int(os.environ.get("FLEXPERT_HISTORIES", "3000"))
CRASHING_HISTORIES = int(os.environ.get("FLEXPERT_CRASHING_HISTORIES", "1000"))
SHARE = 250  # of one process at a time
FOUND_WITHIN = 10_000

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Histories warn by the thousand; other tests want to see what is logged."""
    logger = logging.getLogger("flexpert")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_histories_hold_every_invariant() -> None:
    parts = [range(at, min(at + SHARE, HISTORIES)) for at in range(0, HISTORIES, SHARE)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=simulation.prepare) as pool:
        assert all(steps > 0 for steps in pool.map(histories, parts))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_head_may_end_at_any_event_and_another_goes_on() -> None:
    first, count = CRASHES_FROM, CRASHING_HISTORIES
    parts = [range(at, min(at + SHARE, first + count)) for at in range(first, first + count, SHARE)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=simulation.prepare) as pool:
        assert all(steps > 0 for steps in pool.map(histories, parts))


def test_what_a_crash_of_the_head_brought_about_stays_mended() -> None:
    for seed in (
        20_001,  # who was desired by a change that had switched was forgotten with the head
        20_184,  # a rank that could not go on was left running under an id that was used again
        20_234,  # a change for which there was no memory any more ended the service
        20_421,  # a head that ended before its first rank was up desired none
        21_690,  # a change that was over and not written down as such desired what it had removed
    ):
        assert history(seed).heads  # type: ignore[attr-defined]


def what_a_rank_has_said_counts_as_written_when_it_is_heard(patch: Patch) -> None:
    """Ranks keep what they have published until it is written down."""

    def comes(self: Any, rank: Any, *rest: Any) -> None:
        heard(self, rank, *rest)
        rank.unpersisted.clear()

    heard = CrashingSimulation.comes
    patch.setattr(CrashingSimulation, "comes", comes)


def a_change_is_written_down_after_it_is_carried_out(patch: Patch) -> None:
    """What an epoch depends on is written before ranks are told."""

    def save(self: Any, record: Any, *, urgent: bool) -> None:
        saved(self, record, urgent=False)

    saved = CrashingSimulation.save_cluster
    patch.setattr(CrashingSimulation, "save_cluster", save)


def sequences_of_a_rank_are_not_asked_for(patch: Patch) -> None:
    """A sequence that a rank runs is given to no other."""
    patch.setattr(Journal, "place", lambda self, name, rank: True)


@pytest.mark.parametrize(
    "broken",
    [
        what_a_rank_has_said_counts_as_written_when_it_is_heard,
        a_change_is_written_down_after_it_is_carried_out,
        sequences_of_a_rank_are_not_asked_for,
    ],
)
def test_a_broken_rule_of_resuming_is_found(
    broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation):
        histories(range(CRASHES_FROM, CRASHES_FROM + 2000))


def test_a_seed_is_a_history() -> None:
    first, again = history(3), history(3)
    assert (first.clock, first.steps, first.answers) == (again.clock, again.steps, again.answers)
    assert history(4).answers != first.answers


@pytest.mark.parametrize(
    "seed",
    [
        256,  # a head that was held up after a halt ended ranks whose answers lay there unread
        304,  # no memory to load lost experts: the head asked itself again without a pause
        4969,  # a scale to those whom a loss had left made the lost ones unwanted
        510,  # whoever came while the only newcomer had died waited for ever
        4984,  # and so did one that was asked for while the recovery ran
    ],
)
def test_what_was_found_stays_mended(seed: int) -> None:
    history(seed)


@pytest.mark.parametrize("somebody", [True, False])
def test_how_a_change_goes_on_is_told_only_to_who_listens(somebody: bool) -> None:
    told = []

    class Heard(Simulation):
        def heard(self) -> bool:
            return somebody

        def publish(self, event: ClusterEvent) -> None:
            if event.kind == "operation":
                told.append(event.data["state"])

    Heard(3).run()
    ends = {"done", "failed", "cancelled"}
    assert ends & set(told)
    assert bool(set(told) - ends) == somebody


# ---- broken rules --------------------------------------------------------------------------------
#
# Each says the rule that it breaks.


def rules(patch: Patch, change: Callable[[membership.Rule], membership.Rule | None]) -> None:
    kept = (change(rule) for rule in membership.RULES)
    patch.setattr(membership, "RULES", RuleTable(rule for rule in kept if rule))


def anyway(*_: Any) -> bool:
    return True


def a_plan_is_committed_before_all_are_prepared(patch: Patch) -> None:
    """COMMIT begins when every member and leaver has prepared."""

    def first(change: Change, event: membership.MembershipEvent) -> bool:
        return bool(change.reported)

    def leaves(change: Change, event: membership.MembershipEvent) -> bool:
        return bool(change.reported and change.leaving)

    instead = {membership._all_reported: first, membership._somebody_leaves: leaves}
    rules(patch, lambda r: replace(r, when=instead[r.when]) if r.event is EventKind.PREPARED else r)


def survivors_are_not_halted(patch: Patch) -> None:
    """In a recovery all survivors leave the broken epoch before they prepare the next."""
    patch.setattr(ChangeActions, "_halt", lambda *_: None)


def a_plan_is_not_withdrawn(patch: Patch) -> None:
    """A change that fails leaves nothing behind."""
    rules(patch, lambda r: replace(r, do=tuple(do for do in r.do if do is not Do.CANCEL)))


def who_never_gets_ready_is_let_be(patch: Patch) -> None:
    """A recovery does not wait for ever."""
    rules(patch, lambda r: replace(r, do=tuple(do for do in r.do if do is not Do.KILL_SILENT)))


def a_loss_is_ignored(patch: Patch) -> None:
    """A member whose process has ended is no member of the next epoch."""
    rules(
        patch,
        lambda r: None if (r.state, r.event) == (Phase.IDLE, EventKind.EXITED) else r,
    )


def an_id_is_free_before_its_process_is_gone(patch: Patch) -> None:
    """An id is used again only when its old process is certainly gone."""
    ends = (Phase.RELEASE, EventKind.EXITED, Phase.IDLE)
    rules(patch, lambda r: replace(r, when=anyway) if (r.state, r.event, r.then) == ends else r)
    patch.setitem(membership._PASSES, Phase.RELEASE, (EventKind.EXITED, anyway))


def a_leaver_is_stopped_before_it_has_handed_over(patch: Patch) -> None:
    """A leaver is stopped when it has handed over.

    Two rules keep that, and where nobody is lost each alone is enough: RELEASE begins when leavers
    have handed over, and who has destinations for its KV stays until they have taken it.
    """

    def switched(change: Change, event: membership.MembershipEvent) -> bool:
        return change.reported >= change.after

    rules(patch, lambda r: replace(r, when=switched) if r.event is EventKind.SWITCHED else r)
    a_leaver_is_stopped_while_its_kv_is_read(patch)


def a_leaver_is_stopped_while_its_kv_is_read(patch: Patch) -> None:
    """A leaver stays until all destinations have taken from its memory what they need."""
    stop = ChangeActions._stop

    def nobody_reads(self: ChangeActions, *known: Any) -> None:
        self._cluster.migrations.clear()
        stop(self, *known)

    patch.setattr(ChangeActions, "_stop", nobody_reads)


def experts_of_the_dead_stay_there(patch: Patch) -> None:
    """Every expert has an owner in every epoch, who has loaded it."""

    def only_who_is_left(before: Placement, ranks: frozenset[int]) -> Placement:
        left = [{rank: layer[rank] for rank in sorted(ranks)} for layer in before.layers]
        return Placement(before.experts, left)

    patch.setattr(coverage, "cover", only_who_is_left)


def an_epoch_is_used_twice(patch: Patch) -> None:
    """No two memberships have the same number."""
    recovery = Membership._recovery

    def again(self: Membership, *args: Any) -> Any:
        self._epochs_used -= 1
        return recovery(self, *args)

    patch.setattr(Membership, "_recovery", again)


def a_request_goes_on_one_token_too_late(patch: Patch) -> None:
    """What migrations goes on where its journal ends."""
    resume = Entry.resume

    def late(self: Entry) -> RequestSequence:
        sequence = resume(self)
        started = sequence.generated
        return msgspec.structs.replace(sequence, generated=[*started, 0] if started else [])

    patch.setattr(Entry, "resume", late)


def requests_of_the_dead_stay_there(patch: Patch) -> None:
    """What a dead rank ran goes on elsewhere."""
    patch.setattr(Journal, "hand_over", lambda *_: {})


def a_request_is_given_to_two(patch: Patch) -> None:
    """A request migrations only when its rank has let go of it."""

    def at_a_halt(self: ChangeActions, change: Change, event: membership.MembershipEvent) -> None:
        halt(self, change, event)
        for rank in sorted(change.before):
            self._cluster.migrations.hand_over(rank, [], self._cluster.admitting)

    halt = ChangeActions._halt
    patch.setattr(ChangeActions, "_halt", at_a_halt)


def nobody_comes_back(patch: Patch) -> None:
    """Lost ranks are replaced."""
    patch.setattr(RestartPolicy, "due", lambda *_: frozenset())
    patch.setattr(RestartPolicy, "next_s", lambda *_: None)


def who_is_silent_is_let_be(patch: Patch) -> None:
    """A rank that has stalled is terminated."""
    patch.setattr(watch, "STALLED", float("inf"))
    patch.setattr(ChangeActions, "_kill_not_halted", lambda *_: None)


def who_hangs_is_let_be(patch: Patch) -> None:
    """A rank whose step loop hangs is terminated."""
    patch.setattr(watch, "STUCK", float("inf"))


def lost_experts_are_not_loaded(patch: Patch) -> None:
    """Who goes on without some experts loads them."""
    patch.setattr(Reconciler, "_reloadable", lambda _: None)


def any_number_of_ranks_will_do(patch: Patch) -> None:
    """A change to ranks that cannot hold all experts is refused."""
    patch.setattr(MemoryBudget, "check", lambda *_: None)


def who_cannot_hold_all_goes_on(patch: Patch) -> None:
    """Survivors without the memory for all experts wait for more ranks."""
    patch.setattr(MemoryBudget, "fits", lambda *_: True)


def a_head_that_was_held_up_blames_the_ranks(patch: Patch) -> None:
    """Answers that lie unread while the head is held up count."""
    patch.setattr(watch.Watch, "late", lambda *_: False)


def tokens_count_whoever_they_are_from(patch: Patch) -> None:
    """A token counts if it comes from the process that the journal names.

    Two rules keep that, and each alone is enough: the transport forgets a process whose end is told
    before its requests move, and the journal takes tokens only from the rank that it names.
    """

    def from_any(self: Journal, rank: int, event: TokenEvent) -> None:
        entry = self._entries.get(event.id)
        if entry is not None and entry.rank is not None:
            publish(self, entry.rank, event)

    publish = Journal.publish
    patch.setattr(Journal, "publish", from_any)
    patch.setattr(Simulation, "forgotten", lambda *_: False)


def who_ended_long_ago_is_killed(patch: Patch) -> None:
    """The status of a rank whose connection has ended says of what it ended, not who killed it."""

    def all_of_them(self: ClusterState, ranks: Iterable[int], *, blameless: bool) -> None:
        for rank in ranks:
            if blameless and rank in self.ranks:
                self.ranks[rank].blameless = True
            self.head.kill(rank)

    patch.setattr(ClusterState, "withdraw", all_of_them)


def who_is_to_leave_ends_as_asked(patch: Patch) -> None:
    """A leaver that has not handed over serves, and its exit is a loss."""

    def leaves(self: RankReports, rank: int) -> bool:
        change = self._cluster.membership.change
        idle = self._cluster.membership.phase is Phase.IDLE
        return change is not None and not idle and rank in change.leaving

    patch.setattr(RankReports, "_was_asked_to", leaves)


BROKEN: Iterable[Callable[[Patch], None]] = (
    who_ended_long_ago_is_killed,
    who_is_to_leave_ends_as_asked,
    a_plan_is_committed_before_all_are_prepared,
    survivors_are_not_halted,
    a_loss_is_ignored,
    a_plan_is_not_withdrawn,
    who_never_gets_ready_is_let_be,
    an_id_is_free_before_its_process_is_gone,
    a_leaver_is_stopped_before_it_has_handed_over,
    a_leaver_is_stopped_while_its_kv_is_read,
    tokens_count_whoever_they_are_from,
    experts_of_the_dead_stay_there,
    an_epoch_is_used_twice,
    a_request_goes_on_one_token_too_late,
    requests_of_the_dead_stay_there,
    a_request_is_given_to_two,
    nobody_comes_back,
    who_is_silent_is_let_be,
    who_hangs_is_let_be,
    lost_experts_are_not_loaded,
    any_number_of_ranks_will_do,
    who_cannot_hold_all_goes_on,
    a_head_that_was_held_up_blames_the_ranks,
)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("broken", BROKEN, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_found(broken: Callable[[Patch], None], monkeypatch: Patch) -> None:
    broken(monkeypatch)
    for seed in range(FOUND_WITHIN):
        try:
            simulation.history(seed)
        except Violation:
            return
    raise AssertionError(f"not found in {FOUND_WITHIN} histories")


def newcomers_are_taken_to_be_anywhere(patch: Patch) -> None:
    """Replicas go by the machines that newcomers turn out to be on."""
    patch.setattr(ChangeActions, "_place_newcomers", lambda *_: None)


def machines_do_not_count(patch: Patch) -> None:
    """Replicas of an expert are on several machines."""

    def anywhere(*given: Any, machines: Any = None, **known: Any) -> Placement:
        return replan(*given, **known)

    patch.setattr(coverage, "replan", anywhere)


@pytest.mark.parametrize(
    "broken",
    [newcomers_are_taken_to_be_anywhere, machines_do_not_count],
    ids=lambda rule: rule.__name__,
)
def test_a_broken_rule_of_machines_is_found(
    broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    broken(monkeypatch)
    with pytest.raises(Violation, match="alone has some experts"):
        histories(range(MACHINES_FROM, MACHINES_FROM + 200))


def test_whole_machines_are_lost_and_every_invariant_holds() -> None:
    assert histories(range(MACHINES_FROM, MACHINES_FROM + 200)) > 0
