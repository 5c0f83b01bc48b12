"""Which GPUs NVML is asked about, and what it answers; NVML itself is planted here."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from flexpert.engine import gpu_driver
from flexpert.engine.gpu_driver import GpuMemory, NvmlDriver, open_driver, visible_gpus

UUIDS = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]
MIB = 2**20


class PlantedNvml:
    """As many GPUs as there are UUIDs; number n uses n + 1 MiB."""

    def __init__(self, totals: list[int], answers: int = 0) -> None:
        self.totals = totals
        self.answers = answers  # to asking for memory

    def nvmlInit_v2(self) -> int:  # noqa: N802 - its name
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.totals)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:  # noqa: N802
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 1 if uuid == b"MIG-1" else None
        return 0 if uuid == b"MIG-1" else 6

    def nvmlDeviceGetUUID(self, handle: ctypes.c_void_p, text: Any, size: int) -> int:  # noqa: N802
        assert handle.value is not None
        text.value = UUIDS[handle.value - 1].encode()
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, info: Any) -> int:  # noqa: N802
        assert handle.value is not None
        info._obj.total = self.totals[handle.value - 1]
        info._obj.used = handle.value * MIB
        info._obj.free = info._obj.total - info._obj.used
        return self.answers


def test_memory_is_that_of_the_gpus_as_cuda_numbers_them() -> None:
    nvml = PlantedNvml([80 * MIB] * 3)
    driver = NvmlDriver(nvml, {"CUDA_VISIBLE_DEVICES": "2,GPU-aabb"})
    assert driver.gpus == 2
    assert driver.memory(0) == GpuMemory(80 * MIB, 77 * MIB)
    found = driver.memory(1)
    assert found is not None
    assert found.used == 2 * MIB
    nvml.answers = 15
    assert driver.memory(0) is None


def test_a_mig_instance_is_asked_for_by_its_name() -> None:
    driver = NvmlDriver(PlantedNvml([MIB * 8]), {"CUDA_VISIBLE_DEVICES": "MIG-1"})
    assert driver.memory(0) == GpuMemory(8 * MIB, 7 * MIB)


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2, 0", [2, 0]),
        ("0,-1,1", [0]),  # what is no GPU ends the list
        ("1,7,0", [1]),
        ("GPU-cccc-3,GPU-aaaa", [2, 0]),
        ("GPU-aa", []),  # two begin so
        ("MIG-5c,1", ["MIG-5c", 1]),
        ("none", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    setting: str | None, found: list[int | str]
) -> None:
    assert visible_gpus(setting, UUIDS) == found


@pytest.mark.parametrize(
    ("totals", "environment", "known"),
    [
        ([80 * MIB, 40 * MIB], {}, False),  # CUDA numbers them by speed
        ([80 * MIB, 40 * MIB], {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, True),
        ([80 * MIB], {"CUDA_VISIBLE_DEVICES": "MIG-2"}, False),
    ],
)
def test_what_cannot_be_told_is_not_guessed(
    totals: list[int],
    environment: dict[str, str],
    known: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_driver.ctypes, "CDLL", lambda name: PlantedNvml(totals))
    driver = open_driver(environment)
    assert (driver is not None) == known
    assert driver is None or driver.gpus == len(totals)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_nvml_there_is_no_driver() -> None:
    assert open_driver({}) is None
