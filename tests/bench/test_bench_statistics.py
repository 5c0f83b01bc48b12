"""Percentiles and figures, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpert.bench.load import ClientAnswer
from flexpert.bench.statistics import figures, median_interval, percentile, summarise

numbers = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(numbers, min_size=1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_percentiles_are_those_of_numpy(values: list[float], share: float) -> None:
    expected = np.percentile(values, share * 100)
    assert percentile(sorted(values), share) == pytest.approx(expected)


def test_a_summary_is_exact() -> None:
    summary = summarise([4.0, 1.0, 3.0, 2.0, 5.0])
    assert summary is not None
    assert (summary.mean, summary.p50, summary.longest) == (3.0, 3.0, 5.0)
    assert summary.p90 == pytest.approx(4.6)
    assert summary.p99 == pytest.approx(4.96)


@pytest.mark.parametrize(("count", "least"), [(1, 1), (5, 1), (6, 1), (10, 2), (18, 5), (40, 14)])
def test_the_median_lies_between_order_statistics(count: int, least: int) -> None:
    """The tables of the sign test."""
    values = [float(n) for n in range(count, 0, -1)]
    assert median_interval(values) == (least, count + 1 - least)


def test_without_values_there_is_no_summary() -> None:
    assert summarise([]) is None


def test_figures_count_only_whole_answers() -> None:
    good = ClientAnswer(sent=1.0, tokens=3, finish="length", times=[1.5, 1.7, 2.0], ended=2.0)
    late = ClientAnswer(sent=2.0, tokens=1, finish="stop", times=[4.0], ended=5.0)
    broken = ClientAnswer(sent=1.0, tokens=9, times=[1.1], ended=3.0, error="gone")
    found = figures([good, late, broken])
    assert (found.requests, found.failed, found.errors) == (3, 1, ["gone"])
    assert found.duration_s == 4.0
    assert found.output_tokens == 4
    assert found.requests_per_s == 0.5
    assert found.output_tokens_per_s == 1.0
    assert found.first_token_ms is not None
    assert found.first_token_ms.mean == pytest.approx(1250)
    assert found.inter_token_ms is not None
    assert found.inter_token_ms.longest == pytest.approx(300)
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms.longest == pytest.approx(3000)


def test_a_run_in_which_all_failed_has_figures() -> None:
    found = figures(
        [ClientAnswer(sent=0.0, ended=1.0, error="x"), ClientAnswer(sent=0.0, ended=1.0, error="x")]
    )
    assert (found.failed, found.errors, found.requests_per_s) == (2, ["x"], 0.0)
    assert found.first_token_ms is None
