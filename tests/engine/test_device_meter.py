"""What a rank on a GPU says it takes: what it counted, and what the driver took besides."""

from __future__ import annotations

import pytest
import torch

from flexpert.engine.device_memory_plan import CONTEXT_BYTES
from flexpert.engine.device_meter import MOST_CONTEXT_BYTES, DeviceMeter
from flexpert.engine.gpu_driver import GpuMemory
from flexpert.engine.gpu_usage import GpuUsage
from flexpert.engine.rank_protocol import Memory

GIB = 2**30
WEIGHTS, ALLOCATED, CONTEXT, POOL = 2 * GIB, 5 * GIB, 700 * 2**20, 3 * GIB


class Gpu:
    """A planted driver of one GPU; `used` is what it says."""

    gpus = 1
    used: int | None = GIB  # by others

    def memory(self, gpu: int) -> GpuMemory | None:
        return None if self.used is None else GpuMemory(80 * GIB, 80 * GIB - self.used)


class Store:
    allocated = 4 * GIB
    spare = GIB


def plan(experts: int) -> Memory:
    return Memory(WEIGHTS, experts, 4 * GIB, GIB, CONTEXT_BYTES)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: POOL)
    return Gpu()


def opened(gpu: Gpu) -> DeviceMeter:
    """The meter of a rank that has everything by now; the driver took CONTEXT for it."""
    usage = GpuUsage(0, gpu)
    if gpu.used is not None:
        gpu.used += POOL + ALLOCATED + Store.allocated + CONTEXT
    return DeviceMeter(usage, Store(), plan, weights=WEIGHTS, allocated=ALLOCATED)


def test_a_warm_rank_knows_what_the_driver_took_for_it(gpu: Gpu) -> None:
    meter = opened(gpu)
    assert meter.plan(7) == plan(7)  # an estimate
    meter.warm(alone=True)
    assert meter.used == POOL + ALLOCATED + Store.allocated + CONTEXT
    assert meter.spare == GIB
    assert meter.plan(7) == Memory(WEIGHTS, 7, 4 * GIB, GIB, POOL - WEIGHTS + CONTEXT)


def test_it_is_found_out_once_and_what_was_allocated_since_is_counted(gpu: Gpu) -> None:
    meter = opened(gpu)
    meter.warm(alone=True)
    before, planned = meter.used, meter.plan(7)
    assert gpu.used is not None
    gpu.used += 30 * GIB  # another process
    meter.warm(alone=True)
    meter.measure()
    assert (meter.used, meter.plan(7)) == (before, planned)


def test_beside_other_ranks_it_is_an_estimate(gpu: Gpu) -> None:
    meter = opened(gpu)
    meter.warm(alone=False)
    assert meter.used == POOL + ALLOCATED + Store.allocated + CONTEXT_BYTES


@pytest.mark.parametrize("others", [MOST_CONTEXT_BYTES, -GIB])
def test_what_others_take_or_free_meanwhile_is_not_taken_for_the_drivers(
    gpu: Gpu, others: int
) -> None:
    meter = opened(gpu)
    assert gpu.used is not None
    gpu.used += others
    meter.warm(alone=True)
    assert meter.used == POOL + ALLOCATED + Store.allocated + CONTEXT_BYTES


def test_without_an_answer_of_the_driver_it_is_an_estimate(gpu: Gpu) -> None:
    gpu.used = None
    meter = opened(gpu)
    meter.warm(alone=True)
    assert meter.used == POOL + ALLOCATED + Store.allocated + CONTEXT_BYTES
