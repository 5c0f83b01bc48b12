"""When the buffer underneath is closed."""

from __future__ import annotations

import threading
from types import TracebackType

from flexpert.comm.buffer import Buffer


class Lifetime:
    """Closes `core`, but not under the feet of a call.

    `Buffer.destroy` may run in a signal handler, and so in the middle of an exchange of the same
    thread. Then the exchange is interrupted, and the buffer closed when it has unwound.
    """

    def __init__(self, core: Buffer) -> None:
        self._core = core
        self._thread: int | None = None
        self._depth = 0
        self._ending = False

    def call(self) -> Lifetime:
        """To be entered around all that uses memory of `core`, in one thread at a time."""
        return self

    def __enter__(self) -> None:
        self._depth += 1
        self._thread = threading.get_ident()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._thread = None
            if self._ending:
                self._core.close()

    def end(self) -> None:
        """Close now, or when the call of this thread has unwound; idempotent."""
        self._ending = True
        if self._thread == threading.get_ident():
            self._core.interrupt()
        else:
            self._core.close()
