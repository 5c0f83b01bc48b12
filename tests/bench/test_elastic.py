"""`flexpert bench elastic`: what it makes of arrivals, and a short run with a change and a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexpert.bench.elastic import back_s, silences_after
from flexpert.cli.bench_elastic import path_of
from flexpert.errors import ConfigError


def every(step: float, begin: float, end: float) -> list[float]:
    return [begin + step * n for n in range(round((end - begin) / step))]


def test_the_first_token_after_a_kill_ends_the_first_silence_of_several_steps() -> None:
    arrivals = [*every(0.01, 0, 5.0), *every(0.01, 5.1, 5.3), *every(0.01, 5.6, 7.0)]
    first, longest = silences_after(arrivals, 5.0, within_s=0.5, step_s=0.01)
    assert first == pytest.approx(0.1, abs=0.02)
    assert longest == pytest.approx(0.31, abs=0.02)
    assert silences_after(arrivals, 1.0, within_s=0.5, step_s=0.01)[0] == pytest.approx(0, abs=0.02)
    assert silences_after(arrivals, 10.0, within_s=0.5, step_s=0.01) == (float("inf"), float("inf"))


def test_throughput_is_back_when_it_stays() -> None:
    arrivals = [*every(0.01, 0, 5.0), *every(0.02, 5.0, 7.0), *every(0.01, 7.0, 12.0)]
    found = back_s(arrivals, 5.0, 12.0, desired=95.0)
    assert found is not None
    assert 1.8 <= found <= 2.1
    assert back_s(arrivals, 5.0, 7.0, desired=95.0) is None


def test_a_range_of_ranks_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "flexpert", "bench", "elastic", "--low", "2", "--high", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--low (2) is not below --high (2)" in done.stderr


@pytest.mark.parametrize("text", ["2", "2,2", "2,0", "1;2", "2,,3", ""])
def test_a_path_that_is_none_is_refused(text: str) -> None:
    assert path_of("2,4,3") == (2, 4, 3)
    with pytest.raises(ConfigError, match="as in 2,4,3"):
        path_of(text)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_path_is_gone_along(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "flexpert", "bench", "elastic", "--output", str(report)]
    command += ["--path", "1,3,2", "--clients", "4", "--tokens", "40", "--undisturbed", "1s"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [(change["label"], change["ranks"]) for change in found["changes"]] == [
        ("up", 3),
        ("down", 2),
    ]
    assert [steady["ranks"] for steady in found["steady"]] == [1, 3, 2]
    assert all(steady["tokens_per_s"] > 0 for steady in found["steady"])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_run_loses_nothing_and_says_what_happened(tmp_path: Path) -> None:
    report, page, plot = (tmp_path / name for name in ("report.json", "page.html", "plot.png"))
    command = [sys.executable, "-m", "flexpert", "bench", "elastic", "--output", str(report)]
    command += ["--clients", "4", "--tokens", "40", "--changes", "2", "--kills", "1"]
    command += ["--swaps", "1", "--page", str(page), "--plot", str(plot)]
    command += ["--undisturbed", "1s", "--", "--log-level", "debug", "--deterministic"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [change["ranks"] for change in found["changes"]] == [2, 1, 1]
    assert [change["state"] for change in found["changes"]] == ["done"] * 3
    assert all(change["pause_ms"] is not None for change in found["changes"][:2])
    events = found["timeline"]["events"]
    assert [event["label"] for event in events] == ["up", "down", "swap", "kill"]
    assert 0 < events[3]["detect_s"] < events[3]["full_s"]
    assert found["altered"] == 0
    assert "swap: a rank joins, another leaves" in page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    (kill,) = found["kills"]
    assert 0 < kill["first_token_s"] < kill["whole_s"] + 5
    assert found["answers"] > 0
    assert not found["lost"]
    assert any("has switched: pause" in line for line in found["log"])
