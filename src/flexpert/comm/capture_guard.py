"""Keeps what a capture of a CUDA graph does not survive away from it, in one process.

While one thread captures, some calls of any other thread invalidate the graph: above all waiting
for the whole device, which finalisers and frees used to do at times nobody chose. So there are two
rules, and this module is where they are kept:

  - A thread captures inside of `capturing()`, and whatever allocates, frees, maps, unmaps or pins
    memory of a device, or waits for all of it, does so inside of `apart()`. The two exclude each
    other. Launching, copying and waiting for a stream of one's own need neither.
  - A finaliser does none of these. It hands the call to `later`, and a thread of the guard makes
    it, apart from captures.

Nothing here needs a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue

from flexpert.comm.errors import CommError


class CaptureGuard:
    """See the module's docstring. One for a process: `CAPTURE_GUARD`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deferred: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """For the length of one capture. No cyclic garbage is collected meanwhile: what it would
        finalise may be of the device."""
        with self._lock:
            collects = gc.isenabled()
            gc.disable()
            try:
                yield
            finally:
                if collects:
                    gc.enable()

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """For calls that no capture may meet; waits until the one under way is over."""
        with self._lock:
            if self._thread is None:
                # not in `later`: no finaliser may start a thread
                self._thread = threading.Thread(target=self._run, name="deferred", daemon=True)
                self._thread.start()
            yield

    def later(self, action: Callable[[], None]) -> None:
        """Do this soon, in the guard's thread. May be called anywhere, also in a finaliser.

        action: enters `apart` itself, as whoever made what it gives back did before.
        """
        self._deferred.put(action)

    def settle(self, timeout_s: float) -> bool:
        """Wait until all that was handed to `later` so far is done; whether it was, in time."""
        done = threading.Event()
        with self.apart():
            pass  # the thread runs
        self.later(done.set)
        return done.wait(timeout_s)

    def _run(self) -> None:
        while True:
            action = self._deferred.get()
            with contextlib.suppress(CommError):  # what cannot be given back stays taken
                action()
            del action


CAPTURE_GUARD = CaptureGuard()
