"""The parts of a window that one source has, in memory of the host that a GPU reaches.

Laid out like a window, so that kernels write it by the same offsets, but with room for one source,
whose lane is 0: all else of the addresses takes no memory. A lane stands in for the window of a
peer on another machine, where this rank's kernels write what is then sent; and what comes from
there is laid out in another one, from which it is copied into the own window.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_layout import SLOTS_AT, CudaLayout, layout
from flexpert.comm.cuda.cuda_runtime import check, load_runtime
from flexpert.comm.window_layout import PAGE, align

_PORTABLE_AND_MAPPED = 3
_NORESERVE = 0x4000  # of Linux; Python's mmap does not name it


class HostLane:
    """One lane. Nothing of it is zeroed but the flags, which new memory is.

    memory: [size of the window] uint8; only the parts of lane 0 may be touched.
    """

    elsewhere = True

    def __init__(self, spec: BufferSpec, choices: int, device: torch.device) -> None:
        """
        Args:
            choices: rows of results a token; see `layout`.

        Raises:
            OSError: no memory.
            CudaError: it cannot be page-locked.
        """
        where = layout(spec, choices=choices)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._pages = mmap.mmap(-1, where.size, flags)
        self.memory = torch.frombuffer(self._pages, dtype=torch.uint8)
        self.address = self.memory.data_ptr()
        self._locked: list[int] = []
        self._device = device
        if device.type == "cuda":
            try:
                self._lock(_parts(spec, where, choices))
            except BaseException:
                self.close()
                raise

    def view(self, at: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count] elements from byte `at` on."""
        return self.memory[at : at + count * dtype.itemsize].view(dtype)

    def _lock(self, parts: list[tuple[int, int]]) -> None:
        runtime = load_runtime()
        with torch.cuda.device(self._device), CAPTURE_GUARD.apart():
            for begin, end in parts:
                address = self.address + begin
                status = runtime.cudaHostRegister(
                    ctypes.c_void_p(address), ctypes.c_size_t(end - begin), _PORTABLE_AND_MAPPED
                )
                check(runtime, f"page-locking {end - begin} bytes for another machine", status)
                self._locked.append(address)

    def close(self) -> None:
        """Once nothing that was launched uses it."""
        locked, self._locked = self._locked, []
        self.address = 0
        if locked:
            runtime = load_runtime()
            with CAPTURE_GUARD.apart(), torch.cuda.device(self._device):
                torch.cuda.synchronize()
                for address in locked:
                    status = runtime.cudaHostUnregister(ctypes.c_void_p(address))
                    check(runtime, "releasing page-locked memory", status)


def _parts(spec: BufferSpec, where: CudaLayout, choices: int) -> list[tuple[int, int]]:
    """Begin and end of what lane 0 takes, in whole pages, ascending and apart."""
    tokens, row = spec.max_tokens, spec.hidden * spec.dtype.itemsize
    desired = [
        (0, SLOTS_AT + tokens * spec.topk * 4),
        (where.weights_at, where.weights_at + tokens * spec.topk * 4),
        (where.scales_at, where.scales_at + tokens * row // spec.dtype.itemsize // 32),
        (where.rows_at, where.rows_at + tokens * row),
        (where.results_at, where.results_at + tokens * row * choices),
    ]
    parts: list[tuple[int, int]] = []
    for begin, end in desired:
        begin, end = begin // PAGE * PAGE, align(end, PAGE)
        if parts and begin <= parts[-1][1]:
            parts[-1] = (parts[-1][0], max(end, parts[-1][1]))
        else:
            parts.append((begin, end))
    return parts
