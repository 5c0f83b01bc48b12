"""Processor time of processes, to the nanosecond where the system tells it so.

What /proc/PID/stat counts are ticks of 10 ms: too coarse for the few milliseconds that a short load
costs a head.
"""

from __future__ import annotations

import contextlib
import sys
import time

import psutil


def processor_seconds(pid: int) -> float:
    """What a process has used in all its threads, ended ones too, in s.

    Raises: psutil.NoSuchProcess
    """
    if sys.platform == "linux":
        try:
            return time.clock_gettime(_clock_of(pid))
        except OSError:
            raise psutil.NoSuchProcess(pid) from None
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def service_processor_seconds(pid: int) -> tuple[float, float]:
    """Of a process, and of it and all that live below it, in s.

    Raises: psutil.NoSuchProcess
    """
    own = total = processor_seconds(pid)
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += processor_seconds(process.pid)
    return own, total


def _clock_of(pid: int) -> int:
    """Linux's number of the clock of a process's processor time (clock_getcpuclockid(3), which
    Python has for threads only)."""
    scheduler_time = 2
    return (~pid << 3) | scheduler_time
