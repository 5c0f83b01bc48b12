"""What GPUs have no memory for is refused, by a planted driver."""

from __future__ import annotations

import msgspec
import pytest

from flexpert.cluster.formatting import describe_memory
from flexpert.cluster.gpu_budget import by_gpu, most_held
from flexpert.cluster.head import Head
from flexpert.cluster.hosts.agent_protocol import FreeMemory
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.processes.model_opening import open_source
from flexpert.cluster.processes.model_report import served_model
from flexpert.config import Config, load_config
from flexpert.engine.device_memory_plan import (
    expert_place_nbytes,
    planned_device_memory,
    window_nbytes,
)
from flexpert.engine.gpu_driver import GpuDriver, GpuMemory
from flexpert.engine.rank_protocol import Memory, MemoryUse
from flexpert.errors import OperationRefused
from flexpert.models.source import ModelSource
from flexpert.moe.placement import Placement, replan

MIB, GIB = 2**20, 2**30
HOST_AND_DEVICE = (range(1, 6), range(6, 11))


class Gpus:
    """Some with so many bytes free."""

    def __init__(self, *free: int | None, total: int = 80 * GIB) -> None:
        self.free = list(free)
        self.total = total

    @property
    def gpus(self) -> int:
        return len(self.free)

    def memory(self, gpu: int) -> GpuMemory | None:
        free = self.free[gpu]
        return None if free is None else GpuMemory(self.total, free)


def settings(**cluster: object) -> Config:
    given = {f"cluster.{name}": value for name, value in {"max_ranks": 4, **cluster}.items()}
    return load_config(environment={}, overrides={"engine.device": "cuda", **given})


CONFIG = settings()


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return open_source(CONFIG)


def memory_budget(
    config: Config, source: ModelSource, driver: GpuDriver | None = None
) -> MemoryBudget:
    return MemoryBudget(config, served_model(source, config), driver)


def spread(source: ModelSource, ranks: list[int], before: Placement | None = None) -> Placement:
    return replan(before, ranks, experts=source.info.experts, layers=source.info.moe_layers)


def need(source: ModelSource, placement: Placement, rank: int) -> int:
    engine = CONFIG.engine
    return planned_device_memory(source, engine, 4, placement.count(rank)).total


def test_newcomers_need_what_is_planned_on_the_gpu_that_they_get(source: ModelSource) -> None:
    placement = spread(source, [0, 1, 2])
    on_first = need(source, placement, 0) + need(source, placement, 2)
    on_second = need(source, placement, 1)
    enough = memory_budget(CONFIG, source, Gpus(on_first, on_second))
    enough.check({0, 1, 2}, placement)
    with pytest.raises(OperationRefused, match=r"GPU 0 has .* free, and ranks 0 2 need .* more"):
        memory_budget(CONFIG, source, Gpus(on_first - 1, on_second)).check({0, 1, 2}, placement)
    says = r"GPU 1 .* rank 1 needs .*\(rank 1 with dense .* KV 4096\.0 .*lower --kv-memory or .*fp8"
    with pytest.raises(OperationRefused, match=says):
        memory_budget(CONFIG, source, Gpus(on_first, on_second - 1)).check({0, 1, 2}, placement)


def test_the_ranks_that_are_there_need_only_what_they_load(source: ModelSource) -> None:
    before = spread(source, [0, 1, 2, 3])
    after = spread(source, [0, 1, 2], before)
    loads = {rank: most_held(rank, after, before) - before.count(rank) for rank in after.ranks}
    assert all(count > 0 for count in loads.values())
    place = expert_place_nbytes(source)
    exact = [place * (loads[0] + loads[2]), place * loads[1]]
    memory_budget(CONFIG, source, Gpus(*exact)).check((), after, before)
    with pytest.raises(OperationRefused, match=r"GPU 1 .* rank 1 needs"):
        memory_budget(CONFIG, source, Gpus(exact[0], exact[1] - 1)).check((), after, before)


def test_a_rank_holds_the_experts_of_both_epochs_while_it_changes() -> None:
    before = Placement(4, [{0: [0, 1], 1: [2, 3]}, {0: [0, 1], 1: [2, 3]}])
    after = Placement(4, [{0: [0, 2], 1: [1, 3]}, {0: [0, 1], 1: [2, 3]}])
    assert [most_held(rank, after, before) for rank in (0, 1, 2)] == [5, 5, 0]
    assert most_held(0, after, None) == 4


def test_memory_per_rank_bounds_the_gpus_memory_also_while_it_changes(source: ModelSource) -> None:
    layers = source.info.moe_layers
    half = source.info.experts // 2
    low, high = list(range(half)), list(range(half, 2 * half))
    before = Placement(source.info.experts, [{0: low, 1: high}] * layers)
    swapped = Placement(source.info.experts, [{0: high, 1: low}] * layers)
    limit = need(source, before, 0)
    budget = memory_budget(settings(memory_per_rank=limit), source)
    budget.check({0, 1}, before)
    assert budget.fits(swapped)
    with pytest.raises(OperationRefused, match=r"2 ranks cannot hold .*\(memory_per_rank\)"):
        budget.check((), swapped, before)
    with pytest.raises(OperationRefused, match="memory_per_rank"):
        memory_budget(settings(memory_per_rank=limit - 1), source).check({0, 1}, before)


def test_experts_fit_where_empty_gpus_could_hold_them(source: ModelSource) -> None:
    placement = spread(source, [0, 1])
    both = need(source, placement, 0) + need(source, placement, 1)
    assert memory_budget(CONFIG, source, Gpus(0, total=both)).fits(placement)
    one_gpu = memory_budget(CONFIG, source, Gpus(both, total=both - 1))
    assert not one_gpu.fits(placement)
    assert "within the memory of their GPUs" in one_gpu.too_small([0, 1])
    assert memory_budget(CONFIG, source, Gpus(0, 0, total=both - 1)).fits(placement)


def test_what_a_warm_rank_has_measured_holds_for_the_next(source: ModelSource) -> None:
    placement = spread(source, [0, 1])
    estimate = planned_device_memory(source, CONFIG.engine, 4, placement.count(1))
    measured = planned_device_memory(source, CONFIG.engine, 4, 0, estimate.runtime + GIB)
    budget = memory_budget(CONFIG, source, Gpus(0, estimate.total))
    budget.check({1}, placement, spread(source, [0]))
    budget.learn(measured)
    with pytest.raises(OperationRefused, match="GPU 1"):
        budget.check({1}, placement, spread(source, [0]))


def test_what_a_spare_has_already_is_not_used_by_others(source: ModelSource) -> None:
    placement, before = spread(source, [0, 1]), spread(source, [0])
    needs = need(source, placement, 1)
    budget = memory_budget(CONFIG, source, Gpus(0, needs - GIB))
    with pytest.raises(OperationRefused, match="GPU 1"):
        budget.check({1}, placement, before)
    budget.held = lambda: {1: MemoryUse(0, GIB)}
    budget.check({1}, placement, before)
    budget = memory_budget(CONFIG, source, Gpus(0, needs))
    budget.check_spare(1)
    with pytest.raises(OperationRefused, match="GPU 0 has 0 MiB"):
        budget.check_spare(0)


def test_where_the_driver_does_not_say_nothing_is_refused(source: ModelSource) -> None:
    placement = spread(source, [0, 1])
    for budget in (memory_budget(CONFIG, source), memory_budget(CONFIG, source, Gpus(None, None))):
        budget.check({0, 1}, placement)
        assert budget.fits(placement)


def test_a_plan_names_the_memory_that_its_parts_are_in() -> None:
    host, device = (Memory(*(MIB * size for size in sizes)) for sizes in HOST_AND_DEVICE)
    assert describe_memory(None, None) == ""
    assert describe_memory(host, None) == (
        "dense 1.0 + experts 2.0 + KV 3.0 + windows 4.0 + runtime 5.0 = 15.0 MiB planned"
    )
    assert describe_memory(host, device) == (
        "GPU dense 6.0 + experts 7.0 + KV 8.0 + windows 9.0 + graphs and runtime 10.0 = 40.0 MiB, "
        "host 15.0 MiB planned"
    )


def test_a_service_says_when_it_cannot_compare(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexpert.cluster.head.driver_of", lambda gpus: None)
    said: list[str] = []
    head = Head(CONFIG)
    head.info = msgspec.structs.replace(served_model(source, CONFIG), gpus=2)
    assert head._gpu_driver(said.append) is None
    assert said == ["NVML does not say how much memory the GPUs have free: it is not checked"]


def test_ranks_are_dealt_out_to_the_gpus_in_turn() -> None:
    assert by_gpu({0: 1, 1: 10, 2: 100, 5: 1000}, 2) == {0: 101, 1: 1010}


def test_a_rank_of_another_host_needs_memory_there_and_none_here(source: ModelSource) -> None:
    config = load_config()
    placement = spread(source, [0, 1])
    budget = memory_budget(config, source)
    needs = budget.planned(placement)[1]
    budget.elsewhere = lambda: {1: FreeMemory(needs)}
    budget.check({1}, placement)
    budget.elsewhere = lambda: {1: FreeMemory(needs - 1)}
    with pytest.raises(OperationRefused, match=r"rank 1 needs .* but its host has"):
        budget.check({1}, placement)
    nothing_here = memory_budget(load_config(overrides={"cluster.memory_headroom": 0.99}), source)
    nothing_here.elsewhere = lambda: {1: FreeMemory(needs)}
    nothing_here.check({1}, placement)
    with pytest.raises(OperationRefused, match="1 more ranks need"):
        nothing_here.check({0, 1}, placement)


def test_a_rank_of_another_host_needs_a_gpu_there_and_none_here(source: ModelSource) -> None:
    """Rank 2 would share GPU 0 with rank 0, were it of this machine."""
    before = spread(source, [0, 1])
    placement = spread(source, [0, 1, 2], before)
    budget = memory_budget(CONFIG, source, Gpus(0, 0))
    needs = need(source, placement, 2)
    budget.elsewhere = lambda: {2: FreeMemory(64 * GIB, needs)}
    budget.check({2}, placement, before)
    budget.elsewhere = lambda: {2: FreeMemory(64 * GIB, needs - 1)}
    with pytest.raises(OperationRefused, match=r"rank 2 needs .* of a GPU but that of its host"):
        budget.check({2}, placement, before)
    budget.elsewhere = lambda: {2: FreeMemory(64 * GIB)}  # nothing says how much is free there
    budget.check({2}, placement, before)


def test_deterministic_ranks_have_room_for_a_row_of_each_choice(source: ModelSource) -> None:
    usual, fixed = (
        CONFIG.engine.model_copy(update={"deterministic": deterministic})
        for deterministic in (False, True)
    )
    row = source.info.hidden * source.info.dtype.itemsize
    more = (source.info.topk - 1) * 4 * usual.max_tokens_per_step * row
    windows = [window_nbytes(source, engine, 4) for engine in (usual, fixed)]
    assert windows[1] - windows[0] == pytest.approx(more, abs=2**16)  # parts are aligned
    assert source.info.topk > 1
