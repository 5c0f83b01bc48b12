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

MOST_THREADS = 12
MOST_LOCKED_BYTES = 256 << 20

_PIECES = 2  # of a thread

Read = Callable[[Key, Tensor], None]
"""Fills [bytes of the expert] uint8 of the host; several threads call it at once."""


class ExpertUploader:
    """Of one rank, used by one thread at a time. Page-locked memory is taken by the first upload,
    or ahead, and kept: taking it costs as long as many experts do."""

    def __init__(self, stream: DeviceStream, largest: int) -> None:
        """
        Args:
            largest: bytes of the largest expert.
        """
        self._stream = stream
        self._largest = largest
        self._lock = threading.Lock()
        self._locked: list[Tensor] = []  # [pieces of a thread] uint8, for each

    def prepare(self, experts: int) -> None:
        """Take what an upload of so many experts needs; for another thread than uploads."""
        with self._lock:
            while len(self._locked) < threads_for(self._largest, experts):
                self._locked.append(self._stream.host_buffer(_PIECES * self._largest))

    def upload(
        self,
        places: Sequence[tuple[Key, Tensor]],
        read: Read,
        *,
        check: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        """Returns when all is on the device.

        Args:
            places: [bytes of the expert] uint8 on the device, for each.
            check: called between experts, in any thread; raises what the upload is to end with.
            progress: told how many experts are uploaded, in any thread.

        Raises: what reading or `check` raises, the first of it.
        """
        if not places:
            return
        self.prepare(len(places))
        count = threads_for(self._largest, len(places))
        work = _Upload(self._stream, places, read, check, progress)
        with ThreadPoolExecutor(count, thread_name_prefix="upload") as threads:
            works = [threads.submit(work.run, locked) for locked in self._locked[:count]]
        failed = [error for one in works if (error := one.exception()) is not None]
        if failed:
            raise failed[0]


class _Upload:
    """One list of experts, which threads take from."""

    def __init__(
        self,
        stream: DeviceStream,
        places: Sequence[tuple[Key, Tensor]],
        read: Read,
        check: Callable[[], None],
        progress: Callable[[int], None],
    ) -> None:
        self._stream = stream
        self._places = places
        self._read = read
        self._check = check
        self._progress = progress
        self._lock = threading.Lock()
        self._next = 0
        self._done = 0
        self._failed = False

    def run(self, memory: Tensor) -> None:
        """In one thread. memory: of the thread, page-locked."""
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
