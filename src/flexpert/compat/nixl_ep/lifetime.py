"""When the buffer underneath is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from flexpert.comm.buffer import Buffer


class Lifetime:
    """Closes `core`, but not under the feet of a call.

    `Buffer.destroy` may run in a signal handler, and so in the middle of an exchange of the same
    thread. Then the exchange is interrupted, and the buffer closed when it has unwound.
    """

    def __init__(self, core: Buffer) -> None:
        self._core = core
        self._thread: int | None = None
        self._ending = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around all that uses memory of `core`."""
        outer, self._thread = self._thread, threading.get_ident()
        try:
            yield
        finally:
            self._thread = outer
            if self._ending and outer is None:
                self._core.close()

    def end(self) -> None:
        """Close now, or when the call of this thread has unwound; idempotent."""
        self._ending = True
        if self._thread == threading.get_ident():
            self._core.interrupt()
        else:
            self._core.close()
