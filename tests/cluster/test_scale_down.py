"""Who leaves when fewer ranks are asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.cluster.operation import TargetRequest
from flexpert.cluster.scale_down import Candidate, leave_order


def ranks(**machines: int) -> list[Candidate]:
    """So many on each machine, with ids in turn."""
    names = [name for name, count in machines.items() for _ in range(count)]
    return [Candidate(number, name) for number, name in enumerate(names)]


def test_on_one_machine_the_highest_ids_leave() -> None:
    assert leave_order(ranks(a=4)) == [3, 2, 1, 0]


def test_the_smallest_machine_is_emptied_before_the_next_is_touched() -> None:
    assert leave_order(ranks(a=2, b=1, c=3)) == [2, 1, 0, 5, 4, 3]


def test_the_heads_own_leave_before_those_that_have_joined() -> None:
    own, joined = ranks(a=3)[:2], [Candidate(6, "b", joined=True), Candidate(7, "c", joined=True)]
    assert leave_order([*own, *joined]) == [1, 0, 7, 6]


def test_who_fails_leaves_first_wherever_it_is() -> None:
    members = ranks(a=3, b=1)
    members[1] = replace(members[1], failing=True, joined=True, kv_used=1.0)
    assert leave_order(members)[0] == 1


def test_with_redundant_experts_a_second_machine_stays() -> None:
    assert leave_order(ranks(a=3, b=2), least_machines=2)[:3] == [4, 2, 1]
    failing = [replace(one, failing=one.machine == "b") for one in ranks(a=3, b=1)]
    assert leave_order(failing, least_machines=2)[0] == 3


def test_what_was_spread_stays_spread() -> None:
    assert leave_order(ranks(a=3, b=2, c=1), spread=True)[:3] == [2, 4, 1]


def test_of_equals_the_one_with_the_least_kv_then_the_fewest_experts() -> None:
    busy, idle, full, empty = ranks(a=4)
    members = [
        replace(busy, kv_used=0.5),
        replace(idle, kv_used=0.1, experts=9),
        replace(full, kv_used=0.1, experts=3),
        replace(empty, kv_used=0.6),
    ]
    assert leave_order(members) == [2, 1, 0, 3]


members = st.lists(
    st.builds(
        Candidate,
        id=st.integers(0, 30),
        machine=st.sampled_from("abcd"),
        failing=st.booleans(),
        joined=st.booleans(),
        kv_used=st.sampled_from((0.0, 0.5)),
        experts=st.integers(0, 2),
    ),
    unique_by=lambda one: one.id,
)


@given(members, st.booleans(), st.integers(1, 3))
def test_everybody_has_one_place_whatever_order_they_come_in(
    found: list[Candidate], spread: bool, least: int
) -> None:
    order = leave_order(found, spread=spread, least_machines=least)
    assert sorted(order) == sorted(one.id for one in found)
    assert leave_order(found[::-1], spread=spread, least_machines=least) == order
    failing = {one.id for one in found if one.failing}
    assert set(order[: len(failing)]) == failing


@given(members, st.integers(1, 8))
def test_no_other_choice_leaves_fewer_machines(found: list[Candidate], stay: int) -> None:
    alike = [Candidate(one.id, one.machine) for one in found]
    left = set(leave_order(alike)[: max(0, len(alike) - stay)])
    sizes = sorted(Counter(one.machine for one in alike).values(), reverse=True)
    fewest = next((n for n in range(len(sizes) + 1) if sum(sizes[:n]) >= min(stay, len(alike))), 0)
    assert len({one.machine for one in alike if one.id not in left}) == fewest


@pytest.mark.parametrize(
    ("wish", "after", "same"),
    [
        ({"ranks": 2}, {0, 3}, True),  # whoever it was that left
        ({"ranks": 2}, {0, 1, 3}, False),
        ({"ranks": 4}, {0, 1, 2, 3}, True),
        ({"ranks": 4}, {0, 1, 3}, False),
        ({"ranks": 5}, {0, 1, 2, 3, 4}, True),
        ({"remove": (1,)}, {0, 2, 3}, True),
        ({"remove": (1,)}, {0, 1, 2}, False),
        ({"remove": (7,)}, {0, 1, 2}, False),
    ],
)
def test_asking_for_the_same_number_again_is_the_same_change(
    wish: dict[str, object], after: set[int], same: bool
) -> None:
    request = TargetRequest(**{"ranks": None, "add": 0, "remove": (), **wish})  # type: ignore[arg-type]
    before = frozenset({0, 1, 2, 3})
    assert request.led_to(before, frozenset(after), 8, ()) is same
