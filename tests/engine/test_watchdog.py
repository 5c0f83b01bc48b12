"""A loop that hangs is told from one that computes, waits or was held up with its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexpert.engine.watchdog import Watchdog


def idle() -> object:
    return 0


def test_a_loop_that_turns_moves() -> None:
    watchdog = Watchdog(0.2, 0.0)
    assert [watchdog.look(0.2 * at, at, idle) for at in range(1, 20)] == [0.0] * 19


def test_a_loop_that_neither_turns_nor_works_hangs_from_then_on() -> None:
    watchdog = Watchdog(0.25, 0.0)
    watchdog.look(0.25, 7, idle)
    assert [watchdog.look(0.25 * at, 7, idle) for at in range(2, 7)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert watchdog.look(1.75, 8, idle) == 0.0
    assert watchdog.look(2.0, 8, idle) == 0.0


def test_a_long_turn_that_works_is_waited_for() -> None:
    watchdog, done = Watchdog(0.2, 0.0), iter(range(100))
    assert [watchdog.look(0.2 * at, 7, lambda: next(done)) for at in range(1, 50)] == [0.0] * 49


def test_a_process_that_was_held_up_blames_nobody() -> None:
    watchdog = Watchdog(0.2, 0.0)
    for at in range(1, 4):
        watchdog.look(0.2 * at, 7, idle)
    assert watchdog.look(30.0, 7, idle) == 0.0
    assert watchdog.look(30.2, 7, idle) == 0.0
    assert watchdog.look(30.4, 7, idle) == pytest.approx(0.2)


PROGRAM = """
import ctypes, mmap, sys, threading, time
from flexpert.engine.watchdog import Watchdog, work_of_main_thread

stuck, over = [], threading.Event()

def watch():
    watchdog = Watchdog(0.1, time.monotonic())
    while not over.wait(0.1):
        sum(range(50_000))  # a helper's own work counts for nothing
        stuck.append(watchdog.look(time.monotonic(), 1, work_of_main_thread))

thread = threading.Thread(target=watch)
thread.start()
until = time.monotonic() + 2.0
if sys.argv[1] == "hangs":
    ctypes.CDLL(None).usleep(2_000_000)  # as in a driver's call
elif sys.argv[1] == "computes":
    while time.monotonic() < until:
        sum(range(100_000))
else:  # pages come in one by one
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4096 * page)
    for at in range(4096):
        memory[at * page] = 1
        time.sleep(0.02)
        if time.monotonic() > until:
            break
over.set()
thread.join()
print(max(stuck))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "least", "most"), [("hangs", 1.0, 2.5), ("computes", 0.0, 0.6), ("pages", 0.0, 0.6)]
)
def test_work_of_the_main_thread_is_seen_and_that_of_helpers_is_not(
    what: str, least: float, most: float
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, what],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert least <= float(done.stdout) <= most
