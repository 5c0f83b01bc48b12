"""What a process takes of its device beyond what it has allocated by itself; for `DeviceMeter`."""

from __future__ import annotations

import torch

from flexpert.engine.gpu_driver import GpuDriver


class GpuUsage:
    """Of a GPU; made before this process opens it."""

    def __init__(self, gpu: int, driver: GpuDriver | None) -> None:
        """
        Args:
            gpu: as CUDA numbers it.
            driver: None: what it takes is never known.
        """
        self._gpu = gpu
        self._driver = driver
        self._before = self._used()

    def pool(self, weights: int) -> int:
        return int(torch.cuda.memory_reserved(self._gpu))

    def besides(self, counted: int) -> int | None:
        now = self._used()
        if now is None or self._before is None:
            return None
        return now - self._before - counted

    def _used(self) -> int | None:
        memory = self._driver.memory(self._gpu) if self._driver else None
        return None if memory is None else memory.used


class HostUsage:
    """Of the host in the place of a GPU, as Triton's interpreter has it: there is no driver, and
    torch holds what its tensors take."""

    def pool(self, weights: int) -> int:
        return weights

    def besides(self, counted: int) -> int | None:
        return 0
