"""Tokens are proposed where steps with them were measured to say more in the same time."""

from __future__ import annotations

import pytest

from flexpert.engine.device_profile import captured_shapes
from flexpert.engine.step_costs import StepCosts
from flexpert.kernels.step_shapes import graph_size


def test_rows_are_padded_as_steps_are_captured() -> None:
    sizes = [shape.tokens for shape in captured_shapes(512, 64) if shape.decodes]
    for rows in range(1, 513):
        assert graph_size(rows) == min(size for size in sizes if size >= rows)


def known(rows: int, without: float, drafted: int, together: float) -> StepCosts:
    costs = StepCosts()
    for _ in range(4):
        assert not costs.due(rows, ahead=True), "steps without proposed tokens are measured first"
        costs.note(rows, 0, without, ahead=True)
    assert costs.due(rows, ahead=True)
    for _ in range(4):
        assert costs.pays(rows, drafted, 1, 0.0, ahead=True), "steps with them are not known yet"
        costs.note(rows + drafted, 1, together, ahead=True)
    return costs


@pytest.mark.parametrize("hoped", [0.5, 4.0, 30.0])
def test_what_may_come_true_must_be_worth_what_a_step_takes_longer(hoped: float) -> None:
    costs = known(64, 4.0, 64, 5.0)
    costs.note(128, 1, 500.0, ahead=True)  # something else was slow
    assert costs.pays(64, 64, 1, hoped, ahead=True) == (hoped > 16)


def test_where_it_does_not_pay_it_is_tried_again_after_longer_and_longer_pauses() -> None:
    costs = known(4, 1.0, 4, 2.0)
    proposed, pauses = 0, 0
    for _ in range(2000):
        if costs.due(4, ahead=True):
            proposed += costs.pays(4, 4, 1, 2.0, ahead=True)
        else:
            pauses += 1
    assert 8 * 4 <= proposed <= 8 * 8
    assert pauses > 1900
    while not costs.due(4, ahead=True):
        pass
    assert all(costs.pays(4, 4, 1, 2.0, ahead=True) for _ in range(8))
    assert costs.pays(4, 4, 1, 4.1, ahead=True), "and goes on if what is proposed comes true by now"


def test_steps_that_wait_for_the_tokens_before_are_measured_apart() -> None:
    costs = known(4, 1.0, 4, 1.5)
    assert costs.pays(4, 4, 1, 3.0, ahead=True)
    for _ in range(4):
        assert not costs.due(4, ahead=False)
        costs.note(4, 0, 3.0, ahead=False)
    assert costs.due(4, ahead=False)
    for _ in range(4):
        costs.note(8, 1, 6.0, ahead=False)
    assert not costs.pays(4, 4, 1, 3.0, ahead=False)
