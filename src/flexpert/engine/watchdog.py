"""Whether the step loop of a rank moves, as another thread of its process sees it.

A loop that computes, waits for a peer or for a command moves on. One that does none of these
hangs: in a driver's call, in a lock that nobody gives back. Its process would go on saying that it
lives.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_LATE = 3  # looks; after so long without one the whole process was held up

_STATE, _FAULTS = 0, slice(7, 11)  # of /proc/…/stat, after the name


class Watchdog:
    """How long a loop has not moved (pure).

    Args:
        every_s: between two looks. now: when the first begins; seconds of one clock.
    """

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._looked = now
        self._since = now
        self._count: int | None = None
        self._work: object = None

    def look(self, now: float, count: int, work: Callable[[], object]) -> float:
        """Seconds for which it has not moved.

        Args:
            count: grows with every turn of the loop and of its waits.
            work: changes when the loop's threads work; asked only if count has not changed.
        """
        late = now - self._looked > _LATE * self._every_s
        self._looked = now
        if late or count != self._count:
            self._count, self._work, self._since = count, None, now
            return 0.0
        done = work()
        if done != self._work:
            self._work, self._since = done, now
        return now - self._since


def work_of_main_thread() -> object:
    """Changes when the main thread, or one that computes for it, runs, takes a page fault or waits
    for a core. Those are all threads that Python has not started."""
    main = threading.main_thread()
    helpers = {thread.native_id for thread in threading.enumerate() if thread is not main}
    found = []
    for task in os.listdir("/proc/self/task"):
        if int(task) in helpers:
            continue
        try:
            text = Path(f"/proc/self/task/{task}/stat").read_text()
            spent_ns = time.clock_gettime_ns(_thread_clock(int(task)))
        except OSError:  # it has just ended
            continue
        fields = text.rpartition(")")[2].split()
        if fields[_STATE] == "R":
            return object()
        found.append((task, spent_ns, *fields[_FAULTS]))
    return found


def _thread_clock(thread: int) -> int:
    """The clock of a thread's processor time: as pthread_getcpuclockid(3) names it, but by id."""
    return ~thread << 3 | 6
