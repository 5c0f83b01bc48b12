"""Bytes of the host into a window, in order: what a flag stands for is there before the flag."""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

from flexpert.comm.cuda.cuda_runtime import check, load_runtime, new_stream

_TO_DEVICE = 1


class LaneCopies(Protocol):
    """Used by one thread."""

    def copy(self, target: int, source: int, size: int) -> None:
        """`size` bytes of the host to an address of the window, after all that was copied before.
        Returns at once; `source` is page-locked and stays as it is until `wait`.

        Raises: CudaError
        """

    def wait(self) -> None:
        """Until the window has all that was copied."""


class HostCopies:
    """Where the window is in memory of the host, too."""

    def copy(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def wait(self) -> None:
        pass


class DeviceCopies:
    """On a stream of its own, so that kernels which wait for these bytes do not hold them up."""

    def __init__(self, device: torch.device) -> None:
        """Raises: CudaError"""
        self._runtime = load_runtime()
        self._device = device
        self._stream = new_stream(device)
        self._handle = ctypes.c_void_p(self._stream.cuda_stream)

    def copy(self, target: int, source: int, size: int) -> None:
        status = self._runtime.cudaMemcpyAsync(
            ctypes.c_void_p(target),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            ctypes.c_int(_TO_DEVICE),
            self._handle,
        )
        check(self._runtime, f"copying {size} bytes into a window", status)

    def wait(self) -> None:
        check(self._runtime, "copies", self._runtime.cudaStreamSynchronize(self._handle))


def copies_into(device: torch.device) -> LaneCopies:
    """For a window on this device. Raises: CudaError"""
    return DeviceCopies(device) if device.type == "cuda" else HostCopies()
