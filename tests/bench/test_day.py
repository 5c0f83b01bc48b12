"""`flexpert bench autoscale`: the day, what is made of the ranks' history, and a day served."""

from __future__ import annotations

import asyncio
import io
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from rich.console import Console
from support.fake_service import CLUSTER, DONE, FakeService, answering

from flexpert.bench.day_cores import divide_cores, do_at_once
from flexpert.bench.day_plan import (
    CapacityJob,
    DayJob,
    DayPlan,
    RanksCapacity,
    autoscale_goals,
    goals_for,
    kill_times,
)
from flexpert.bench.day_report import days_text, notes
from flexpert.bench.day_run import DayReport, altered, capacity_jobs, day_jobs, run_days
from flexpert.bench.day_service import DayResult, do_job
from flexpert.bench.day_trace import DayTrace, flips
from flexpert.bench.load import Target
from flexpert.bench.machine import this_machine, usable_cores
from flexpert.bench.ranks_history import ranks_history
from flexpert.bench.service import Service
from flexpert.bench.statistics import Goodput, figures
from flexpert.cluster.autoscaler import parse_goals
from flexpert.cluster.views import ClusterEvent, ClusterView
from flexpert.errors import ConfigError

PLAN = DayPlan(
    seconds=4.0,
    most=2,
    max_running=4,
    input_tokens=8,
    output_tokens=8,
    peak=6.0,
    goals_ms={"ttft": 60_000.0},
    calibrate_s=1.0,
    settle_s=0.5,
    every_s=0.25,
    kills=1,
    seed=3,
)


def test_the_day_has_a_night_and_two_peaks() -> None:
    day = DayTrace(240.0, 10.0)
    assert day.rate(0.0) == day.rate(240.0) == pytest.approx(1.2)
    assert day.rate(121.0) == pytest.approx(10.0)
    assert day.rate(187.0) == pytest.approx(9.0)
    assert day.rate(150.0) == pytest.approx(2.8)
    assert day.rate(115.0) == pytest.approx((2.8 + 10.0) / 2)  # half-way up


def test_requests_arrive_as_the_day_has_them() -> None:
    day = DayTrace(240.0, 400.0)
    arrivals = day.arrivals(seed=1)
    assert arrivals == sorted(arrivals) == day.arrivals(seed=1)
    assert len(arrivals) == pytest.approx(day.requests, rel=0.02)
    for begin, end in ((10.0, 50.0), (118.0, 124.0), (140.0, 170.0), (183.0, 192.0)):
        found = sum(begin <= at < end for at in arrivals) / (end - begin)
        assert found == pytest.approx(day.rate((begin + end) / 2), rel=0.06)


def test_who_knows_the_day_has_ranks_before_they_are_needed() -> None:
    day = DayTrace(240.0, 10.0)
    schedule = day.schedule({1: 8.0, 2: 13.0})
    assert [ranks for _, ranks in schedule] == [1, 2, 1, 2, 1]
    for place in range(2400):
        at = place / 10
        ranks = [n for since, n in schedule if since <= at][-1]
        if day.rate(at) > 0.8 * 8.0:
            assert ranks == 2
    # and no sooner than that takes
    assert all(day.rate(at + 240.0 / 80) > 6.4 for at, n in schedule if n == 2)
    assert [ranks for _, ranks in day.schedule({1: 1.0, 2: 1.0})] == [2]  # nothing suffices


@pytest.mark.parametrize(
    ("sizes", "turns"), [([1], 0), ([1, 2, 4], 0), ([1, 2, 1, 2, 1], 3), ([1, 3, 3, 2], 1)]
)
def test_flips_are_turns_from_up_to_down_or_back(sizes: list[int], turns: int) -> None:
    assert flips(sizes) == turns


VIEW = msgspec.convert(
    CLUSTER | {"ranks": [{"id": 0, "state": "active", "host": "h", "pid": 1}]},
    ClusterView,
    strict=False,
)


def epoch(at: float, *ranks: int) -> ClusterEvent:
    return ClusterEvent(kind="epoch", time=at, data={"ranks": list(ranks), "desired": []})


def operation(at: float, created: float, **more: Any) -> ClusterEvent:
    data = DONE | {"created": created, "purpose": "request", "add": [], "remove": [], **more}
    return ClusterEvent(kind="operation", time=at, data=data)


def test_a_rank_counts_from_being_asked_for_until_it_left() -> None:
    history = [
        ClusterEvent(
            kind="autoscale",
            time=102.0,
            data={"ranks": 1, "target": 2, "why": "much", "begun": True},
        ),
        epoch(104.0, 0, 1),
        operation(104.0, 102.0, add=[1], target=[0, 1]),
        epoch(110.0, 0),
        operation(110.0, 109.0, remove=[1], target=[0]),
        operation(115.0, 113.0, add=[1], target=[0, 1], state="failed"),
        operation(116.0, 115.5, moved_experts=3, purpose="rebalance"),
        epoch(130.0, 0, 1),
        operation(130.0, 129.0, add=[1], target=[0, 1]),  # after the day
    ]
    found = ranks_history(VIEW, history, wall=100.0, seconds=20.0)
    # one throughout; the second two seconds before it was active, then six; two in vain
    assert found.rank_seconds == pytest.approx(20.0 + 2.0 + 6.0 + 2.0)
    assert (found.changes, found.failed, found.targets) == (2, 1, [1, 2, 1])
    assert found.decisions == [(pytest.approx(2.0), "1 → 2: much")]
    assert found.sizes == [(0.0, 1), (pytest.approx(4.0), 2), (pytest.approx(10.0), 1)]


def test_goals_are_those_that_a_service_meets_which_keeps_up() -> None:
    slow = RanksCapacity(
        ranks=1, requests_per_s=1.0, first_token_ms=9, inter_token_p99_ms=30, end_to_end_ms=333
    )
    assert goals_for([slow]) == {"ttft": 1330.0, "itl": 90.0}
    fast = msgspec.structs.replace(slow, inter_token_p99_ms=3, end_to_end_ms=20)
    assert goals_for([fast]) == {"ttft": 500.0, "itl": 50.0}


def test_the_autoscaler_reads_its_goals() -> None:
    goals = parse_goals(autoscale_goals(PLAN, {"ttft": 1330.0, "itl": 90.0, "e2el": 5.0}), 2)
    assert (goals.min, goals.max, goals.settle_s, goals.every_s) == (1, 2, 0.5, 0.25)
    assert (goals.ttft_p99_s, goals.itl_p99_s) == (pytest.approx(0.665), None)
    only_gaps = parse_goals(autoscale_goals(PLAN, {"itl": 90.0}), 2)
    assert (only_gaps.ttft_p99_s, only_gaps.itl_p99_s) == (None, pytest.approx(0.09))
    own = parse_goals(autoscale_goals(replace(PLAN, autoscale="ttft_p99=2s"), {"ttft": 9.0}), 2)
    assert own.ttft_p99_s == 2.0


def test_kills_strike_at_noon_and_in_the_evening() -> None:
    assert kill_times(PLAN) == [pytest.approx(4.0 * 12.25 / 24)]
    assert kill_times(replace(PLAN, kills=2))[1] == pytest.approx(4.0 * 18.75 / 24)
    assert kill_times(replace(PLAN, kills=4)) == [0.5, 1.5, 2.5, 3.5]


def test_only_answers_that_both_gave_in_full_can_be_altered() -> None:
    assert altered(["a", "a", "a", None], ["a", "b", None, "a"]) == 1


def test_every_number_of_ranks_is_measured_once() -> None:
    plan = replace(PLAN, most=5)
    for at_once, lots in ((0, [[1, 2, 3, 4, 5]]), (3, [[1, 4], [2, 5], [3]]), (9, None)):
        found = [job.ranks for job in capacity_jobs(plan, at_once) if isinstance(job, CapacityJob)]
        assert found == (lots or [[1], [2], [3], [4], [5]])


def test_with_kills_one_more_service_scales_itself() -> None:
    schedule = [(0.0, 1), (2.0, 2)]
    jobs = day_jobs(PLAN, 6.0, {"ttft": 500.0}, schedule)
    kinds = [(job.run, job.kills) for job in jobs if isinstance(job, DayJob)]
    assert [run for run, _ in kinds] == ["fixed", "autoscaler", "oracle", "killed"]
    assert [bool(kills) for _, kills in kinds] == [False, False, False, True]
    assert len(day_jobs(replace(PLAN, kills=0), 6.0, {}, schedule)) == 3


def test_each_service_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6]
    monkeypatch.setattr("flexpert.bench.day_cores.usable_cores", lambda: cores)
    assert divide_cores(3, 2) == [cores[:4], cores[4:8], cores[8:12]]
    with pytest.raises(ConfigError, match="need 15 cores, 5 each, and this process may use 13"):
        divide_cores(3, 3)


def result(run: Any, share: float, rank_seconds: float, turns: int) -> DayResult:
    done = msgspec.structs.replace(
        figures([]),
        goodput=Goodput(goals_ms={"ttft": 500.0}, requests=9, share=share, requests_per_s=2.0),
    )
    return DayResult(
        run=run,
        figures=done,
        rank_seconds=rank_seconds,
        changes=turns + 1,
        failed_changes=0,
        flips=turns,
        lost=0,
        altered=0,
        sizes=[(0.0, 1), (2.0, 2)],
        killed=[2.0] if run == "killed" else [],
        decisions=[],
        timeline=[],
    )


def report(two: float) -> DayReport:
    capacity = [
        RanksCapacity(
            ranks=n, requests_per_s=r, first_token_ms=9, inter_token_p99_ms=9, end_to_end_ms=9
        )
        for n, r in ((1, 10.0), (2, two))
    ]
    return DayReport(
        command="flexpert bench autoscale",
        machine=this_machine(),
        seconds=4.0,
        peak=6.0,
        requests=9,
        goals_ms={"ttft": 500.0},
        autoscale="",
        flags=[],
        cores=0,
        capacity=capacity,
        schedule=[(0.0, 1)],
        results=[
            result("fixed", 1.0, 8.0, 0),
            result("autoscaler", 0.98, 4.64, 5),
            result("oracle", 1.0, 4.4, 3),
            result("killed", 0.97, 4.8, 5),
        ],
    )


def test_the_table_compares_and_says_what_that_is_worth() -> None:
    shown = io.StringIO()
    Console(width=100, file=shown).print(days_text(report(16.0)), soft_wrap=True)
    for words in ("5 (58%)", "98.0%", "x: killed", "lost", "altered"):
        assert words in shown.getvalue()
    told = "\n".join(notes(report(16.0)))
    assert "98.0% of the goodput of the fixed number with 58% of their rank-seconds" in told
    assert "with 1 kills: 97.0% with 60%" in told
    assert "turned 5 times from up to down or back, the day does 3 times" in told
    assert "says little" not in told
    assert "that fewer suffice says little" in "\n".join(notes(report(11.0)))


def test_three_services_serve_the_same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = b"".join(
        b'data: {"choices": [{"index": 0, "text": "a", "finish_reason": %s}]}\n\n' % finish
        for finish in (b"null", b'"length"')
    )
    one = {"id": 0, "state": "active", "host": "h", "pid": 1}
    fake = FakeService()
    fake.replies |= {
        "POST /tokenize": (200, {"tokens": [*range(40)]}),
        "POST /v1/completions": (200, tokens + b"data: [DONE]\n\n"),
        "GET /cluster": (200, CLUSTER | {"ranks": [one], "desired": [0]}),
        "POST /cluster/operations": (202, DONE),
    }
    started: list[tuple[str, ...]] = []

    @asynccontextmanager
    async def own_service(arguments: Sequence[str], **_: Any) -> AsyncIterator[Service]:
        started.append(tuple(arguments))
        yield Service(Target.parse(fake.url), 1, deque())

    monkeypatch.setattr("flexpert.bench.day_service.own_service", own_service)
    plan = replace(PLAN, seconds=1.0, kills=0, peak=20.0, goals_ms={}, calibrate_s=0.05)
    with answering(fake):
        found = run_days(plan, lambda line: None)
        told = len(fake.requests)
        followed = DayJob(
            run="oracle",
            plan=plan,
            peak=5.0,
            goals_ms={},
            schedule=[(0.0, 1), (0.3, 2), (0.6, 1)],
        )
        asyncio.run(do_job(followed, lambda line: None))
    assert [result.run for result in found.results] == ["fixed", "autoscaler", "oracle"]
    begun = ["1", "2", "1", str(found.schedule[0][1])]
    assert [flags[:2] for flags in started[:4]] == [("--ranks", one) for one in begun]
    assert started[2][-2:] == ("--autoscale", found.autoscale)
    assert all("--deterministic" in flags for flags in started)
    assert found.goals_ms == goals_for(found.capacity)
    assert [one.ranks for one in found.capacity] == [1, 2]
    change = "POST /cluster/operations"
    asked = [body for what, body, _ in fake.requests[:told] if what == change]
    assert asked[:2] == [{"ranks": 1}, {"ranks": 2}]  # to measure what they take
    after = [body for what, body, _ in fake.requests[told:] if what == change]
    assert after == [{"ranks": 2}, {"ranks": 1}]
    assert {result.figures.requests for result in found.results} == {found.requests}
    assert found.harmed == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_services_at_once_serve_the_same_day_and_a_kill_without_loss() -> None:
    lines: list[str] = []
    goals_ms = {"ttft": 60_000.0}
    scaled = DayJob(
        run="killed",
        plan=PLAN,
        peak=6.0,
        goals_ms=goals_ms,
        autoscale=autoscale_goals(PLAN, goals_ms),
        schedule=[(0.0, 1)],
        kills=kill_times(replace(PLAN, kills=1)),
    )
    fixed = DayJob(run="fixed", plan=PLAN, peak=6.0, goals_ms=goals_ms, schedule=[(0.0, 2)])
    cores = [usable_cores()] * 2
    one, other = asyncio.run(do_at_once([fixed, scaled], cores, lines.append))
    found = other.day
    assert one.day is not None
    assert found is not None
    assert (found.lost, altered(one.texts, other.texts)) == (0, 0)
    assert None not in one.texts
    assert found.figures.requests == len(DayTrace(PLAN.seconds, 6.0).arrivals(PLAN.seed))
    assert found.kept == 1.0
    (at,) = found.killed
    assert at == pytest.approx(PLAN.seconds * 12.25 / 24, abs=1.5)
    assert len(found.sizes) > 1  # who was killed was replaced
    assert 0.5 * PLAN.seconds < found.rank_seconds < 2.5 * PLAN.seconds
    assert any(line.startswith("fixed: ") for line in lines)
