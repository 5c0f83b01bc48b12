"""A capture survives whatever other threads do to the device meanwhile."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import torch

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.peer_memory import export_memory
from flexpert.kernels.device_stream import CudaStream

_CAPTURES = 40
_LAUNCHES = 300  # of one capture: some milliseconds


class _Exported:
    """Gives device memory back when it is collected, as mappings do; part of a cycle."""

    def __init__(self, device: torch.device) -> None:
        self.itself = self
        self.memory = export_memory(1 << 20, device)

    def __del__(self) -> None:
        CAPTURE_GUARD.later(self.memory.close)


def test_frees_allocations_finalisers_and_copies_in_other_threads_during_captures() -> None:
    device = torch.device("cuda", 0)
    stream = CudaStream(device)
    stop, done, errors = threading.Event(), [0] * 4, list[BaseException]()

    def allocate_and_free() -> None:
        export_memory(1 << 20, device).close()

    def finalise() -> None:
        _Exported(device)
        gc.collect()

    def lock_pages() -> None:
        stream.host_buffer(1 << 16)

    def copy() -> None:
        """More of them than torch has streams; each must bring the right bytes."""
        host = stream.host_buffer(1 << 16)
        for value in range(40):
            host.fill_(value)
            with stream.aside():
                there = torch.empty(1 << 16, dtype=torch.uint8, device=device)
                there.copy_(host, non_blocking=True)
                stream.synchronize()
                assert int(there[-1]) == value

    def again(number: int, what: Callable[[], None]) -> None:
        torch.cuda.set_device(device)
        try:
            while not stop.is_set():
                what()
                done[number] += 1
        except BaseException as error:  # noqa: BLE001 - of any kind
            errors.append(error)

    threads = [
        threading.Thread(target=again, args=(number, what))
        for number, what in enumerate([allocate_and_free, finalise, lock_pages, copy])
    ]
    x = torch.arange(1024, device=device, dtype=torch.float32)
    pool = stream.graph_pool()

    def compute() -> torch.Tensor:
        y = x
        for _ in range(_LAUNCHES):
            y = y + 1
        return y

    stream.synchronize()
    for thread in threads:
        thread.start()
    try:
        replays = [stream.capture(compute, pool) for _ in range(_CAPTURES)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    assert min(done) > 0, done
    for replay, result in replays:
        x.add_(1)
        replay()
        stream.synchronize()
        assert torch.equal(result, x + _LAUNCHES)
    assert CAPTURE_GUARD.settle(10.0)
