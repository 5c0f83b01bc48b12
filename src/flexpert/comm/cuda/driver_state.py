"""Whether this process has opened CUDA's driver, found out without opening it."""

from __future__ import annotations

import ctypes
import os

_LIBRARY = "libcuda.so.1"
_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED


def driver_is_open() -> bool:
    """Whether `cuInit` was called here: then a child of a fork cannot use any GPU."""
    try:
        driver = ctypes.CDLL(_LIBRARY, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:  # not even loaded
        return False
    count = ctypes.c_int()
    return int(driver.cuDeviceGetCount(ctypes.byref(count))) != _NOT_INITIALIZED
