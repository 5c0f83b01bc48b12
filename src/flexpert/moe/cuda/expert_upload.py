"""Experts from bytes of the host onto a device, several at a time."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Sequence

from torch import Tensor

from flexpert.kernels.device_stream import DeviceStream
from flexpert.kernels.host_upload import HostUploads
from flexpert.moe.expert_store import Key
from flexpert.parallel import run_parallel

MOST_THREADS = 12
MOST_LOCKED_BYTES = 256 << 20

Read = Callable[[Key, Tensor], None]
"""Fills [bytes of the expert] uint8 of the host; several threads call it at once."""


class ExpertUploader:
    """Of one rank, used by one thread at a time."""

    def __init__(self, stream: DeviceStream, largest: int) -> None:
        """
        Args:
            largest: bytes of the largest expert.
        """
        self._largest = largest
        self._uploads = HostUploads(stream, largest)

    @property
    def prepared(self) -> int:
        """How many threads have page-locked memory to upload with."""
        return self._uploads.count

    def prepare(self, experts: int) -> None:
        """Take what an upload of so many experts needs, which the first would otherwise do."""
        self._uploads.prepare(threads_for(self._largest, experts))

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
        done = itertools.count(1)

        def one(item: tuple[Key, Tensor]) -> None:
            key, place = item
            check()
            with self._uploads.acquire() as upload:
                upload.send(functools.partial(read, key), place)
            progress(next(done))

        try:
            run_parallel(places, one, threads_for(self._largest, len(places)))
        finally:
            self._uploads.synchronize()


def threads_for(nbytes: int, experts: int) -> int:
    """How many threads upload so many experts of so many bytes."""
    cores = len(os.sched_getaffinity(0))
    locked = MOST_LOCKED_BYTES // (2 * max(1, nbytes))
    return max(1, min(MOST_THREADS, cores, locked, experts))
