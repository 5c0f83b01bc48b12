"""`flexpert bench comm` at tiny sizes: every baseline is right, and what is wrong is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec
import pytest
import torch

from flexpert.bench.comm import ranks as rank_module
from flexpert.bench.comm.baseline_kinds import BASELINE_FAMILIES, KINDS
from flexpert.bench.comm.comm_run import CommReport, run_comm
from flexpert.bench.comm.ranks import RankFailed, Ranks, Settings
from flexpert.bench.comm.workload import (
    Workload,
    deduplicated_rows,
    expert_table,
    make_input,
)
from flexpert.cli.bench_comm import bench_comm
from flexpert.errors import ConfigError

SETTINGS = Settings("shm", "float32", 1, 30.0)
HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))


def work_of(tokens: int, ranks: int = 3, dtype: str = "bfloat16") -> Workload:
    return Workload(ranks=ranks, tokens=tokens, hidden=256, topk=3, experts=7, dtype=dtype, seed=1)


def test_every_baseline_agrees_with_the_oracle() -> None:
    notes: list[str] = []
    report = run_comm(
        [work_of(5), work_of(1)], SETTINGS, BASELINE_FAMILIES, repeat=3, note=notes.append
    )
    assert report.correct
    here = [kind for kind in KINDS if not kind.machines]
    assert [len(point.results) for point in report.points] == [len(here)] * 2
    for point in report.points:
        for result in point.results:
            if result.skipped is not None:
                assert result.baseline.startswith("NIXL")
                continue
            assert result.exchanges == 3
            assert not result.link_bytes
            assert result.total_us is not None
            assert result.total_us.p10 <= result.total_us.p50 <= result.total_us.p90
    assert any("checking" in line for line in notes)
    assert msgspec.json.decode(msgspec.json.encode(report), type=CommReport) == report


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(dtype: str) -> None:
    work = work_of(4, ranks=2, dtype=dtype)
    report = run_comm([work], SETTINGS, ("gloo", "allgather"), repeat=1, note=lambda _: None)
    assert report.correct
    assert all(result.skipped is None for result in report.points[0].results)


@pytest.mark.skipif(not HAS_NIXL, reason="pip install 'flexpert[nixl]' to test it")
def test_bytes_between_machines_are_those_of_the_rows_and_little_more() -> None:
    work = Workload(ranks=4, tokens=32, hidden=512, topk=8, experts=128, dtype="bfloat16", seed=1)
    settings = msgspec.structs.replace(SETTINGS, channel="auto", machines=2)
    report = run_comm([work], settings, (), repeat=12, note=lambda _: None)
    assert report.correct
    counted = {result.baseline: result.link_bytes for result in report.points[0].results}
    machine, rank, expert = (
        counted[name] for name in ("flexpert", "flexpert, row per rank", "flexpert, row per expert")
    )
    assert machine
    assert rank
    assert expert
    assert machine < 0.45 * expert
    assert machine < 0.75 * rank
    inputs = [(r, make_input(work, r, turn)) for r in range(4) for turn in range(work.pool)]
    owners = expert_table(work).rank
    rows = sum(int((owners[i.expert_ids] // 2 != r // 2).sum()) for r, i in inputs) / work.pool
    least = rows * (2 * work.row_bytes + 64)  # the way out has 64 bytes of routing a row
    assert 0.98 * least < expert < 1.02 * least


def test_a_rank_that_fails_is_named_and_none_is_left() -> None:
    with Ranks(2, SETTINGS) as ranks:
        processes = list(ranks._processes)
        with pytest.raises(RankFailed, match="rank 0 failed in measure"):
            ranks.all("measure", "no such baseline", 0, 1, 0)
    assert not any(process.alive() for process in processes)


def test_wrong_rows_and_sums_are_found() -> None:
    rows = torch.randn(4, 256).bfloat16()
    assert not rank_module.wrong_rows(rows, rows, exact=True)
    assert rank_module.wrong_rows(rows.roll(1, 0), rows, exact=True)
    assert rank_module.wrong_rows(rows.roll(1, 0), rows, exact=False)
    desired = rows.double()
    assert not rank_module.wrong_result(rows, desired, desired.abs())
    assert rank_module.wrong_result(rows.roll(1, 0), desired, desired.abs())


def test_deduplicated_rows_counts_a_token_once_a_rank() -> None:
    work = work_of(6)
    owners = expert_table(work).rank[make_input(work, 1, 0).expert_ids]
    desired = [sum(rank in row and rank != 1 for row in owners.tolist()) for rank in range(3)]
    assert deduplicated_rows(work, 1, 0).tolist() == desired


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"baselines": "gloo,mpi"}, "mpi"),
        ({"tokens": "8,x"}, "--tokens"),
        ({"tokens": "0"}, "--tokens"),
        ({"hidden": 100}, "--hidden"),
        ({"topk": 9, "experts": 8}, "--topk"),
        ({"fp8": "ue8m0", "hidden": 128}, "--fp8"),
        ({"plot": Path("picture.pdf")}, "--plot"),
        ({"machines": 5}, "--machines"),
        ({"machines": 2, "channel": "nixl"}, "--machines"),
    ],
)
def test_bad_flags_are_named(flags: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        bench_comm(**flags)  # type: ignore[arg-type]
