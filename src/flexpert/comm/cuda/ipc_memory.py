"""Device memory that other processes of this host can map, through the CUDA runtime.

A window is one allocation of cudaMalloc, and its IPC handle is all that a peer needs. A mapping
keeps the memory behind it: when the process that allocated it dies, peers that have it mapped go on
reading and writing without a fault, and the memory is given back when the last of them unmaps it.
So a survivor unmaps when it is ready, never in the middle of a kernel.

torch offers no allocation outside of its pools, whose blocks cannot be shared one by one. Every
call that a capture would not survive is made apart from captures (`CAPTURE_GUARD`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_runtime import CudaError, Handle, check, load_runtime
from flexpert.comm.errors import PeerUnreachable

_LAZY_PEER_ACCESS = 1
_BLOCK = 1 << 21  # bytes: smaller allocations share one, which a process maps but once


class _Array:
    """What torch needs to make a tensor of device memory that it does not own."""

    def __init__(self, owner: object, address: int, size: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class SharedMemory:
    """An allocation of this process on a device.

    tensor: [size] uint8. handle: for `PeerMemory` in another process. Freed by `close`.
    """

    elsewhere = False

    def __init__(self, size: int, device: torch.device, *, zeroed: bool = True) -> None:
        """
        Args:
            zeroed: else it holds anything.

        Raises:
            CudaError: no memory, or the device cannot share it.
        """
        self._runtime = load_runtime()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # a context exists from here on
            with CAPTURE_GUARD.apart():
                self.address = self._allocate(size)
                self.handle = self._share()
            self.tensor = torch.as_tensor(_Array(self, self.address, size), device=device)
            if zeroed:
                self.tensor.zero_()
                torch.cuda.current_stream().synchronize()

    def _allocate(self, size: int) -> int:
        at = ctypes.c_void_p()
        whole = -(-size // _BLOCK) * _BLOCK
        status = self._runtime.cudaMalloc(ctypes.byref(at), ctypes.c_size_t(whole))
        check(self._runtime, f"{size} bytes of the GPU's memory", status)
        assert at.value is not None
        return at.value

    def _share(self) -> bytes:
        handle = Handle()
        status = self._runtime.cudaIpcGetMemHandle(
            ctypes.byref(handle), ctypes.c_void_p(self.address)
        )
        if status:
            self._runtime.cudaFree(ctypes.c_void_p(self.address))
        check(self._runtime, "sharing a window", status)
        return bytes(handle)

    def close(self) -> None:
        """Free it, once nothing that was launched uses it; peers that have it mapped keep it
        alive."""
        address, self.address = self.address, 0
        if address:
            with CAPTURE_GUARD.apart(), torch.cuda.device(self.tensor.device):
                torch.cuda.synchronize()
                status = self._runtime.cudaFree(ctypes.c_void_p(address))
                check(self._runtime, "freeing a window", status)


class PeerMemory:
    """Memory of another process, mapped into this one."""

    elsewhere = True

    def __init__(self, whose: str, handle: bytes, device: torch.device) -> None:
        """Raises: PeerUnreachable: the process is gone, or its GPU cannot be reached from here."""
        self._runtime = load_runtime()
        self._device = device
        at = ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()
            with CAPTURE_GUARD.apart():
                status = self._runtime.cudaIpcOpenMemHandle(
                    ctypes.byref(at), Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS
                )
            try:
                check(self._runtime, f"the memory of {whose} cannot be mapped", status)
            except CudaError as error:
                raise PeerUnreachable(
                    f"{error}; its process has exited, or its GPU cannot be reached from this one"
                ) from error
        assert at.value is not None
        self.address = at.value

    def tensor(self, size: int) -> torch.Tensor:
        """[size] uint8. The mapping goes some time after the last tensor that shares its memory."""
        whole = _Array(_Unmapped(self), self.address, size)
        return torch.as_tensor(whole, device=self._device)

    def close(self) -> None:
        """Unmap it, once nothing that was launched uses it."""
        address, self.address = self.address, 0
        if address:
            with CAPTURE_GUARD.apart(), torch.cuda.device(self._device):
                torch.cuda.synchronize()
                status = self._runtime.cudaIpcCloseMemHandle(ctypes.c_void_p(address))
                check(self._runtime, "unmapping a window", status)


class _Unmapped:
    """Has a mapping closed when it is collected."""

    def __init__(self, memory: PeerMemory) -> None:
        self._close = memory.close

    def __del__(self) -> None:
        CAPTURE_GUARD.later(self._close)
