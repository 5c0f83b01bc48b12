"""Experts move when that gains more than it costs, and not back and forth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.cluster.balance_policy import (
    HORIZON_S,
    PAYS,
    REST_S,
    Gain,
    Ground,
    Measured,
    busy_share,
    cost_s,
    first_part,
    judge,
    loads_by_layer,
    rest_s,
    worth_planning,
)
from flexpert.cluster.move_costs import MoveCosts
from flexpert.moe.placement import Placement, replan

MEASURED = Measured(choices_per_s=1000, choice_s=1e-3, per_expert=1000, parallel=4)


def test_steps_wait_for_the_slowest_rank_of_each_layer() -> None:
    even = np.full((2, 4), 10.0)
    assert busy_share(even, MEASURED) == pytest.approx(0.25)
    skewed = np.array([[40.0, 0, 0, 0], [0, 0, 0, 40.0]])
    assert busy_share(skewed, MEASURED) == pytest.approx(1.0), "other layers, other ranks"
    assert busy_share(np.zeros((2, 4)), MEASURED) == 0


def test_ranks_that_share_processors_gain_only_what_those_can_do() -> None:
    two = Measured(choices_per_s=1000, choice_s=1e-3, per_expert=1000, parallel=2)
    skewed, even = np.array([[40.0, 0, 0, 0]]), np.full((1, 4), 10.0)
    assert busy_share(skewed, two) - busy_share(even, two) == pytest.approx(0.5)


def test_what_is_not_measured_is_assumed() -> None:
    unknown = Measured(choices_per_s=1000, choice_s=0.0, per_expert=1000, parallel=4)
    assert busy_share(np.full((2, 4), 10.0), unknown) == pytest.approx(0.5)
    assert busy_share(np.array([[20.0, 10, 5, 5]]), unknown) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("recent", "latest", "cost", "ground"),
    [
        (0.20, 0.20, 1.0, Ground.GAIN),
        (0.02, 0.02, 0.0, Ground.SMALL),
        (0.20, 0.05, 1.0, Ground.UNSTEADY),
        (0.20, 0.20, 0.2 * HORIZON_S / PAYS + 0.01, Ground.DEAR),
        (0.20, 0.20, 0.2 * HORIZON_S / PAYS - 0.01, Ground.GAIN),
        (-0.1, -0.1, 0.0, Ground.SMALL),
    ],
)
def test_a_move_pays_twice_and_under_the_latest_loads_too(
    recent: float, latest: float, cost: float, ground: Ground
) -> None:
    verdict = judge(Gain(0.5, 0.5 - recent), Gain(0.5, 0.5 - latest), cost, at_fixed_times=False)
    assert verdict.ground is ground
    assert verdict.moves == (ground is Ground.GAIN)
    assert verdict.reason


def test_at_fixed_times_no_cost_is_asked_for_but_some_gain() -> None:
    for share, ground in ((0.01, Ground.INTERVAL), (0.001, Ground.BALANCED)):
        gain = Gain(0.5, 0.5 - share)
        assert judge(gain, gain, 1e9, at_fixed_times=True).ground is ground


def test_a_few_tokens_say_nothing_and_even_loads_need_no_plan() -> None:
    few = Measured(choices_per_s=1, choice_s=1e-3, per_expert=3, parallel=4)
    found = worth_planning(Gain(0.5, 0.1), few)
    assert found
    assert found.ground is Ground.IDLE
    found = worth_planning(Gain(0.5, 0.499), MEASURED)
    assert found
    assert found.ground is Ground.BALANCED
    assert worth_planning(Gain(0.5, 0.4), MEASURED) is None


def test_the_rest_is_long_against_the_cost() -> None:
    assert rest_s(0.0) == REST_S
    assert rest_s(10.0) >= 100.0


@given(
    layers=st.integers(1, 6),
    most=st.integers(0, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_parts_lead_to_the_whole_and_load_no_more_than_they_may(
    layers: int, most: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    here = replan(None, range(3), experts=6, layers=layers)
    orders = [draw.permutation(6).tolist() for _ in range(layers)]
    there = Placement(
        6, [{r: sorted(order[2 * r : 2 * r + 2]) for r in range(3)} for order in orders]
    )
    for _ in range(layers + 1):
        if here == there:
            break
        worth = draw.random(layers).tolist()
        after = first_part(here, there, worth, most)
        changed = [i for i in range(layers) if after.layers[i] != here.layers[i]]
        assert changed
        assert all(after.layers[i] == there.layers[i] for i in changed)
        loads = loads_by_layer(here, after)
        if len(changed) > 1:
            assert max(sum(layer[r] for layer in loads) for r in range(3)) <= most
        here = after
    assert here == there


def test_costs_are_what_ranks_measured() -> None:
    costs = MoveCosts()
    assert costs.of_move(10**9) == pytest.approx(1.0), "assumed"
    for _ in range(30):
        costs.moved(10, 0.5)
        costs.paused(0.004)
    costs.moved(0, 5.0)
    assert costs.of_move(10**9) == pytest.approx(0.05)
    before = replan(None, range(2), experts=4, layers=1)
    after = Placement(4, [{0: [2, 3], 1: [0, 1]}])
    assert cost_s(before, after, costs.move_s, costs.pause_s, 2) == pytest.approx(0.104)
    assert cost_s(before, after, costs.move_s, costs.pause_s, 1) == pytest.approx(0.204)
