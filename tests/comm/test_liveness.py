"""A process's end is known at once, however long the system takes to give back what it had."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flexpert.comm import PeerUnreachable
from flexpert.comm.host.liveness import LivenessLock, watch
from flexpert.comm.peer_memory import export_pages

HOLDER = """
import sys, time, mmap
from flexpert.comm.host.liveness import LivenessLock
life = LivenessLock()
print(life.address.hex(), flush=True)
memory = mmap.mmap(-1, int(sys.argv[1]))
for page in range(0, len(memory), 4096):
    memory[page] = 1
print("ready", flush=True)
time.sleep(60)
"""


def holder(size: int) -> tuple[subprocess.Popen[str], bytes]:
    """A process that holds a liveness lock, and `size` bytes of memory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(size)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = bytes.fromhex(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    return process, address


@pytest.mark.parametrize("size", [mmap.PAGESIZE, 512 << 20])
def test_a_killed_process_is_known_to_have_ended_no_later_than_it_is_gone(size: int) -> None:
    process, address = holder(size)
    gone = os.pidfd_open(process.pid)
    known = threading.Event()
    times: list[float] = []
    watch(address, lambda: (times.append(time.perf_counter()), known.set()))  # type: ignore[func-returns-value]
    try:
        assert not known.wait(0.2)
        process.send_signal(signal.SIGKILL)
        assert known.wait(10)
        process.wait(10)
        assert times[0] <= time.perf_counter()
    finally:
        process.kill()
        process.wait()
        os.close(gone)


def test_several_watch_one_and_each_is_told() -> None:
    process, address = holder(mmap.PAGESIZE)
    told = [threading.Event() for _ in range(3)]
    for event in told:
        watch(address, event.set)
    process.kill()
    assert all(event.wait(10) for event in told)
    process.wait()


def test_who_is_gone_or_holds_nothing_is_not_watched() -> None:
    process, address = holder(mmap.PAGESIZE)
    process.kill()
    process.wait()
    with pytest.raises(PeerUnreachable):
        watch(address, lambda: None)
    ended = threading.Event()
    nobody = export_pages(64)
    watch(nobody.address, ended.set)  # what a process writes there does no harm
    assert not ended.wait(0.2)
    nobody.close()
    small = export_pages(8)
    with pytest.raises(ValueError, match="64 bytes"):
        watch(small.address, ended.set)
    small.close()


def test_a_thread_that_ends_lets_go() -> None:
    made: list[LivenessLock] = []
    thread_may_end = threading.Event()

    def hold() -> None:
        made.append(LivenessLock())
        held.set()
        thread_may_end.wait(10)

    held, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    watch(made[0].address, ended.set)
    assert not ended.wait(0.1)
    thread_may_end.set()
    thread.join()
    assert ended.wait(10)
