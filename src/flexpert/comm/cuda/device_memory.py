"""Memory of a GPU that a rank lets its peers read: see `flexpert.comm.peer_memory`."""

from __future__ import annotations

import os

import msgspec
import torch

from flexpert.comm.cuda.ipc_memory import PeerMemory, SharedMemory
from flexpert.comm.errors import PeerUnreachable


class _Address(msgspec.Struct, frozen=True, array_like=True):
    """pointer: for this process; handle: for others."""

    pid: int
    pointer: int
    handle: bytes
    size: int


class ExportedDeviceMemory:
    """`ExportedMemory` of device memory."""

    resident = 0

    def __init__(self, size: int, device: torch.device, *, zeroed: bool) -> None:
        """Raises: CudaError: there is none."""
        self._memory = SharedMemory(size, device, zeroed=zeroed)
        self.bytes = self._memory.tensor
        address = _Address(os.getpid(), self._memory.address, self._memory.handle, size)
        self.address = msgspec.msgpack.encode(address)

    def close(self) -> None:
        self._memory.close()


class ImportedDeviceMemory:
    """A peer's `ExportedDeviceMemory`; unmapped when the last tensor that reads it is gone."""

    def __init__(self, address: bytes, device: torch.device) -> None:
        """
        Raises:
            PeerUnreachable: its process is gone, or its GPU cannot be reached from this one.
            ValueError: not an address.
        """
        try:
            there = msgspec.msgpack.decode(address, type=_Address)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not an address of memory on a GPU: {error}") from error
        if there.pid == os.getpid():
            raise PeerUnreachable("a rank of this process exports to other processes only")
        self.bytes = PeerMemory(f"pid {there.pid}", there.handle, device).tensor(there.size)
