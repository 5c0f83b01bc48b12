"""Goodput: which requests keep to their goals."""

from __future__ import annotations

import pytest

from flexpert.bench.goodput import figures_with_goodput, meets, parse_goodput
from flexpert.bench.load import ClientAnswer
from flexpert.cli.bench_serve import spread_goals
from flexpert.errors import ConfigError

# 200 ms to the first of 5 tokens, which come in 3 pieces 100 and 300 ms apart
ANSWER = ClientAnswer(sent=1.0, tokens=5, finish="stop", times=[1.2, 1.3, 1.6], ended=1.65)
BROKEN = ClientAnswer(sent=1.0, tokens=5, times=[1.01], ended=3.0, error="gone")


@pytest.mark.parametrize(
    ("goals", "kept"),
    [
        ("ttft:201", True),
        ("ttft:199", False),
        ("tpot:101", True),  # 400 ms for the 4 tokens after the first
        ("tpot:99", False),
        ("itl:299", True),  # 99 of a hundred: interpolated, 298 ms
        ("itl:297", False),
        ("e2el:651", True),
        ("e2el:649", False),
        ("ttft:201 itl:1", False),
    ],
)
def test_an_answer_keeps_to_all_goals_or_does_not(goals: str, kept: bool) -> None:
    assert meets(ANSWER, parse_goodput([goals])) is kept


def test_a_broken_answer_keeps_to_nothing() -> None:
    assert not meets(BROKEN, parse_goodput(["ttft:1000"]))
    assert not meets(ClientAnswer(sent=0.0), parse_goodput(["ttft:1000"]))


def test_goodput_is_of_all_requests_over_the_whole_time() -> None:
    found = figures_with_goodput([ANSWER, ANSWER, BROKEN], {"ttft": 500.0}).goodput
    assert found is not None
    assert (found.requests, found.requests_per_s) == (2, 1.0)
    assert found.share == pytest.approx(2 / 3)
    assert figures_with_goodput([ANSWER], {}).goodput is None


def test_goals_stand_in_one_text_or_in_several() -> None:
    assert parse_goodput(["ttft:500 itl:50"]) == {"ttft": 500.0, "itl": 50.0}
    assert parse_goodput(["ttft:500", "itl:50"]) == {"ttft": 500.0, "itl": 50.0}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:nan", "p99:3"])
def test_what_is_no_goal_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--goodput .*ttft, tpot, itl, e2el"):
        parse_goodput([text])


def test_two_goals_for_one_measure_are_refused() -> None:
    with pytest.raises(ConfigError, match="ttft has two goals"):
        parse_goodput(["ttft:1 ttft:2"])


def test_goals_may_follow_the_flag_one_by_one_as_for_vllm() -> None:
    given = ["--goodput", "ttft:500", "itl:50", "--seed", "3", "--", "--host", "a:1"]
    spread = ["--goodput", "ttft:500", "--goodput", "itl:50", "--seed", "3", "--", "--host", "a:1"]
    assert spread_goals(given) == spread
    assert spread_goals(["--goodput", "ttft:500 itl:50"]) == ["--goodput", "ttft:500 itl:50"]
