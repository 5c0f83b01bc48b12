"""Whether a process of this machine lives, known within a millisecond of its end.

See liveness.c: a process that has much memory keeps its sockets and its pid for a tenth of a second
and more after it was killed, while the system gives the memory back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from flexpert.comm.host._kernels import lib
from flexpert.comm.peer_memory import ImportedPages, export_pages

_BYTES = 64
_held: list[LivenessLock] = []  # until the process ends


class LivenessLock:
    """Held by the thread that makes it until that ends, with its process or before.

    address: for `watch` in another process.
    """

    def __init__(self) -> None:
        """Raises: OSError: there is no memory, or the system has no such mutexes."""
        self._exported = export_pages(_BYTES)
        error = lib.fx_liveness_hold(self._exported.bytes.data_ptr())
        if error:
            raise OSError(error, os.strerror(error))
        self.address = self._exported.address
        # if it were unmapped before the thread ends, whoever watches it would sleep on
        _held.append(self)


def watch(address: bytes, ended: Callable[[], None]) -> None:
    """Have `ended` called, in a thread of its own, when the thread that holds a liveness lock ends.

    It is not called if the liveness lock is held by nobody, or is none.

    Raises:
        PeerUnreachable: its process is gone or on another machine.
        ValueError: not an address.
    """
    imported = ImportedPages(address, writable=True)
    if len(imported.bytes) < _BYTES:
        raise ValueError(f"a liveness lock has {_BYTES} bytes, not {len(imported.bytes)}")

    def wait() -> None:
        if lib.fx_liveness_await(imported.bytes.data_ptr()):
            ended()

    threading.Thread(target=wait, name="liveness", daemon=True).start()
