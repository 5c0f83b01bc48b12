"""The CUDA runtime library that torch has loaded, for what torch does not offer."""

from __future__ import annotations

import ctypes

import torch

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.errors import CommError

HANDLE_BYTES = 64
_NON_BLOCKING = 1


class Handle(ctypes.Structure):
    """cudaIpcMemHandle_t"""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaError(CommError):
    """A call of the CUDA runtime failed."""


def load_runtime() -> ctypes.CDLL:
    """The library that torch has loaded."""
    version = torch.version.cuda
    if version is None:
        raise CudaError("this torch is built without CUDA; install one with it")
    runtime = ctypes.CDLL(f"libcudart.so.{version.split('.')[0]}")
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    runtime.cudaIpcOpenMemHandle.argtypes = [
        ctypes.POINTER(ctypes.c_void_p),
        Handle,
        ctypes.c_uint,
    ]
    return runtime


def check(runtime: ctypes.CDLL, what: str, status: int) -> None:
    if status:
        runtime.cudaGetLastError()  # else the next call of torch reports it
        raise CudaError(f"{what}: {runtime.cudaGetErrorString(status).decode()}")


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is nobody else's, for the rest of the process; torch's own are one of 32.

    Raises: CudaError: there is none.
    """
    runtime = load_runtime()
    pointer = ctypes.c_void_p()
    with torch.cuda.device(device), CAPTURE_GUARD.apart():
        status = runtime.cudaStreamCreateWithFlags(ctypes.byref(pointer), _NON_BLOCKING)
        check(runtime, "a stream", status)
    assert pointer.value is not None
    return torch.cuda.ExternalStream(pointer.value, device)  # type: ignore[no-untyped-call]
