"""A small crowd of clients, most of them a nuisance, while the ranks change: tools/crowd.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "crowd.py"


@pytest.mark.slow
def test_a_crowd_that_leaves_in_the_middle_costs_nobody_an_answer(tmp_path: Path) -> None:
    out = tmp_path / "crowd.json"
    size = ["--clients", "16", "--changes", "2", "--warmup", "1", "--requests", "16"]
    pace = ["--every-s", "0.6", "--slow-s", "1.5", "--max-tokens", "40"]
    run = subprocess.run(
        [sys.executable, str(TOOL), *size, *pace, "--json", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert result["lost"] == result["altered"] == result["server_errors"] == 0
    assert result["changes"] == {"done": 2}
    assert result["whole"] > 0
    assert result["slow"] > 0
    assert any("reset" in how for how in result["cut"])
    assert result["unfinished"] == 0
