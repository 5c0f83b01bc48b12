"""`flexpert chaos`: a short run in which nothing may be lost, and what it makes of what it sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexpert.cli.chaos import parse_faults
from flexpert.cli.chaos_report import Fault, Seen, rates, sparkline, spread, times_of
from flexpert.cli.main import app
from flexpert.errors import ConfigError


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_nothing_is_lost_in_a_short_run(tmp_path: Path) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "run.svg"
    flags = ["--ranks", "3", "--clients", "6", "--requests", "12", "--duration", "8"]
    chosen = ["--faults", "kill,stop", "--rate", "0.7", "--seed", "4", "--during-scaling"]
    files = ["--json", str(out), "--plot", str(plot)]
    shown = CliRunner().invoke(
        app, ["chaos", *flags, *chosen, *files, "--", "--stall-timeout-s", "1"]
    )
    assert shown.exit_code == 0, shown.output
    assert "PASS" in shown.output
    result = json.loads(out.read_text())
    assert result["lost"] == result["altered"] == 0
    assert result["sent"] == result["answered"] > 0
    assert sum(result["faults"].values()) >= 3
    assert result["times"]["kill"]["full_capacity"]["count"] >= 1
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--faults", "kill,flood"], "unknown fault 'flood'; choose from kill, stop, slow, oom"),
        (["--faults", ","], "no fault is named"),
        (["--faults", "partition"], "there is no network to cut"),
        (["--plot", "chart.pdf"], "must end with"),
        (["--json", "/nowhere/run.json"], "there is no folder /nowhere"),
        (["--url", "http://127.0.0.1:1", "--", "--ranks", "2"], "leave out --url"),
        (["--url", "http://127.0.0.1:1"], "no connection to 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_said(flags: list[str], says: str) -> None:
    shown = CliRunner().invoke(app, ["chaos", *flags])
    assert shown.exit_code != 0
    assert says in " ".join((shown.output + str(shown.exception or "")).split())


def test_faults_are_named_once() -> None:
    assert parse_faults("stop, kill,stop") == ("stop", "kill")
    with pytest.raises(ConfigError):
        parse_faults("")


def test_the_times_of_a_fault() -> None:
    seen = Seen(began=100.0, faults=[Fault("kill", 2, 101.0), Fault("slow", 1, 101.0)])
    seen.on_tokens(101.005, 3)
    seen.on_gone(1, 101.0)  # slow ranks are not expected to go
    seen.on_gone(2, 101.01)
    seen.on_epoch([0, 1, 3], 101.04, wanted=4)
    seen.on_tokens(101.05, 2)
    seen.on_epoch([0, 1, 2, 3], 101.3, wanted=4)
    times = times_of(seen.faults)
    assert list(times) == ["kill"]
    found = times["kill"]
    for part, expected in (
        (found.detect, 10.0),
        (found.epoch, 40.0),
        (found.first_good_step, 50.0),
        (found.full_capacity, 300.0),
    ):
        assert part is not None
        assert part.median_ms == expected
    assert rates(seen, 101.1)[10] == 50.0


def test_a_fault_without_effect_is_not_blamed_for_a_later_death() -> None:
    seen = Seen(faults=[Fault("oom", 0, 1.0), Fault("kill", 0, 9.0)])
    seen.on_gone(0, 9.01)
    assert [fault.gone for fault in seen.faults] == [None, 9.01]


def test_spreads_and_bars() -> None:
    assert spread([]) is None
    found = spread([0.001 * n for n in range(1, 11)])
    assert found is not None
    assert (found.median_ms, found.p90_ms, found.longest_ms) == (5.5, 10.0, 10.0)
    assert sparkline([]) == ""
    assert sparkline([0.0, 1.0]) == "▁█"
    assert len(sparkline([1.0] * 1000)) <= 72
