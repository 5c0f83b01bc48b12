"""Survivors hold what fits, and in the end every expert again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexpert.cluster.expert_recovery import ExpertRecovery, Fits
from flexpert.moe.placement import Placement, cover, keep, loads, replan


def anything(placement: Placement) -> bool:
    return True


def at_most(count: int) -> Fits:
    return lambda placement: max(map(placement.count, placement.ranks)) <= count


@given(
    ranks=st.sets(st.integers(0, 9), min_size=2, max_size=6),
    experts=st.integers(1, 12),
    redundant=st.integers(0, 24),
    room=st.integers(1, 60),
    degrade=st.booleans(),
    data=st.data(),
)
def test_a_loss_is_survived_within_the_memory_or_not_at_all(
    ranks: set[int],
    experts: int,
    redundant: int,
    room: int,
    degrade: bool,
    data: st.DataObject,
) -> None:
    coverage = ExpertRecovery(experts, 2, redundant, degrade)
    before = replan(None, ranks, experts=experts, layers=2, redundant=redundant)
    left = data.draw(st.sets(st.sampled_from(sorted(ranks)), min_size=1, max_size=len(ranks) - 1))
    fits = at_most(room)
    after = coverage.after_loss(before, left, fits)
    if degrade:
        assert after == keep(before, left), "nothing is loaded, whatever is missing"
        before = after
    elif after is not None:
        assert fits(after)
        assert after.missing() == []
    whole = coverage.whole(before, left, fits)
    if whole is None:
        assert not fits(cover(before, left))
        assert not fits(replan(before, left, experts=experts, layers=2))
        assert not fits(replan(None, left, experts=experts, layers=2))
    else:
        assert whole.missing() == []
        assert whole.ranks == sorted(left)
        if fits(cover(before, left)):
            assert loads(before, whole) == loads(before, cover(before, left))


def test_ranks_that_were_not_there_before_get_their_share() -> None:
    before = replan(None, [0, 1], experts=4, layers=1, redundant=4)
    coverage = ExpertRecovery(4, 1, 4)
    after = coverage.after_loss(before, [0, 2], anything)
    assert after == replan(before, [0, 2], experts=4, layers=1, redundant=4)
    assert coverage.after_loss(None, [3], anything) == replan(None, [3], experts=4, layers=1)
    assert coverage.after_loss(None, [3], at_most(3)) is None


def test_who_has_no_room_for_all_experts_serves_without_some_if_that_is_allowed() -> None:
    before = replan(None, [0, 1], experts=4, layers=1)
    assert ExpertRecovery(4, 1).after_loss(before, [0, 2, 3], at_most(1)) is None
    assert ExpertRecovery(4, 1, degrade=True).after_loss(before, [0, 2, 3], at_most(1)) == keep(
        before, [0, 2, 3]
    )


def test_a_fair_share_is_found_where_history_is_not_fair() -> None:
    history = replan(None, [0, 1, 2], experts=16, layers=4)
    alone = keep(history, [2])
    coverage = ExpertRecovery(16, 4)
    unfair = replan(alone, [0, 1, 2], experts=16, layers=4)
    assert unfair.count(2) == 24
    assert coverage.spread(alone, [0, 1, 2], anything) == unfair
    fair = coverage.spread(alone, [0, 1, 2], at_most(22))
    assert at_most(22)(fair)
    assert fair.missing() == []
    assert coverage.spread(alone, [0, 1, 2], at_most(20)) == unfair


def test_replicas_are_thin_until_they_are_where_they_were_asked_for() -> None:
    coverage = ExpertRecovery(4, 1, redundant=4)
    before = replan(None, [0, 1, 2], experts=4, layers=1, redundant=4)
    assert coverage.under_replicated(before, 3) == 0
    assert coverage.under_replicated(keep(before, [0]), 3) == before.count(0)
    assert ExpertRecovery(4, 1).under_replicated(before, 3) == 0
