"""Memory that a rank lets its peers read outside of the exchanges: a KV cache whose blocks move.

The owner makes it with `export_memory` and goes on using it as its own; a peer that was told the
address reads it with `import_memory`, without the owner's help. Nothing is locked: what may be
read, and until when it stays, is for the two to agree on. On a GPU the memory is the device's
(cuda/exported.py).
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.shared_pages import HEADER, create_pages, open_pages

_PAGE = HEADER
_CPU = torch.device("cpu")


class ExportedMemory(Protocol):
    """Own memory that peers may read.

    address: for a peer's `import_memory`; opaque, below 1 KiB.
    bytes: [size] uint8 on the device.
    resident: bytes of this machine's memory that it takes now; a GPU's do not count.
    """

    @property
    def address(self) -> bytes: ...
    @property
    def bytes(self) -> torch.Tensor: ...
    @property
    def resident(self) -> int: ...

    def close(self) -> None:
        """No peer can open it any more; those that have go on reading what is there."""


class ImportedMemory(Protocol):
    """A peer's memory, for reading; it stays readable when the peer ends. bytes: [size] uint8."""

    @property
    def bytes(self) -> torch.Tensor: ...


class ReadableMemory(Protocol):
    """A peer's memory, on this machine or another one."""

    def copy(self, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Fill each [n] uint8 of the host, contiguous, from its byte of the peer's memory.

        Raises:
            ValueError: it would reach beyond the end.
            CommError: the peer cannot be read any more, or it was cancelled.
        """


def export_memory(size: int, device: torch.device = _CPU, *, zeroed: bool = True) -> ExportedMemory:
    """New memory of `size` bytes.

    zeroed: else it may hold anything, and there sooner.

    Raises: OSError, CudaError: there is none.
    """
    if device.type == "cpu":
        return export_pages(size)
    from flexpert.comm.cuda.device_memory import ExportedDeviceMemory

    return ExportedDeviceMemory(size, device, zeroed=zeroed)


def import_memory(address: bytes, device: torch.device = _CPU) -> ImportedMemory:
    """A peer's memory, for a rank that computes on `device`.

    Raises:
        PeerUnreachable: its process is gone, or its memory cannot be reached from here.
        ValueError: not an address of memory on such a device.
    """
    if device.type == "cpu":
        return ImportedPages(address)
    from flexpert.comm.cuda.device_memory import ImportedDeviceMemory

    return ImportedDeviceMemory(address, device)


@dataclass(frozen=True, slots=True)
class ExportedPages:
    """`ExportedMemory` of this machine's memory; pages are taken on first use."""

    address: bytes
    bytes: torch.Tensor
    _fd: int

    @property
    def resident(self) -> int:
        return os.fstat(self._fd).st_blocks * 512

    def release(self, at: int, size: int) -> None:
        """Give whole pages back; they read as zeros, also for peers.

        Raises: ValueError: not whole pages within.
        """
        if at % _PAGE or size % _PAGE or at < 0 or at + size > len(self.bytes):
            raise ValueError(f"{size} bytes at {at} are not whole pages of {len(self.bytes)} bytes")
        if lib.fx_punch(self._fd, _PAGE + at, size) != 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def close(self) -> None:
        os.close(self._fd)


def export_pages(size: int) -> ExportedPages:
    """New memory of this machine; see `create_pages`. Raises: OSError: there is none."""
    address, mapped, fd = create_pages(size)
    return ExportedPages(address, _view(mapped), fd)


class ImportedPages:
    """A peer's `ExportedPages`; it stays readable when the peer ends."""

    def __init__(self, address: bytes, *, writable: bool = False, copied: bool = False) -> None:
        """
        Args:
            writable: else a write to it ends this process.
            copied: `copy_to` is used, which takes a descriptor more.

        Raises:
            PeerUnreachable: its process is gone or on another machine.
            ValueError: not an address.
        """
        _, self._map, fd = open_pages(address, writable=writable)
        self.bytes = _view(self._map)
        self._fd = fd
        if not copied:
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self._close()

    def copy_to(self, at: int, into: torch.Tensor) -> None:
        """Fill [n] uint8 of the host, contiguous, from byte `at`; no page is mapped for it, and
        other threads run meanwhile. Needs `copied`.

        Raises:
            ValueError: it would reach beyond the end.
            OSError: it cannot be read.
        """
        size = into.numel()
        if at < 0 or at + size > len(self.bytes):
            raise ValueError(f"{size} bytes at {at} of {len(self.bytes)} exported ones")
        view = into.numpy().data
        done = 0
        while done < size:
            got = os.preadv(self._fd, [view[done:]], _PAGE + at + done)
            if got == 0:
                raise OSError(f"exported memory ends after {at + done} bytes")
            done += got

    def copy(self, parts: Sequence[tuple[int, torch.Tensor]]) -> None:
        """See `ReadableMemory`."""
        for at, into in parts:
            into.copy_(self.read(at, (into.numel(),), torch.uint8))

    def read(self, at: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A view of the peer's memory from byte `at`.

        Raises: ValueError: it would reach beyond the end.
        """
        size = dtype.itemsize
        for length in shape:
            size *= length
        if at < 0 or at + size > len(self.bytes):
            raise ValueError(f"{size} bytes at {at} of {len(self.bytes)} exported ones")
        return self.bytes[at : at + size].view(dtype).view(*shape)


def _view(mapped: mmap.mmap) -> torch.Tensor:
    """[size] uint8 of what follows the header; it keeps the mapping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a buffer that cannot be written to
        return torch.frombuffer(mapped, dtype=torch.uint8)[_PAGE:]
