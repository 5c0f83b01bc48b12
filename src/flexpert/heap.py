"""glibc's malloc in a process that needs much for a moment: what it took goes back.

Where large bodies pass through: left to itself, malloc raises the size from which it maps memory
apart to that of the largest body it has seen, takes the next bodies from its heap, and can give
little of that back, because small objects that live on lie above them.
"""

from __future__ import annotations

import ctypes
from functools import cache

_M_MMAP_THRESHOLD = -3
_LARGE = 2**17  # bytes; what asyncio reads at once is twice as much


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def map_large_apart() -> None:
    """From now on; without effect where malloc is not glibc's."""
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, _LARGE)


def trim() -> None:
    """Hand back whole pages that are free within the heap; takes some milliseconds."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)
