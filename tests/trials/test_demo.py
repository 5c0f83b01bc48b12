"""The demonstration: how gaps are sorted, what counts as good, and the whole of it once."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from rich.console import Console
from support.fake_service import DONE

from flexpert.bench.load import ClientAnswer
from flexpert.bench.machine import this_machine
from flexpert.cluster.views import OperationView
from flexpert.trials.demo import demo_requests, same
from flexpert.trials.demo_report import (
    DemoChange,
    DemoPlan,
    DemoProgress,
    DemoResult,
    demo_result,
    measure,
    sort_gaps,
)
from flexpert.trials.demo_view import LineView, picture, summary

OPERATION = msgspec.convert(DONE, OperationView)


def test_a_gap_belongs_to_every_change_it_overlaps() -> None:
    steady, during = sort_gaps([[0.0, 1.0, 2.5, 6.0, 6.5]], [(2.0, 3.0), (5.0, 6.0)])
    assert steady == [1.0, 0.5]
    assert during == [[1.5, 3.5], [3.5]]


def test_median_and_longest() -> None:
    gaps = measure([0.001, 0.002, 0.009])
    assert (gaps.count, gaps.median_ms, gaps.longest_ms) == (3, 2.0, 9.0)
    assert measure([]).longest_ms is None


def test_requests_are_fixed_and_different() -> None:
    bodies = demo_requests(DemoPlan(requests=64))
    assert bodies == demo_requests(DemoPlan(requests=64))
    assert len({json.dumps(body) for body in bodies}) == 64
    assert {body["temperature"] for body in bodies} == {0.0, 0.8}


def test_equal_means_text_tokens_and_reason() -> None:
    one = ClientAnswer(0.0, text="a", tokens=1, finish="stop")
    assert same(one, ClientAnswer(9.0, text="a", tokens=1, finish="stop"))
    assert not same(one, ClientAnswer(0.0, text="b", tokens=1, finish="stop"))
    assert not same(one, ClientAnswer(0.0, text="a", tokens=2, finish="stop"))
    assert not same(one, ClientAnswer(0.0, text="a", tokens=1, finish="length"))


def result(**changed: Any) -> DemoResult:
    progress = DemoProgress(model="tiny", sent=1, answered=1, equal=1)
    progress.changes.append(DemoChange(began=1.0, ended=2.0, operation=OPERATION))
    for name, value in changed.items():
        setattr(progress, name, value)
    answer = ClientAnswer(
        0.5, text=" were", tokens=3, finish="length", times=[0.6, 1.5, 2.5], ended=2.5
    )
    return demo_result(DemoPlan(), this_machine(), progress, [(0, answer)], ["There"], began=0.5)


def test_a_run_is_good_only_if_all_was_answered_alike_and_every_change_was_done() -> None:
    assert result().good
    assert not result(lost=1).good
    assert not result(equal=0).good
    assert not result(changes=[]).good
    failed = msgspec.structs.replace(OPERATION, state="failed", error="no room")
    assert not result(changes=[DemoChange(1.0, 2.0, failed)]).good
    assert not result(changes=[DemoChange(1.0, 2.0, None, "HTTP 400")]).good


def test_the_summary_tells_counts_gaps_and_an_answer() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(result()))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    numbers = ("1 of 1", "1000.0 ms", "4.2 ms", "3.0 MiB")
    for words in (*numbers, "There were", "Nothing was lost"):
        assert words in text


def test_without_a_terminal_each_change_is_told_once() -> None:
    console = Console(file=io.StringIO(), width=120)
    view = LineView(console)
    progress = DemoProgress(stage="traffic")
    view.refresh(progress)
    progress.changes.append(DemoChange(began=1.0, operation=OPERATION))
    view.refresh(progress)
    progress.changes[0].ended = 2.0
    view.refresh(progress)
    view.refresh(progress)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "== traffic",
        "-- add 2 3 → ranks 0 1 2 3",
        "-- add 2 3 → ranks 0 1 2 3: done (spawn 0.25 s, load 0.50 s, commit 0.01 s), pause 4.2 ms",
    ]
    console.print(picture(progress))


def test_the_rate_is_that_of_the_last_moments() -> None:
    progress = DemoProgress()
    for second in range(10):
        progress.tokens = 1000 if second < 5 else 1000 + 10 * (second - 4)
        progress.tick(float(second))
    assert progress.tokens_per_s == pytest.approx(10.0)


@pytest.mark.slow
def test_the_demonstration_loses_nothing_and_changes_no_answer() -> None:
    flags = ["--clients", "4", "--requests", "8", "--max-tokens", "24", "--duration", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "flexpert", "demo", "--json", *flags],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["lost"] == 0
    assert found["sent"] == found["answered"] == found["equal"] >= 8
    assert [c["operation"]["target"] for c in found["changes"]] == [[0, 1, 2, 3], [0, 2, 3], [3]]
