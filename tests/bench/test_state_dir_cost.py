"""`flexpert bench state-dir`: as many tokens with as without, and figures of each pair."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flexpert.bench.cost_rounds import CostComparison, CostRound
from flexpert.bench.statistics import Figures


def measured(speed: float, head_us: float, service_us: float) -> CostRound:
    figures = Figures(
        requests=1,
        failed=0,
        duration_s=1.0,
        output_tokens=100,
        requests_per_s=1.0,
        output_tokens_per_s=speed,
        first_token_ms=None,
        inter_token_ms=None,
        end_to_end_ms=None,
    )
    return CostRound(figures=figures, head_us=head_us, service_us=service_us, client_us=10.0)


def test_what_differs_is_compared_in_pairs() -> None:
    """The machine was slower in the second pair, for both."""
    without = [measured(1000, 50, 500), measured(100, 150, 2000), measured(1000, 50, 500)]
    kept = [measured(990, 51, 505), measured(99, 151, 2020), measured(980, 52, 510)]
    cost = CostComparison.of(16, {"without": without, "with": kept})
    assert cost.tokens_ratios == pytest.approx([0.99, 0.99, 0.98])
    assert cost.tokens_ratio == pytest.approx(0.99)
    assert cost.head_us == pytest.approx(1)
    assert cost.service_us == pytest.approx(10)
    assert cost.service_share == pytest.approx(0.01)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_run_has_the_same_number_of_tokens_with_and_without(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # names of sockets must be short
        _measure_shortly(Path(folder))


def _measure_shortly(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "flexpert", "bench", "state-dir", "--output", str(report)]
    command += ["--rounds", "1", "--answers", "1", "--concurrency", "3", "--output-len", "20"]
    command += ["--folder", str(tmp_path), "--", "--ranks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (cost,) = json.loads(report.read_text())["costs"]
    rounds = [one for kind in cost["rounds"].values() for one in kind]
    assert [one["figures"]["output_tokens"] for one in rounds] == [60, 60]
    assert all(one["service_us"] > one["head_us"] > 0 for one in rounds)
    assert list(tmp_path.iterdir()) == [report], "the directory goes with the run"
