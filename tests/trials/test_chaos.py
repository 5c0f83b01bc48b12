"""`flexpert chaos`: a short run in which nothing may be lost, and what it makes of what it sees."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from flexpert.bench.load import call
from flexpert.bench.service import own_service
from flexpert.cli.main import app
from flexpert.cluster.views import ClusterView, RankView
from flexpert.errors import ConfigError
from flexpert.trials.chaos import KINDS, parse_faults
from flexpert.trials.chaos_processes import find_family
from flexpert.trials.chaos_report import (
    ChaosFault,
    Held,
    RankHeld,
    Seen,
    growth,
    rates,
    sparkline,
    spread,
    times_of,
)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_nothing_is_lost_in_a_short_run(tmp_path: Path) -> None:
    out, plot = tmp_path / "run.json", tmp_path / "run.svg"
    flags = ["--ranks", "3", "--clients", "6", "--requests", "12", "--duration", "8"]
    chosen = ["--faults", "kill,oom,partition", "--rate", "0.7", "--seed", "3", "--during-scaling"]
    files = ["--output", str(out), "--plot", str(plot)]
    shown = CliRunner().invoke(
        app, ["chaos", *flags, *chosen, *files, "--", "--stall-timeout", "1"]
    )
    assert shown.exit_code == 0, shown.output
    assert "PASS" in shown.output
    result = json.loads(out.read_text())
    assert result["lost"] == result["altered"] == 0
    assert result["sent"] == result["answered"] > 0
    assert set(result["faults"]) == {"kill", "oom", "partition"}
    assert result["without_effect"] == 0
    assert result["unharmed"] == result["grown"] == []
    assert result["times"]["kill"]["full_capacity"]["count"] >= 1
    assert result["times"]["oom"]["full_capacity"]["count"] >= 1
    assert set(result["before"]["ranks"]) == set(result["after"]["ranks"]) == {"0", "1", "2"}
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--faults", "kill,flood"], "unknown fault 'flood'; choose from kill, stop, slow, oom, p"),
        (["--faults", ","], "no fault is named"),
        (["--plot", "chart.pdf"], "must end with"),
        (["--output", "/nowhere/run.json"], "there is no folder /nowhere"),
        (["--url", "http://127.0.0.1:1", "--", "--ranks", "2"], "leave out --url"),
        (["--url", "http://127.0.0.1:1"], "no connection to 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_done_is_said(flags: list[str], says: str) -> None:
    shown = CliRunner().invoke(app, ["chaos", *flags])
    assert shown.exit_code != 0
    assert says in " ".join((shown.output + str(shown.exception or "")).split())


def test_faults_are_named_once_and_a_service_of_others_gets_signals_only() -> None:
    assert parse_faults("stop, kill,stop", own=True) == ("stop", "kill")
    assert parse_faults(None, own=True) == KINDS
    assert parse_faults(None, own=False) == ("kill", "stop", "slow")
    with pytest.raises(ConfigError):
        parse_faults("", own=True)


def fault(kind: str, rank: int, at: float) -> ChaosFault:
    return ChaosFault(kind, rank, 100 + rank, at)


def gone(
    seen: Seen, rank: int, now: float, *, unasked: bool = False, pid: int | None = None
) -> None:
    seen.on_gone(rank, pid or 100 + rank, now, unasked=unasked, reason="it ended")


def test_the_times_of_a_fault() -> None:
    seen = Seen(began=100.0, faults=[fault("kill", 2, 101.0), fault("slow", 1, 101.0)])
    seen.on_tokens(101.005, 3)
    gone(seen, 1, 101.0)  # slow ranks are not expected to go
    gone(seen, 2, 101.01)
    seen.on_epoch([0, 1, 3], [0, 1, 2, 3], 101.04)
    seen.on_tokens(101.05, 2)
    seen.on_epoch([0, 1, 3, 4], [0, 1, 2, 3], 101.2)  # as many, but not those that are desired
    seen.on_epoch([0, 1, 2, 3, 4], [0, 1, 2, 3], 101.3)
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


def test_the_end_of_a_newcomer_needs_no_epoch() -> None:
    seen = Seen(faults=[fault("kill", 2, 1.0)])
    seen.faults[0].serving = False
    gone(seen, 2, 1.01)
    seen.on_epoch([0, 1], [0, 1, 2], 2.0)
    seen.on_epoch([0, 1, 2], [0, 1, 2], 3.0)
    assert (seen.faults[0].epoch, seen.faults[0].whole) == (None, 3.0)


def test_a_death_is_credited_to_the_latest_fault_of_that_very_process() -> None:
    seen = Seen(faults=[fault("oom", 0, 1.0), fault("kill", 0, 9.0), fault("kill", 1, 9.0)])
    gone(seen, 1, 9.01, pid=4711)  # another process under that id
    gone(seen, 0, 9.02)
    assert [fault.gone for fault in seen.faults] == [None, 9.02, None]


def test_a_death_long_after_a_fault_is_not_its_doing() -> None:
    seen = Seen(faults=[fault("oom", 0, 1.0)])
    gone(seen, 0, 60.0, unasked=True)
    assert seen.faults[0].gone is None
    assert seen.unharmed == ["rank 0, untouched: it ended"]


def test_who_ends_without_being_asked_or_harmed_is_named() -> None:
    seen = Seen(faults=[fault("slow", 1, 1.0), fault("partition", 2, 1.0), fault("stop", 3, 1.0)])
    for rank in range(4):
        gone(seen, rank, 2.0, unasked=True)
    assert seen.unharmed == ["rank 0, untouched: it ended", "rank 1, slow: it ended"]
    gone(seen, 0, 3.0)  # as one that leaves
    assert len(seen.unharmed) == 2


def test_growth_is_named() -> None:
    before = Held(100.0, 20, 3, {0: RankHeld(1, 30.0, 28), 1: RankHeld(2, 30.0, 28)})
    same = Held(900.0, 90, 9, {0: RankHeld(1, 60.0, 30), 1: RankHeld(7, 20.0, 28)})
    more = Held(100.0, 20, 3, {0: RankHeld(1, 90.0, 28), 1: RankHeld(7, 30.0, 50)})
    assert growth(before, same) == []
    assert growth(before, more) == ["rank 0: 30.0 → 90.0 MiB", "rank 1: 28 → 50 descriptors"]


def test_pids_that_are_not_ranks_of_the_service_on_that_port_are_not_touched() -> None:
    """A service that names pids of others: this process is no rank of anybody."""
    rank = RankView(id=0, state="active", host=socket.gethostname(), pid=os.getpid())
    with pytest.raises(ConfigError, match="not those of ranks of one service"):
        find_family([rank], 8000)
    with pytest.raises(ConfigError, match="runs on elsewhere"):
        find_family([msgspec.structs.replace(rank, host="elsewhere")], 8000)


@pytest.mark.slow
def test_a_running_service_is_struck_only_on_its_own_port_and_as_it_allows() -> None:
    async def scenario() -> None:
        async with own_service(["--ranks", "2", "--kv-memory", "8MiB"]) as service:
            status, answer = await call(service.target, "GET", "/cluster")
            assert status == 200
            ranks = msgspec.convert(answer, ClusterView, strict=False).ranks
            family = find_family(ranks, service.target.port)
            assert family.head.pid == service.pid
            assert sorted(family.held(ranks).ranks) == [0, 1]
            with pytest.raises(ConfigError, match="does not listen on port 1"):
                find_family(ranks, 1)
            url = f"http://127.0.0.1:{service.target.port}"
            run = ["chaos", "--url", url, "--faults", "oom", "--requests", "1"]
            shown = await asyncio.to_thread(CliRunner().invoke, app, run)
            assert "started with FLEXPERT_FAULTS=FOLDER" in str(shown.exception)

    asyncio.run(scenario())


def test_spreads_and_bars() -> None:
    assert spread([]) is None
    found = spread([0.001 * n for n in range(1, 11)])
    assert found is not None
    assert (found.median_ms, found.p90_ms, found.longest_ms) == (5.5, 10.0, 10.0)
    assert sparkline([]) == ""
    assert sparkline([0.0, 1.0]) == "▁█"
    assert len(sparkline([1.0] * 1000)) <= 72
