"""Placements are balanced, complete, and change with the fewest loads."""

from __future__ import annotations

from collections import Counter

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


layouts = st.dictionaries(st.integers(0, 15), st.sampled_from("abcd"), min_size=2, max_size=10)


def survives_any_machine(machines: dict[int, str]) -> bool:
    """Whether two replicas of each expert can be on two machines if ranks have equal shares: none
    has more than half of the ranks."""
    return 2 * max(Counter(machines.values()).values()) <= len(machines)


@settings(max_examples=300, deadline=None)
@given(
    history=st.lists(layouts.filter(survives_any_machine), min_size=1, max_size=5),
    experts=st.integers(1, 24),
    lost=st.lists(st.integers(0, 15), max_size=5),
)
def test_no_machine_has_both_replicas_of_an_expert_through_joins_leaves_and_losses(
    history: list[dict[int, str]], experts: int, lost: list[int]
) -> None:
    placement: Placement | None = None
    for turn, machines in enumerate(history):
        placement = replan(
            placement, machines, experts=experts, layers=2, redundant=experts, machines=machines
        )
        for layer in placement.layers:
            counts = [len(held) for held in layer.values()]
            assert max(counts) - min(counts) <= 1
            assert sum(counts) == 2 * experts
        for name in set(machines.values()):
            left = [rank for rank in machines if machines[rank] != name]
            assert keep(placement, left).missing() == [], f"machine {name} is lost"
        again = replan(
            placement, machines, experts=experts, layers=2, redundant=experts, machines=machines
        )
        assert not any(loads(placement, again).values())
        survivors = [rank for rank in placement.ranks if rank not in lost[turn : turn + 1]]
        placement = cover(placement, survivors)


@settings(max_examples=200, deadline=None)
@given(
    history=st.lists(layouts, min_size=1, max_size=4),
    experts=st.integers(1, 16),
    redundant=st.integers(0, 40),
)
def test_any_layout_is_balanced_and_whole(
    history: list[dict[int, str]], experts: int, redundant: int
) -> None:
    placement: Placement | None = None
    for machines in history:
        placement = replan(
            placement, machines, experts=experts, layers=2, redundant=redundant, machines=machines
        )
        desired = copies_of(experts, redundant, len(machines))
        for layer in placement.layers:
            every = [expert for held in layer.values() for expert in held]
            assert [every.count(expert) for expert in range(experts)] == desired
            assert all(len(set(held)) == len(held) for held in layer.values())
            counts = [len(held) for held in layer.values()]
            assert max(counts) - min(counts) <= 1


@given(history=st.lists(rank_sets, min_size=1, max_size=5), redundant=st.integers(0, 30))
def test_one_machine_is_as_no_machines(history: list[set[int]], redundant: int) -> None:
    plain: Placement | None = None
    named: Placement | None = None
    for ranks in history:
        one = dict.fromkeys(ranks, "a")
        plain = replan(plain, ranks, experts=9, layers=2, redundant=redundant)
        named = replan(named, ranks, experts=9, layers=2, redundant=redundant, machines=one)
        assert plain == named
        for viewer in ranks:
            assert plain.owners(1, viewer) == named.owners(1, viewer, one)


def test_a_machine_that_joins_takes_second_replicas_and_nothing_else_moves() -> None:
    machines = {rank: "abc"[rank // 2] for rank in range(6)}
    two = [0, 1, 2, 3]
    before = replan(None, two, experts=12, layers=1, redundant=12, machines=machines)
    after = replan(before, machines, experts=12, layers=1, redundant=12, machines=machines)
    assert {rank: len(new) for rank, new in loads(before, after).items()} == {
        0: 0,
        1: 0,
        2: 0,
        3: 0,
        4: 4,
        5: 4,
    }


@given(machines=layouts, experts=st.integers(1, 24), redundant=st.integers(0, 60))
def test_a_viewer_uses_the_nearest_replica(
    machines: dict[int, str], experts: int, redundant: int
) -> None:
    placement = replan(
        None, machines, experts=experts, layers=1, redundant=redundant, machines=machines
    )
    (layer,) = placement.layers
    for viewer in machines:
        owners, slots = placement.owners(0, viewer, machines)
        for expert, (owner, slot) in enumerate(zip(owners, slots, strict=True)):
            assert layer[owner][slot] == expert
            holders = [rank for rank in layer if expert in layer[rank]]
            near = [rank for rank in holders if machines[rank] == machines[viewer]]
            assert owner in (near or holders)
            assert owner == viewer or viewer not in holders


def test_viewers_of_a_machine_spread_over_its_replicas() -> None:
    machines = {rank: "ab"[rank % 2] for rank in range(8)}
    held = {rank: [0] if rank in (0, 2, 1) else [] for rank in machines}
    placement = Placement(1, [held])
    used = {rank: placement.owners(0, rank, machines)[0][0] for rank in machines}
    assert (used[0], used[2]) == (0, 2)
    assert {used[4], used[6]} == {0, 2}, "the ids of a machine may all be even"
    assert {used[rank] for rank in (1, 3, 5, 7)} == {1}
