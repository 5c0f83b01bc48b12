"""Bytes of the host onto a device, by several threads through page-locked memory.

Each upload has two pieces of it: while the device copies one, the other is filled. Taking
page-locked memory costs as long as copying much through it, so pieces are kept.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flexpert.kernels.device_stream import DeviceStream

Fill = Callable[[Tensor], None]
"""Fills [n] uint8 of the host."""


class HostUploads:
    """The ways from host to device of one process; any thread may use one at a time."""

    def __init__(self, stream: DeviceStream, piece: int) -> None:
        """
        Args:
            stream: of the device.
            piece: most bytes that are sent at once.
        """
        self._stream = stream
        self._piece = piece
        self._lock = threading.Lock()
        self._free: list[HostUpload] = []
        self._every: list[HostUpload] = []

    def prepare(self, count: int) -> None:
        """Take the memory for so many ahead."""
        with self._lock:
            while len(self._every) < count:
                self._free.append(self._make())

    @contextlib.contextmanager
    def acquire(self) -> Iterator[HostUpload]:
        """One that no other thread uses meanwhile."""
        with self._lock:
            upload = self._free.pop() if self._free else self._make()
        try:
            yield upload
        finally:
            with self._lock:
                self._free.append(upload)

    def synchronize(self) -> None:
        """Wait until the device has all that was sent."""
        for upload in self._every:
            upload.synchronize()

    @property
    def count(self) -> int:
        """How many have memory."""
        return len(self._every)

    def _make(self) -> HostUpload:
        upload = HostUpload(self._stream, self._piece)
        self._every.append(upload)
        return upload


class HostUpload:
    """Two pieces of page-locked memory, and when the device has read them."""

    def __init__(self, stream: DeviceStream, piece: int) -> None:
        self._stream = stream
        self._piece = piece
        self._pieces = [(stream.host_buffer(piece), stream.event()) for _ in range(2)]

    def send(self, fill: Fill, into: Tensor) -> None:
        """Fill the host's piece and have it copied, on a stream of its own.

        into: [at most a piece] uint8 on the device; there once `synchronize` has returned.
        """
        memory, copied = self._pieces[0]
        self._pieces.reverse()
        with self._stream.aside():
            copied.synchronize()
            piece = memory[: into.shape[0]]
            fill(piece)
            into.copy_(piece, non_blocking=True)
            copied.record()

    def copy(self, tensor: Tensor, into: Tensor) -> None:
        """Send a contiguous tensor of the host. into: of its shape and dtype, on the device."""
        source, target = (t.view(-1).view(torch.uint8) for t in (tensor, into))
        for at in range(0, source.shape[0], self._piece):
            part = source[at : at + self._piece]
            self.send(functools.partial(_copy, part), target[at : at + self._piece])

    def synchronize(self) -> None:
        for _, copied in self._pieces:
            copied.synchronize()


def _copy(tensor: Tensor, into: Tensor) -> None:
    into.copy_(tensor)
