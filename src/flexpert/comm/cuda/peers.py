"""Windows of ranks, and how one finds another's.

Between processes a window is mapped by its IPC handle (memory.py). Ranks of one process use each
other's addresses as they are; in Triton's interpreter a window is exported memory of this machine.
"""

from __future__ import annotations

import os
from typing import Protocol

import msgspec
import torch

from flexpert.comm.buffer import BufferSpec
from flexpert.comm.cuda.ipc_memory import PeerMemory, SharedMemory
from flexpert.comm.peer_memory import ImportedPages, export_pages
from flexpert.comm.window_layout import spec_hash


class WindowMemory(Protocol):
    """A window that this process can write: its own or a peer's.

    address: 0 after `close`. elsewhere: the owner is another process.
    """

    @property
    def address(self) -> int: ...
    @property
    def elsewhere(self) -> bool: ...
    def close(self) -> None: ...


class CudaWindow(WindowMemory, Protocol):
    """The own window. tensor: [size] uint8. handle: for other processes."""

    tensor: torch.Tensor
    handle: bytes


class CudaAddress(msgspec.Struct, frozen=True, array_like=True):
    """What a peer needs to connect.

    control: address of the HostBuffer. pid, pointer: for ranks of one process; handle: for others.
    """

    control: bytes
    spec: bytes
    pid: int
    pointer: int
    handle: bytes

    @classmethod
    def of(cls, control: bytes, spec: BufferSpec, window: CudaWindow) -> CudaAddress:
        return cls(control, spec_hash(spec), os.getpid(), window.address, window.handle)

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)


def decode(peer: int, encoded: bytes, spec: BufferSpec) -> CudaAddress:
    """Raises: ValueError: no address of a GPU rank, or one of another spec."""
    try:
        address = msgspec.msgpack.decode(encoded, type=CudaAddress)
    except msgspec.MsgspecError as error:
        raise ValueError(f"the address of rank {peer} is none of a GPU rank") from error
    if address.spec != spec_hash(spec):
        raise ValueError(f"rank {peer} has a window of another spec than {spec}")
    return address


class _HostWindow:
    elsewhere = False

    def __init__(self, size: int) -> None:
        self._exported = export_pages(size)
        self.tensor = self._exported.bytes
        self.address = self.tensor.data_ptr()
        self.handle = self._exported.address

    def close(self) -> None:
        if self.address:
            self.address = 0
            self._exported.close()


class _HostPeer:
    elsewhere = True

    def __init__(self, handle: bytes) -> None:
        self._imported = ImportedPages(handle, writable=True)
        self.address = self._imported.bytes.data_ptr()

    def close(self) -> None:
        self.address = 0


class _SameProcess:
    elsewhere = False

    def __init__(self, address: int) -> None:
        self.address = address

    def close(self) -> None:
        self.address = 0


def own_window(size: int, device: torch.device) -> CudaWindow:
    """A new window, zeroed. Raises: CudaError: no memory."""
    return SharedMemory(size, device) if device.type == "cuda" else _HostWindow(size)


def open_window(peer: int, address: CudaAddress, device: torch.device) -> WindowMemory:
    """Raises: PeerUnreachable: the process is gone, or its memory cannot be reached."""
    if address.pid == os.getpid():
        return _SameProcess(address.pointer)
    if device.type != "cuda":
        return _HostPeer(address.handle)
    return PeerMemory(f"rank {peer}", address.handle, device)
