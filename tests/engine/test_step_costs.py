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
        assert not costs.due(rows), "steps without proposed tokens are measured first"
        costs.note(rows, 0, without)
    assert costs.due(rows)
    for _ in range(4):
        assert costs.pays(rows, drafted, 1, 0.0), "steps with them are not known yet"
        costs.note(rows + drafted, 1, together)
    return costs


@pytest.mark.parametrize("hoped", [0.5, 4.0, 30.0])
def test_what_may_come_true_must_be_worth_what_a_step_takes_longer(hoped: float) -> None:
    costs = known(64, 4.0, 64, 5.0)
    costs.note(128, 1, 500.0)  # something else was slow
    assert costs.pays(64, 64, 1, hoped) == (hoped > 16)


def test_where_it_does_not_pay_it_is_tried_again_after_longer_and_longer_pauses() -> None:
    costs = known(4, 1.0, 4, 2.0)
    proposed, pauses = 0, 0
    for _ in range(2000):
        if costs.due(4):
            proposed += costs.pays(4, 4, 1, 2.0)
        else:
            pauses += 1
    assert 8 * 4 <= proposed <= 8 * 8
    assert pauses > 1900
    while not costs.due(4):
        pass
    assert all(costs.pays(4, 4, 1, 2.0) for _ in range(8))
    assert costs.pays(4, 4, 1, 4.1), "and goes on if what is proposed comes true by now"
