"""Faults on purpose strike whom, where and when they say, once; without them there is nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest

from flexpert.engine.faults import VARIABLE, Fault, Faults, Point


def passes(folder: Path, rank: int, points: Iterable[Point]) -> int | None:
    """The signal that a process which passes these points dies of, if any."""
    pid = os.fork()
    if pid == 0:
        faults = Faults(rank, folder)
        for point in points:
            faults.at(point)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return -status if status < 0 else None


def test_a_fault_strikes_its_rank_at_its_point_the_nth_time_and_only_once(tmp_path: Path) -> None:
    planted = Fault(rank=1, point="vote", count=3).plant(tmp_path)
    assert passes(tmp_path, 1, ["vote", "vote_wait", "vote"]) is None
    assert passes(tmp_path, 2, ["vote"] * 9) is None
    assert planted.exists()
    assert passes(tmp_path, 1, ["vote"] * 3) == signal.SIGKILL
    assert not planted.exists()
    assert passes(tmp_path, 1, ["vote"] * 9) is None


def test_a_fault_of_one_process_strikes_no_other_of_that_id(tmp_path: Path) -> None:
    planted = Fault(rank=1, point="vote", pid=os.getpid()).plant(tmp_path)
    assert passes(tmp_path, 1, ["vote"] * 3) is None  # in a child
    assert planted.exists()


def test_a_fault_that_strikes_another_while_it_is_read_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = Fault(rank=0, point="vote", action="cut", seconds=1.0).plant(tmp_path)
    found = [name.name for name in tmp_path.iterdir()]
    monkeypatch.setattr(os, "listdir", lambda _: [*found, "gone.json"])
    faults = Faults(0, tmp_path)
    cuts: list[float] = []
    faults.cut = cuts.append
    faults.at("vote")
    assert cuts == [1.0]
    assert not mine.exists()
    faults.at("vote")  # the name is still listed, and the file is gone
    assert cuts == [1.0]


def test_several_faults_wait_for_each_other(tmp_path: Path) -> None:
    first = Fault(rank=0, point="load").plant(tmp_path)
    second = Fault(rank=0, point="armed").plant(tmp_path)
    assert passes(tmp_path, 0, ["load"]) == signal.SIGKILL
    assert (first.exists(), second.exists()) == (False, True)
    assert passes(tmp_path, 0, ["load", "armed"]) == signal.SIGKILL


@pytest.mark.parametrize("text", ['{"rank": 1, "point": "nowhere"}', '{"rank": 1', "[]"])
def test_a_file_that_is_no_fault_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is no fault"):
        Faults(0, tmp_path).at("vote")


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Fault(rank=0, point="vote", count=0)


def test_a_starved_process_gets_no_more_memory(tmp_path: Path) -> None:
    holes = [bytearray(4100) for _ in range(60_000)]  # of a process that has served for a while
    del holes[::2]
    pid = os.fork()
    if pid == 0:
        faults = Faults(0, tmp_path)
        Fault(rank=0, point="vote", action="starve").plant(tmp_path)
        got = True
        try:
            faults.at("vote")
            bytearray(4096)
        except MemoryError:
            got = False
        os._exit(got)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_cut_is_the_line_s_to_make(tmp_path: Path) -> None:
    cuts: list[float] = []
    faults = Faults(0, tmp_path)
    faults.cut = cuts.append
    Fault(rank=0, point="vote", action="cut", seconds=2.5).plant(tmp_path)
    faults.at("vote")
    assert cuts == [2.5]
    with pytest.raises(ValueError, match="only a cut takes time"):
        Fault(rank=0, point="vote", action="cut")


def test_without_the_variable_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Faults.of_environment(0) is None
    monkeypatch.setenv(VARIABLE, "/somewhere")
    assert Faults.of_environment(0) is not None
