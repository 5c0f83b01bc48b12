"""What a process has used is told finely, in whatever thread, and of those below it."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from flexpert.bench.processor_time import processor_seconds, service_processor_seconds

BUSY = """
import subprocess, sys, threading, time
def busy(seconds):
    while time.thread_time() < seconds:
        pass
thread = threading.Thread(target=busy, args=(0.05,))
thread.start()
thread.join()
if sys.argv[1:]:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=1)
print("done", flush=True)
sys.stdin.read()
if sys.argv[1:]:
    child.communicate()
"""


def test_a_thread_that_has_ended_counts_and_so_do_children() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"done\n", b"done\n"]
        own, total = service_processor_seconds(process.pid)
        assert 0.05 <= own < total - 0.05
        times = psutil.Process(process.pid).cpu_times()
        assert own == pytest.approx(times.user + times.system, abs=0.03)
        process.communicate()
    with pytest.raises(psutil.NoSuchProcess):
        processor_seconds(process.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is the system's ticks")
def test_less_than_a_tick_is_seen() -> None:
    before = processor_seconds(os.getpid())
    end = time.process_time() + 0.001
    while time.process_time() < end:
        pass
    assert processor_seconds(os.getpid()) - before >= 0.001
