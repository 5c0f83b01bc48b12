"""Whether a process of this machine lives, known within a millisecond of its end.

See liveness.c: a process that has much memory keeps its sockets and its pid for a tenth of a second
and more after it was killed, while the system gives the memory back.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.shared_pages import HEADER, create_pages, open_pages

_BYTES = 64
_held: list[LivenessLock] = []  # until the process ends


class LivenessLock:
    """Held by the thread that makes it until that ends, with its process or before.

    address: for `watch` in another process.
    """

    def __init__(self) -> None:
        """Raises: OSError: there is no memory, or the system has no such mutexes."""
        self.address, self._mapped, self._descriptor = create_pages(_BYTES)
        error = lib.fx_liveness_hold(_place(self._mapped))
        if error:
            raise OSError(error, os.strerror(error))
        # if it were unmapped before the thread ends, whoever watches it would sleep on
        _held.append(self)


def watch(address: bytes, ended: Callable[[], None]) -> None:
    """Have `ended` called, in a thread of its own, when the thread that holds a liveness lock ends.

    It is not called if the liveness lock is held by nobody, or is none.

    Raises:
        PeerUnreachable: its process is gone or on another machine.
        ValueError: not an address.
    """
    size, mapped, descriptor = open_pages(address, writable=True)
    os.close(descriptor)
    if size < _BYTES:
        raise ValueError(f"a liveness lock has {_BYTES} bytes, not {size}")

    def wait() -> None:
        if lib.fx_liveness_await(_place(mapped)):
            ended()

    threading.Thread(target=wait, name="liveness", daemon=True).start()


def _place(mapped: mmap.mmap) -> int:
    """Where the lock lies; stays there as long as the mapping."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(mapped))) + HEADER
