"""What the driver says of the GPUs' memory, asked through NVML: no GPU is opened for it.

A CUDA context costs some hundred MiB of a GPU and stays until its process ends, so that the head,
which computes nothing, must not have one; and a rank must know what was in use before it had one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of a whole GPU, whoever uses them."""

    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free


class GpuDriver(Protocol):
    """gpus: how many this process may use; they are numbered as CUDA numbers them."""

    @property
    def gpus(self) -> int: ...

    def memory(self, gpu: int) -> GpuMemory | None:
        """Now; None: the driver does not say."""


class _Refused(Exception):  # noqa: N818 - a signal within this module
    """A call of NVML failed, or which GPUs are meant cannot be told."""


class _MemoryInfo(ctypes.Structure):
    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


def open_driver(environment: Mapping[str, str] = os.environ) -> GpuDriver | None:
    """The driver of this machine's GPUs; None: there is no NVML, or it does not answer.

    environment: its CUDA_VISIBLE_DEVICES says which of the GPUs this process may use.
    """
    try:
        return NvmlDriver(ctypes.CDLL(_LIBRARY), environment)
    except (OSError, AttributeError, _Refused):
        return None


class NvmlDriver:
    """`GpuDriver` by NVML."""

    def __init__(self, library: Any, environment: Mapping[str, str]) -> None:
        """library: NVML, loaded. Raises: _Refused"""
        self._library = library
        _check(library.nvmlInit_v2())
        count = ctypes.c_uint()
        _check(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        everything = [self._by_index(index) for index in range(count.value)]
        chosen = environment.get("CUDA_VISIBLE_DEVICES")
        by_bus = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if not by_bus and len({self._total(handle) for handle in everything}) > 1:
            raise _Refused  # CUDA numbers them by speed then, NVML by bus
        uuids = [self._uuid(handle) for handle in everything]
        self._handles = [
            everything[name] if isinstance(name, int) else self._by_uuid(name)
            for name in visible_gpus(chosen, uuids)
        ]

    @property
    def gpus(self) -> int:
        return len(self._handles)

    def memory(self, gpu: int) -> GpuMemory | None:
        info = _MemoryInfo()
        status = self._library.nvmlDeviceGetMemoryInfo(self._handles[gpu], ctypes.byref(info))
        return None if status else GpuMemory(info.total, info.free)

    def _by_index(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        _check(self._library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)))
        return handle

    def _by_uuid(self, uuid: str) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        _check(self._library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)))
        return handle

    def _total(self, handle: ctypes.c_void_p) -> int:
        info = _MemoryInfo()
        _check(self._library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)))
        return int(info.total)

    def _uuid(self, handle: ctypes.c_void_p) -> str:
        text = ctypes.create_string_buffer(_UUID_BYTES)
        _check(self._library.nvmlDeviceGetUUID(handle, text, _UUID_BYTES))
        return text.value.decode()


def _check(status: int) -> None:
    if status:
        raise _Refused(f"NVML answers {status}")


def visible_gpus(setting: str | None, uuids: Sequence[str]) -> list[int | str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, in CUDA's order: an index, or the UUID of a MIG
    instance.

    As CUDA reads it: names are indices or the beginnings of UUIDs, and the first one that is no
    GPU ends the list.

    Args:
        setting: its value; None: it is not set, and all count.
        uuids: of all GPUs, by index.
    """
    if setting is None:
        return list(range(len(uuids)))
    found: list[int | str] = []
    for name in (part.strip() for part in setting.split(",")):
        if name.startswith("MIG-"):
            found.append(name)
            continue
        index = _index(name, uuids)
        if index is None:
            break
        found.append(index)
    return found


def _index(name: str, uuids: Sequence[str]) -> int | None:
    if name.isdecimal():
        return int(name) if int(name) < len(uuids) else None
    named = [index for index, uuid in enumerate(uuids) if name and uuid.startswith(name)]
    return named[0] if len(named) == 1 else None


def driver_of(gpus: int) -> GpuDriver | None:
    """The driver, if it has as many GPUs as CUDA sees."""
    driver = open_driver()
    return driver if driver and driver.gpus == gpus else None
