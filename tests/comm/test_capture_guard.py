"""Captures and the calls they do not survive never meet, whoever makes these and when."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable

import pytest
from support.waiting import wait_until

from flexpert.comm.capture_guard import CaptureGuard
from flexpert.comm.errors import CommError


class Device:
    """Notes a call that meets a capture."""

    def __init__(self) -> None:
        self.capturing = False
        self.met: list[str] = []
        self.calls = 0

    def call(self, what: str) -> None:
        if self.capturing:
            self.met.append(what)
        self.calls += 1


class Mapping:
    """Gives memory of the device back when it is collected; part of a cycle."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self.itself = self
        self.give_back = give_back

    def __del__(self) -> None:
        self.give_back()


def test_frees_allocations_and_finalisers_of_other_threads_wait_for_a_capture() -> None:
    guard, device = CaptureGuard(), Device()
    stop = threading.Event()

    def apart(what: str) -> None:
        with guard.apart():
            device.call(what)

    def other() -> None:
        while not stop.is_set():
            apart("malloc")
            Mapping(lambda: guard.later(lambda: apart("unmap")))
            gc.collect()

    threads = [threading.Thread(target=other) for _ in range(2)]
    gc.freeze()  # what other tests have imported is not looked through each time
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            before = device.calls
            with guard.capturing():
                device.capturing = True
                Mapping(lambda: guard.later(lambda: apart("unmap of the capturing thread")))
                time.sleep(0.002)
                device.capturing = False
            wait_until(lambda before=before: device.calls > before)  # type: ignore[misc]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        gc.unfreeze()
    assert guard.settle(10)
    assert not device.met


def test_garbage_is_not_collected_in_a_capture_and_is_afterwards() -> None:
    guard = CaptureGuard()
    with guard.capturing():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with guard.capturing():
            pass
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


def test_what_cannot_be_given_back_does_not_keep_the_rest() -> None:
    guard = CaptureGuard()

    def fail() -> None:
        raise CommError("the driver does not want to")

    done = threading.Event()
    guard.later(fail)
    guard.later(done.set)
    assert guard.settle(10)
    assert done.is_set()


def test_a_failed_capture_leaves_the_device_to_others() -> None:
    guard = CaptureGuard()
    with pytest.raises(RuntimeError), guard.capturing():
        raise RuntimeError
    with guard.apart():
        pass
