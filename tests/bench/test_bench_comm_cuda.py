"""`flexpert bench comm --device cuda`: what can be known of it without a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
from rich.console import Console
from torch.distributed import HashStore

pytest.importorskip("triton", reason="Triton is not installed: pip install flexpert[cuda]")

from flexpert.bench.comm.baseline import Unavailable
from flexpert.bench.comm.baseline_kinds import EAGER_BASELINE_FAMILIES, GPU_BASELINE_FAMILIES
from flexpert.bench.comm.cuda.gpu_baselines import (
    CudaBufferBaseline,
    GpuSite,
    NixlEp,
    TorchCollectives,
    TorchLocal,
    eager_kinds,
    gpu_kinds,
)
from flexpert.bench.comm.cuda.gpu_comm_rank import GpuRank, Phases
from flexpert.bench.comm.cuda.gpu_comm_report import gpu_text
from flexpert.bench.comm.cuda.gpu_comm_run import (
    GpuPoint,
    GpuReport,
    GpuResult,
    Roofline,
    exchanged_bytes,
)
from flexpert.bench.comm.ranks import schema, wrong_result, wrong_rows
from flexpert.bench.comm.workload import (
    Workload,
    expected_arrivals,
    expected_result,
    expert_results,
    make_input,
)
from flexpert.bench.machine import this_machine
from flexpert.bench.statistics import SpreadUs
from flexpert.cli.bench_comm import bench_comm
from flexpert.comm.buffer import Scales
from flexpert.compat.nixl_ep.device_exchange import VARIABLE
from flexpert.errors import ConfigError


def work_of(ranks: int, tokens: int = 6) -> Workload:
    return Workload(
        ranks=ranks, tokens=tokens, hidden=256, topk=3, experts=7, dtype="bfloat16", seed=1
    )


def site_of(work: Workload) -> GpuSite:
    pool = [make_input(work, 0, turn) for turn in range(2)]
    return GpuSite(0, work, cast(Any, None), lambda v: [v], None, 1.0, pool, torch.device("cpu"))


def test_every_baseline_that_can_be_asked_for_is_there() -> None:
    families = {kind.family for kind in gpu_kinds("float32")}
    assert families == {"ours", *GPU_BASELINE_FAMILIES}
    families = {kind.family for kind in eager_kinds("float32")}
    assert families == {"ours", *EAGER_BASELINE_FAMILIES}


def test_torch_on_one_rank_agrees_with_the_oracle() -> None:
    work = work_of(1)
    site = site_of(work)
    torch_local = TorchLocal(site)
    for turn in range(2):
        torch_local.dispatch(turn)
        desired, slots = expected_arrivals(work, 0, turn)
        assert not wrong_rows(torch_local.rows(), desired, exact=True)
        torch_local.put_results(turn, expert_results(desired, slots))
        result = torch_local.combine(turn)
        assert not wrong_result(result, *expected_result(work, site.pool[turn]))


def test_collectives_of_torch_agree_with_the_oracle() -> None:
    """By gloo, in two threads."""
    ranks, store = 2, HashStore()
    work, meeting = work_of(ranks), Barrier(ranks, timeout=30)
    told: list[list[Any]] = [[None] * ranks for _ in range(2)]

    def exchange(rank: int) -> None:
        turn_of_gather = iter(range(99))

        def gather(value: Any) -> list[Any]:
            values = told[next(turn_of_gather) % 2]
            values[rank] = value
            meeting.wait()
            found = list(values)
            meeting.wait()
            return found

        pool = [make_input(work, rank, turn) for turn in range(2)]
        site = GpuSite(rank, work, store, gather, None, 30.0, pool, torch.device("cpu"))
        collectives = TorchCollectives(site)
        for turn in range(2):
            collectives.dispatch(turn)
            desired, slots = expected_arrivals(work, rank, turn)
            assert not wrong_rows(collectives.rows(), desired, exact=True)
            collectives.put_results(turn, expert_results(desired, slots))
            result = collectives.combine(turn)
            assert not wrong_result(result, *expected_result(work, pool[turn]))
        collectives.close()

    with ThreadPoolExecutor(ranks) as threads:
        list(threads.map(exchange, range(ranks)))


@pytest.mark.parametrize("fp8", [None, "float32"])
def test_nixl_ep_s_interface_agrees_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch, fp8: Scales | None
) -> None:
    """Our kernels in Triton's interpreter behind it, called as NVIDIA's are."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and this is for a CPU")
    monkeypatch.setenv(VARIABLE, "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    work = work_of(1, tokens=3)
    site = replace(site_of(work), store=HashStore(), fp8=fp8)
    baseline = NixlEp(site, "flexpert.compat.nixl_ep")
    for turn in range(2):
        baseline.dispatch(turn)
        desired, slots = expected_arrivals(work, 0, turn)
        assert not wrong_rows(baseline.rows(), desired, exact=fp8 is None)
        baseline.put_results(turn, expert_results(desired, slots))
        result = baseline.combine(turn)
        assert not wrong_result(result, *expected_result(work, site.pool[turn]))
    baseline.close()


@pytest.mark.parametrize("fp8", [None, "float32"])
def test_our_buffer_agrees_with_the_oracle(fp8: Scales | None) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and this is for a CPU")
    work = work_of(1, tokens=3)
    site = replace(site_of(work), fp8=fp8)
    baseline = CudaBufferBaseline(site)
    for turn in range(2):
        baseline.dispatch(turn)
        desired, slots = expected_arrivals(work, 0, turn)
        assert not wrong_rows(baseline.rows(), desired, exact=fp8 is None)
        baseline.put_results(turn, expert_results(desired, slots))
        result = baseline.combine(turn)
        assert not wrong_result(result, *expected_result(work, site.pool[turn]))
    baseline.close()


def test_who_cannot_run_here_says_why() -> None:
    with pytest.raises(Unavailable, match="there is nccl"):
        TorchLocal(site_of(work_of(2)))
    with pytest.raises(Unavailable, match="nobody to send to"):
        TorchCollectives(site_of(work_of(1)))
    with pytest.raises(Unavailable, match="nixl_ep needs a GPU"):
        NixlEp(site_of(work_of(1)))


def test_rows_of_nixl_ep_are_put_in_order_of_source_and_token() -> None:
    baseline = NixlEp.__new__(NixlEp)
    baseline._site = cast(Any, SimpleNamespace(device=torch.device("cpu")))
    baseline._fp8 = False
    rows = torch.arange(8.0).view(1, 8, 1)
    tokens = torch.tensor([[2, 0, 1, 5, -1, -1, -1, -1]])
    ranges = torch.tensor([[2 << 32 | 2, 0 << 32 | 2]])  # two rows of rank 0 from 2 on; rank 1: 0
    baseline._last = (rows, torch.tensor([4]), (tokens, ranges, 4, 1))
    assert baseline.rows().flatten().tolist() == [2.0, 3.0, 1.0, 0.0]
    baseline._y = [torch.zeros(1, 8, 1)]
    baseline.put_results(0, torch.tensor([[10.0], [11.0], [12.0], [13.0]]))
    assert baseline._y[0].flatten().tolist() == [13.0, 12.0, 10.0, 11.0, 0, 0, 0, 0]


def test_the_roofline_counts_what_must_move() -> None:
    work = work_of(1)
    row, sent = 256 * 2, 256 + 2 * 4
    dispatch, combine = exchanged_bytes(work, fp8=True, sharing=1)
    assert dispatch == 6 * (row + sent)
    assert combine == 6 * 3 * row + 6 * row
    alone, together = (exchanged_bytes(work_of(2), fp8=False, sharing=n) for n in (1, 2))
    assert together[0] == pytest.approx(2 * alone[0], abs=1)
    assert together[1] == pytest.approx(2 * alone[1], abs=1)
    assert Roofline.of(3_000_000, 6_000_000, 3e12).combine_us == pytest.approx(2.0)


def test_the_table_shows_ratio_roofline_and_who_was_skipped() -> None:
    fast, slow = SpreadUs(1.0, 2.0, 3.0), SpreadUs(8.0, 8.0, 8.0)
    results = [
        GpuResult(baseline="flexpert", dispatch_us=fast, combine_us=fast, pair_us=fast),
        GpuResult(baseline="nixl_ep", dispatch_us=slow, combine_us=slow, pair_us=slow),
        GpuResult(baseline="torch", skipped="no reason"),
    ]
    roofline = Roofline.of(3_000_000, 6_000_000, 3e12)
    point = GpuPoint(workload=work_of(1), roofline=roofline, results=results)
    report = GpuReport(
        machine=this_machine(), devices=["a GPU"], bandwidth=3e12, fp8="float32", contains={},
        points=[point],
    )  # fmt: skip
    assert point.ratio("pair_us") == 0.25
    assert report.correct
    console = Console(width=160, file=None, record=True)
    with console.capture() as captured:
        console.print(gpu_text(report))
    text = captured.get()
    for part in (
        "2.0 (1.0 to 3.0)",
        "0.25",
        "skipped: no reason",
        "3.00 TB/s",
        "a GPU",
        "roofline",
    ):
        assert part in text
    as_nixl_ep = msgspec.structs.replace(results[0], baseline="flexpert as nixl_ep")
    eager = GpuPoint(workload=work_of(1), roofline=roofline, results=[*results, as_nixl_ep])
    with console.capture() as captured:
        console.print(gpu_text(msgspec.structs.replace(report, points=[eager], eager=True)))
    text = captured.get()
    for part in ("host µs", "pair, device µs", "flexpert as nixl_ep / nixl_ep", "one by one"):
        assert part in text
    assert "roofline" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({}, "needs a GPU"),
        ({"baselines": "gloo"}, "--baselines gloo: there are nixl_ep"),
        (
            {"eager": True, "baselines": "torch"},
            "--baselines torch: there are nixl_ep, interface, l",
        ),
        ({"duration": 3.0}, "--duration is not there with --device cuda"),
        ({"plot": Path("latency.png")}, "--plot is not there"),
    ],
)
def test_flags_that_cannot_be_are_named(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        bench_comm(device="cuda", **flags)


def test_only_a_gpu_launches_eagerly() -> None:
    with pytest.raises(ConfigError, match="--eager is for --device cuda"):
        bench_comm(device="cpu", eager=True)


def test_what_gpu_ranks_are_asked_and_answer_can_be_sent() -> None:
    """The signature of a task is the schema of its messages."""
    said: dict[str, tuple[tuple[Any, ...], Any]] = {
        "device_name": ((), "a GPU"),
        "device_index": ((), 0),
        "bandwidth": ((), 3e12),
        "prepare": ((work_of(2),), None),
        "build": (("flexpert",), "no reason"),
        "check": (("flexpert", 1), ""),
        "measure": (("flexpert", 30), Phases([1.0], [2.0], [3.0])),
        "measure_eager": (("flexpert", 30), Phases([1.0], [2.0], [3.0])),
        "drop": (("flexpert",), None),
    }
    tasks = {name for name, found in vars(GpuRank).items() if callable(found) and name[0] != "_"}
    assert set(said) == tasks
    for task, (arguments, answer) in said.items():
        taken, given = schema(GpuRank, task)
        packed = msgspec.msgpack.encode(arguments), msgspec.msgpack.encode(answer)
        assert msgspec.msgpack.decode(packed[0], type=taken) == arguments
        assert msgspec.msgpack.decode(packed[1], type=given) == answer
    for name in ("_gather", "nothing"):
        with pytest.raises(ValueError, match=f"there is no task {name}"):
            schema(GpuRank, name)
