"""Tokens are proposed where steps with them were measured to say more in the same time."""

from __future__ import annotations

import math

import pytest

from flexpert.engine.device_profile import captured_shapes
from flexpert.engine.step_costs import DraftPhases, StepCosts
from flexpert.kernels.step_shapes import graph_size


def test_rows_are_padded_as_steps_are_captured() -> None:
    sizes = [shape.tokens for shape in captured_shapes(512, 64) if shape.decodes]
    for rows in range(1, 513):
        assert graph_size(rows) == min(size for size in sizes if size >= rows)


def measured(sequences: int, without: float, said: int, together: float) -> float:
    costs = StepCosts("mtp")
    for _ in range(4):
        costs.note(sequences, without)
    for _ in range(20):
        costs.note(sequences, together, said)
    return costs.saved


def test_what_came_true_must_be_worth_what_a_step_takes_longer() -> None:
    assert measured(64, 4.0, 79, 5.0) == pytest.approx(79 * 4.0 - 64 * 5.0) == -4.0
    assert measured(64, 4.0, 81, 5.0) == pytest.approx(4.0)
    assert measured(3, 2.0, 3, 2.5) == pytest.approx(-1.5), "nothing came true"


def test_a_step_that_something_else_held_up_says_little() -> None:
    costs = StepCosts("mtp")
    for seconds in (1.0, 1.0, 500.0, *[1.0] * 20):
        costs.note(4, seconds)
    for seconds in (1.5, 1.5, 900.0, *[1.5] * 60):
        costs.note(4, seconds, 8)
    assert costs.saved == pytest.approx(2.0, abs=0.2)


def test_numbers_of_sequences_between_two_that_were_timed_are_known_and_others_are_not() -> None:
    for between, known in ((3, True), (1, False), (5, False)):
        costs = StepCosts("mtp")
        costs.note(2, 1.0)
        costs.note(4, 2.0)
        for _ in range(20):
            costs.note(between, 1.0, 2 * between)
        assert math.isnan(costs.saved) != known
    assert StepCosts("ngram").saved == 0.0, "where nothing was proposed nothing was lost"


def turns(phases: DraftPhases, steps: int, saved: list[float]) -> list[int]:
    """How long each phase lasted; the last one still lasts."""
    lengths, before = [0], phases.on
    for _ in range(steps):
        phases.passed(saved)
        lengths[-1] += 1
        if phases.on != before:
            lengths.append(0)
            before = phases.on
    return lengths


def test_where_it_does_not_pay_it_is_tried_again_after_longer_and_longer_pauses() -> None:
    phases = DraftPhases()
    assert turns(phases, 40, [math.nan])[:2] == [32, 8], "first steps without are timed"
    lengths = turns(phases, 3000, [-1.0, 0.5])
    trials, pauses = lengths[::2], lengths[1::2]
    assert set(trials[:-1]) == {24}
    assert pauses[:7] == [32, 64, 128, 256, 512, 512, 512]
    while not phases.on:
        phases.passed([])
    lengths = turns(phases, 2000, [-1.0, 1.5])
    assert lengths[:10] == [32, 8, 64, 8, 128, 8, 256, 8, 512, 8], "and goes on if it pays by now"


def test_ranks_agree_in_whatever_order_they_hear_of_each_other() -> None:
    said = [1.0, 1e16, -1e16, -0.5]
    one, other = DraftPhases(), DraftPhases()
    assert sum(said) < 0 < sum(reversed(said)), "sums of floats depend on their order"
    for _ in range(400):
        one.passed(said)
        other.passed(reversed(said))
        assert one.on == other.on
    for phases in (one, other):
        phases.begin()
        assert phases.on
