"""What counts as a rank's progress."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from flexpert.cluster.launcher import LocalLauncher

BUSY = "print(flush=True)\nwhile True: pass"


@pytest.fixture
def busy() -> Iterator[tuple[LocalLauncher, int]]:
    """A launcher whose rank 0 is a process that wants a processor all the time."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        launcher = LocalLauncher(lambda rank, status: None)
        launcher._pids[0] = process.pid
        yield launcher, process.pid
    finally:
        process.kill()
        process.communicate()


def test_who_waits_for_a_processor_is_not_stalled(
    busy: tuple[LocalLauncher, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, _ = busy
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: 1)  # it gets none
    assert launcher.progress(0) != launcher.progress(0)


def test_who_is_stopped_makes_no_progress(busy: tuple[LocalLauncher, int]) -> None:
    launcher, pid = busy
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    before = launcher.progress(0)
    assert before is not None
    assert launcher.progress(0) == before


def test_who_is_gone_makes_none() -> None:
    launcher = LocalLauncher(lambda rank, status: None)
    assert launcher.progress(7) is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    launcher._pids[7] = gone.pid
    assert launcher.progress(7) is None
