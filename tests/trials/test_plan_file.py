"""Plan files: what they may say, and what is said about those that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexpert.errors import ConfigError
from flexpert.trials.plan.plan_file import PlanPhase, load, parse, random_plan


def test_a_plan_says_who_is_up_and_who_dies() -> None:
    plan = parse([[0, 1], [3, 1, -2, 0], {"ranks": [0, 3], "kill": [0]}, [3]])
    assert plan == [
        PlanPhase((0, 1)),
        PlanPhase((0, 1, 2, 3), (2,)),
        PlanPhase((0, 3), (0,)),
        PlanPhase((3,)),
    ]
    assert str(plan[1]) == "0 1 2† 3"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "list of phases"),
        ([], "list of phases"),
        ([[]], "phase 1: no ranks"),
        ([[0], 1], "phase 2: expected a list"),
        ([[0, "1"]], "'1' is not a rank id"),
        ([[0, True]], "True is not a rank id"),
        ([[0, 256]], "256 is not a rank id"),
        ([[0, 1, -1]], "twice"),
        ([[-1, -2]], "somebody has to survive"),
        ([{"ranks": [0, 1], "kill": [2]}], "rank 2 is to be killed"),
        ([{"rank": [0]}], "'rank' is not"),
        ([[0, -1], [1]], "phase 2: nobody of phase 1 is left"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_place(plan: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(plan)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read plan .*none\.json"):
        load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("[[0")
    with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
        load(tmp_path / "broken.json")


def test_the_examples_are_plans() -> None:
    examples = sorted((Path(__file__).parents[2] / "examples" / "plans").glob("*.json"))
    assert len(examples) >= 3
    for example in examples:
        load(example)


def test_random_plans_are_plans_and_repeat_by_seed() -> None:
    for seed in range(300):
        plan = random_plan(seed)
        assert plan == random_plan(seed)
        written = [{"ranks": list(phase.ranks), "kill": list(phase.kill)} for phase in plan]
        assert parse(written) == plan
