"""Arrivals: at the rate asked for, in bursts or evenly, along a ramp."""

from __future__ import annotations

import itertools
from statistics import mean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.bench.arrival_times import RateRamp, gamma_arrivals, ramp_arrivals
from flexpert.errors import ConfigError

RAMPS = ["linear:1:9", "linear:9:1", "exponential:1:9", "exponential:9:1", "linear:5:5"]


@given(st.floats(0.5, 100), st.integers(0, 50), st.integers(), st.floats(0.1, 10))
def test_arrivals_begin_at_zero_and_never_go_back(
    rate: float, count: int, seed: int, burstiness: float
) -> None:
    arrivals = gamma_arrivals(rate, count, seed, burstiness)
    assert len(arrivals) == count
    assert arrivals == sorted(arrivals)
    assert arrivals[:1] == [0.0][:count]
    assert arrivals == gamma_arrivals(rate, count, seed, burstiness)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_changes_how_gaps_vary_and_not_the_rate(burstiness: float) -> None:
    arrivals = gamma_arrivals(4.0, 20_000, 1, burstiness)
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    # the coefficient of variation of a gamma distribution of shape k is 1/sqrt(k)
    assert pstdev(gaps) / mean(gaps) == pytest.approx(burstiness**-0.5, rel=0.05)


@pytest.mark.parametrize("text", RAMPS)
@given(st.integers(1, 60), st.integers(0, 1000), st.floats(0.1, 10))
def test_a_ramp_is_filled_and_no_longer(
    text: str, count: int, seed: int, burstiness: float
) -> None:
    ramp = RateRamp.parse(text)
    arrivals = ramp_arrivals(ramp, count, seed, burstiness)
    assert len(arrivals) == count
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] <= ramp.seconds(count) * (1 + 1e-9)


@pytest.mark.parametrize(("text", "middle"), [("linear:1:9", 5.0), ("exponential:1:9", 3.0)])
def test_the_rate_of_a_ramp_is_that_of_its_time(text: str, middle: float) -> None:
    ramp, count = RateRamp.parse(text), 200_000
    length = ramp.seconds(count)
    arrivals = ramp_arrivals(ramp, count, 3)
    window = length / 100
    for begin, rate in ((0.0, 1.0), ((length - window) / 2, middle), (length - window, 9.0)):
        found = sum(begin <= at < begin + window for at in arrivals) / window
        assert found == pytest.approx(rate, rel=0.1)


def test_a_ramp_that_falls_is_one_that_rises_backwards() -> None:
    up, down = RateRamp.parse("linear:2:6"), RateRamp.parse("linear:6:2")
    for number in range(11):
        rising, falling = up.time_of(number, 10), down.time_of(10 - number, 10)
        assert rising == pytest.approx(up.seconds(10) - falling)


@pytest.mark.parametrize(
    "text", ["", "linear", "linear:1", "linear:0:2", "linear:1:inf", "linear:1:nan", "cubic:1:2"]
)
def test_what_is_no_ramp_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write linear:A:B or exponential:A:B"):
        RateRamp.parse(text)
