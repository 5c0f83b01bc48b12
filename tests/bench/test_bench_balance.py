"""`flexpert bench balance` on few layers: what the placements by load are to achieve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flexpert.bench.balancing.balance_run import BalanceReport, run_balance
from flexpert.bench.balancing.routing_traces import TRACES, recorded
from flexpert.errors import ConfigError
from flexpert.moe.load_trace import LoadWindow, load_line


@pytest.fixture(scope="module")
def report() -> BalanceReport:
    traces = {name: TRACES[name](np.random.default_rng(0), 3, 3, 256) for name in ("drifting",)}
    return run_balance(
        traces, ranks=8, redundant=32, seed=0, scale=True, speed=False, note=lambda line: None
    )


def test_loads_are_even_on_the_window_planned_for_and_nearly_so_on_the_next(
    report: BalanceReport,
) -> None:
    even, packed, ours = report.balanced
    assert ours.worst <= 1.05 < even.own
    assert ours.following <= 1.10
    assert ours.moved < 0.1 * packed.moved


def test_ranks_come_and_go_with_few_loads_beyond_those_that_no_plan_is_without(
    report: BalanceReport,
) -> None:
    for name in ("uniform", "zipf 0.8", "zipf 1.2"):
        changes = [change for change in report.scaled if change.trace == name]
        assert [change.ranks for change in changes] == [[16, 24], [24, 16]]
        moved = sum(change.moved for change in changes)
        assert moved <= 1.1 * sum(change.unavoidable for change in changes)
        assert all(change.imbalance <= 1.02 * change.fresh for change in changes)


def test_a_recorded_trace_is_read_and_a_broken_one_says_where(tmp_path: Path) -> None:
    file = tmp_path / "routing.jsonl"
    windows = [LoadWindow([[1.0, 2.0]], 5.0), LoadWindow([[3.0, 0.0]], 5.0)]
    file.write_bytes(b"".join(map(load_line, windows)))
    assert [window.tolist() for window in recorded(file)] == [[[1, 2]], [[3, 0]]]
    file.write_bytes(load_line(windows[0]) + b'{"loads": [[1, -2]]}\n')
    with pytest.raises(ConfigError, match=r"line 2 .* not negative"):
        recorded(file)
