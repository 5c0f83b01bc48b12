"""Experts from bytes of the host onto a device, several at a time, through page-locked memory.

Each thread has two pieces of page-locked memory: while the device copies one, the other is filled.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from flexpert.kernels.device_stream import DeviceStream
from flexpert.moe.expert_store import Key

MOST_THREADS = 8
MOST_LOCKED_BYTES = 256 << 20

_PIECES = 2  # of a thread

Read = Callable[[Key, Tensor], None]
"""Fills [bytes of the expert] uint8 of the host; several threads call it at once."""


class ExpertUpload:
    """Uploads one list of experts; the first error ends it, and is raised."""

    def __init__(
        self,
        stream: DeviceStream,
        places: Sequence[tuple[Key, Tensor]],
        read: Read,
        *,
        check: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        """
        Args:
            places: [bytes of the expert] uint8 on the device, for each.
            check: called between experts, in any thread; raises what the upload is to end with.
            progress: told how many experts are uploaded, in any thread.
        """
        self._stream = stream
        self._places = places
        self._read = read
        self._check = check
        self._progress = progress
        self._lock = threading.Lock()
        self._next = 0
        self._done = 0
        self._failed = False

    def run(self) -> None:
        """Returns when all is on the device. Raises: what reading or `check` raises."""
        if not self._places:
            return
        largest = max(place.numel() for _, place in self._places)
        count = threads_for(largest, len(self._places))
        pieces = [self._stream.host_buffer(_PIECES * largest) for _ in range(count)]
        with ThreadPoolExecutor(count, thread_name_prefix="upload") as threads:
            works = [threads.submit(self._work, piece) for piece in pieces]
        failed = [error for work in works if (error := work.exception()) is not None]
        if failed:
            raise failed[0]

    def _work(self, memory: Tensor) -> None:
        size = memory.numel() // _PIECES
        pieces = [memory[i * size : (i + 1) * size] for i in range(_PIECES)]
        try:
            with self._stream.aside():
                copied = [self._stream.event() for _ in pieces]
                turn = 0
                try:
                    while (item := self._take()) is not None:
                        key, place = item
                        self._check()
                        copied[turn].synchronize()
                        piece = pieces[turn][: place.numel()]
                        self._read(key, piece)
                        place.copy_(piece, non_blocking=True)
                        copied[turn].record()
                        turn = (turn + 1) % _PIECES
                        self._count()
                finally:
                    self._stream.synchronize()
        except BaseException:
            self._failed = True
            raise

    def _take(self) -> tuple[Key, Tensor] | None:
        with self._lock:
            if self._failed or self._next == len(self._places):
                return None
            self._next += 1
            return self._places[self._next - 1]

    def _count(self) -> None:
        with self._lock:
            self._done += 1
            done = self._done
        self._progress(done)


def threads_for(nbytes: int, experts: int) -> int:
    """How many threads upload so many experts of so many bytes."""
    cores = len(os.sched_getaffinity(0))
    locked = MOST_LOCKED_BYTES // (_PIECES * max(1, nbytes))
    return max(1, min(MOST_THREADS, cores, locked, experts))
