"""Plans with real processes: every way to die, at every point, over both channels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexpert.cli.main import app
from flexpert.errors import ConfigError
from flexpert.trials.plan import runner
from flexpert.trials.plan.oracle import Sizes
from flexpert.trials.plan.plan_file import PlanPhase, parse, random_plan
from flexpert.trials.plan.worker import POINTS

pytestmark = pytest.mark.slow

HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))
NIXL = pytest.param("nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason="needs flexpert[nixl]"))
SIZES = Sizes(tokens=12, hidden=256, topk=4, experts_per_rank=2, dtype=torch.bfloat16)
# holes from the start, up, a kill, rejoin under the same id, down
PLAN = parse([[0, 2], [0, 1, 2, 3], [0, 1, -2, 3], [0, 2, 3], [2]])


def passes(plan: list[PlanPhase], **options: object) -> list[runner.PhaseResult]:
    given = runner.Options(SIZES, exchanges=5, timeout_s=2.0, **options)  # type: ignore[arg-type]
    results = runner.run(plan, given, lambda _: None)
    assert [result.errors for result in results] == [[] for _ in plan]
    return results


@pytest.mark.parametrize("channel", ["shm", NIXL])
@pytest.mark.parametrize("at", [*POINTS, "random"])
@pytest.mark.parametrize("kill", ["sigkill", "sigstop"])
def test_a_rank_dies_and_its_id_comes_back(channel: str, at: str, kill: str) -> None:
    results = passes(PLAN, channel=channel, at=at, kill=kill, seed=3)
    assert results[3].rejoin_s is not None
    assert len(results[2].detect_s) == 3
    assert results[2].agree_s


def test_the_first_rank_dies_and_two_at_once() -> None:
    passes(
        parse([[0, 1, 2, 3], {"ranks": [0, 1, 2, 3], "kill": [0, 3]}, [0, 1, 2]]), kill="sigterm"
    )


@pytest.mark.parametrize("kill", ["sigkill", "sigstop"])
def test_a_phase_goes_on_until_whoever_shall_die_at_random_is_dead(kill: str) -> None:
    """However few its exchanges are: else nobody would die in it, and it would pass."""
    plan = parse([[0, -1, 2], [0, 1]])
    given = runner.Options(SIZES, "shm", exchanges=1, timeout_s=2.0, kill=kill)
    results = runner.run(plan, given, lambda _: None)
    assert [result.errors for result in results] == [[], []]
    assert len(results[0].detect_s) == 2


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed: int) -> None:
    passes(random_plan(seed), seed=seed, at=POINTS[seed])


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_fp8_on_the_way(scales: str) -> None:
    sizes = Sizes(12, 512, 4, 2, torch.bfloat16)
    options = runner.Options(sizes, fp8=scales, exchanges=3)  # type: ignore[arg-type]
    (result,) = runner.run(parse([[0, 1]]), options, lambda _: None)
    assert result.errors == []


def test_what_a_rank_finds_wrong_fails_the_phase() -> None:
    result = runner.PhaseResult("0", (0,), ())
    outcome = runner.WorkerOutcome(1, (0,), errors=["exchange 0: a combined result is wrong"])
    with runner.Runner(runner.Options(SIZES), 1) as made:
        made.judge(PlanPhase((0,)), {0: outcome}, {}, result)
    assert result.errors == ["rank 0: exchange 0: a combined result is wrong"]


def test_a_report_that_could_not_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text("[[0]]")
    shown = CliRunner().invoke(app, ["plan", str(plan), "--output", str(tmp_path / "no" / "out")])
    assert isinstance(shown.exception, ConfigError)
    assert "there is no folder" in str(shown.exception)


def test_the_command(tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out.json"
    plan.write_text("[[0, 1], [0, -1], [0, 1]]")
    small = ["--tokens", "8", "--hidden", "128", "--exchanges", "3"]
    shown = CliRunner().invoke(app, ["plan", str(plan), *small, "--output", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "PASS" in shown.output
    written = json.loads(out.read_text())
    assert written["pass"] is True
    assert written["options"]["tokens"] == 8
    assert written["machine"]["cores"]
    assert [phase["phase"] for phase in written["runs"][0]["phases"]] == ["0 1", "0 1†", "0 1"]
