"""Placements are balanced, complete, and change with the fewest loads."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.moe.placement import Placement, copies_of, cover, keep, loads, replan

rank_sets = st.sets(st.integers(0, 15), min_size=1, max_size=9)


def fewest_loads(before: dict[int, list[int]], after: set[int], experts: int) -> int:
    """Independent lower bound of one layer, tried over every way to hand out the larger shares."""
    share, extra = divmod(experts, len(after))
    held = sorted((len(before.get(rank, [])) for rank in after), reverse=True)
    kept = sum(min(count, share + (at < extra)) for at, count in enumerate(held))
    return experts - kept


@given(history=st.lists(rank_sets, min_size=1, max_size=6), experts=st.integers(1, 40))
def test_every_expert_has_an_owner_and_shares_differ_by_at_most_one(
    history: list[set[int]], experts: int
) -> None:
    placement: Placement | None = None
    for ranks in history:
        placement = replan(placement, ranks, experts=experts, layers=3)
        assert placement.ranks == sorted(ranks)
        assert placement.missing() == []
        for layer in placement.layers:
            held = sorted(expert for experts_of in layer.values() for expert in experts_of)
            assert held == list(range(experts))
            counts = [len(experts_of) for experts_of in layer.values()]
            assert max(counts) - min(counts) <= 1


@given(history=st.lists(rank_sets, min_size=2, max_size=6), experts=st.integers(1, 40))
def test_a_change_loads_the_fewest_experts(history: list[set[int]], experts: int) -> None:
    before = replan(None, history[0], experts=experts, layers=2)
    for ranks in history[1:]:
        after = replan(before, ranks, experts=experts, layers=2)
        loaded = sum(map(len, loads(before, after).values()))
        assert loaded == sum(fewest_loads(layer, ranks, experts) for layer in before.layers)
        before = after


@given(ranks=rank_sets, experts=st.integers(1, 40))
def test_the_same_ranks_again_move_nothing(ranks: set[int], experts: int) -> None:
    before = replan(None, ranks, experts=experts, layers=3)
    after = replan(before, ranks, experts=experts, layers=3)
    assert not any(loads(before, after).values())


@given(ranks=rank_sets, experts=st.integers(1, 40))
def test_tables_lead_to_the_slot_that_holds_the_expert(ranks: set[int], experts: int) -> None:
    placement = replan(None, ranks, experts=experts, layers=2)
    for viewer in ranks:
        for layer in range(2):
            owners, slots = placement.owners(layer, viewer)
            for expert, (rank, slot) in enumerate(zip(owners, slots, strict=True)):
                assert placement.layers[layer][rank][slot] == expert


@given(
    history=st.lists(rank_sets, min_size=1, max_size=6),
    experts=st.integers(1, 24),
    redundant=st.integers(0, 60),
)
def test_replicas_lie_on_distinct_ranks_and_are_balanced(
    history: list[set[int]], experts: int, redundant: int
) -> None:
    placement: Placement | None = None
    for ranks in history:
        placement = replan(placement, ranks, experts=experts, layers=2, redundant=redundant)
        assert placement.missing() == []
        desired = copies_of(experts, redundant, len(ranks))
        most = experts * len(ranks)
        assert sum(desired) == min(most, experts + redundant) or max(desired) == len(ranks)
        for layer in placement.layers:
            every = [expert for held in layer.values() for expert in held]
            assert [every.count(expert) for expert in range(experts)] == desired
            assert all(len(set(held)) == len(held) for held in layer.values())
            counts = [len(held) for held in layer.values()]
            assert max(counts) - min(counts) <= 1
        again = replan(placement, ranks, experts=experts, layers=2, redundant=redundant)
        assert not any(loads(placement, again).values())


@given(
    ranks=st.sets(st.integers(0, 15), min_size=2, max_size=8),
    experts=st.integers(1, 24),
    redundant=st.integers(0, 60),
    data=st.data(),
)
def test_a_loss_loads_only_what_nobody_holds(
    ranks: set[int], experts: int, redundant: int, data: st.DataObject
) -> None:
    before = replan(None, ranks, experts=experts, layers=2, redundant=redundant)
    left = ranks - {data.draw(st.sampled_from(sorted(ranks)))}
    after = cover(before, left)
    assert after.missing() == []
    assert after.ranks == sorted(left)
    unheld = sum(
        len(set(range(experts)).difference(*(layer[rank] for rank in left)))
        for layer in before.layers
    )
    assert sum(map(len, loads(before, after).values())) == unheld
    kept = keep(before, left)
    assert not any(loads(before, kept).values())
    assert len(kept.missing()) == unheld
    assert loads(kept, cover(kept, left)) == loads(before, after)
    if redundant >= experts:
        assert unheld == 0


def test_layers_share_the_remainder_so_that_ranks_hold_about_the_same() -> None:
    placement = replan(None, [0, 1, 2], experts=16, layers=6)
    assert [placement.count(rank) for rank in placement.ranks] == [32, 32, 32]


def test_a_viewer_uses_its_own_replica_and_others_spread() -> None:
    placement = Placement(1, [{0: [0], 1: [], 2: [0]}])
    assert placement.owners(0, 0) == ([0], [0])
    assert placement.owners(0, 2) == ([2], [0])
    assert {placement.owners(0, viewer)[0][0] for viewer in (1, 3, 4)} == {0, 2}


def test_experts_with_fewer_replicas_than_asked_for_are_counted() -> None:
    placement = Placement(3, [{0: [0, 1], 1: [0]}, {0: [2], 1: [2]}])
    assert placement.thinner_than([2, 2, 1]) == 1, "those that nobody holds are counted elsewhere"
    assert placement.thinner_than([1, 1, 1]) == 0


def test_experts_without_an_owner_are_named() -> None:
    assert Placement(3, [{0: [1]}]).missing() == [(0, 0), (0, 2)]
    assert Placement(2, [{0: [0]}]).owners(0, 0) == ([0, -1], [0, -1])


@settings(max_examples=200, deadline=None)
@given(
    machines=st.integers(2, 4),
    each=st.integers(1, 3),
    experts=st.integers(4, 24),
    gone=st.integers(0, 11),
)
def test_two_replicas_of_an_expert_are_on_two_machines(
    machines: int, each: int, experts: int, gone: int
) -> None:
    hosts = {rank: f"host{rank % machines}" for rank in range(machines * each)}
    ranks = set(hosts)
    before = replan(None, ranks, experts=experts, layers=2, redundant=experts, machines=hosts)
    later = replan(
        cover(before, ranks - {gone % len(ranks)}) if len(ranks) > 1 else before,
        ranks,
        experts=experts,
        layers=2,
        redundant=experts,
        machines=hosts,
    )
    for placement in (before, later):
        for layer in placement.layers:
            assert max(map(len, layer.values())) - min(map(len, layer.values())) <= 1
            for expert in range(experts):
                holders = [rank for rank in layer if expert in layer[rank]]
                assert len(holders) == 2
                assert len({hosts[rank] for rank in holders}) == 2
