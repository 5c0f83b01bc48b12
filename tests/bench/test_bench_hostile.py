"""`flexpert bench hostile`: a short run over a real service tells what came back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexpert.bench.hostile_bodies import HEAVY, heavy
from flexpert.cli.main import app


@pytest.mark.slow
def test_a_short_run_measures_both_and_finds_no_server_error(tmp_path: Path) -> None:
    out = tmp_path / "hostile.json"
    size = ["--duration", "1", "--max-body", "64KiB", "--streams", "2", "--clients", "4"]
    run = CliRunner().invoke(
        app,
        ["bench", "hostile", *size, "--after", "0.5", "--output", str(out)],
        env={"COLUMNS": "120"},
    )
    assert run.exit_code == 0, run.output
    assert "ratio" in run.output
    report = json.loads(out.read_text())
    assert report["server_errors"] == 0
    for kind in ("ordinary", "hostile"):
        assert report[kind]["tokens_per_s"] > 0
        assert report[kind]["stream_errors"] == []
    assert set(report["ordinary"]["clients"]["statuses"]) == {"200"}
    assert {"200", "400"} <= set(report["hostile"]["clients"]["statuses"])
    assert report["memory"]["highest"] >= report["memory"]["before"] > 0
    ratio = report["hostile"]["tokens_per_s"] / report["ordinary"]["tokens_per_s"]
    assert report["ratio"] == pytest.approx(ratio, abs=0.002)


@pytest.mark.parametrize("size", ["17MiB", "10", "much"])
def test_a_size_that_no_body_may_have_is_refused_at_once(size: str) -> None:
    run = CliRunner().invoke(app, ["bench", "hostile", "--max-body", size])
    assert run.exit_code != 0
    assert "--max-body" in str(run.exception)


def test_bodies_are_a_function_of_the_seed_and_within_the_size() -> None:
    first, again, other = heavy(1, 5000), heavy(1, 5000), heavy(2, 5000)
    drawn = [next(first) for _ in range(20)]
    assert drawn == [next(again) for _ in range(20)]
    assert drawn != [next(other) for _ in range(20)]
    for name, (_, make) in HEAVY.items():
        assert len(make(50_000)) <= 50_100, name
