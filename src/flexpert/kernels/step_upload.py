"""What the host gives a device for one step: many small arrays in one copy that nobody waits for.

A copy out of memory that is not page-locked waits for all that was launched before. So arrays are
packed into page-locked memory, of which there are two pieces in turn: one is filled while the other
may still be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexpert.kernels.device_stream import DeviceStream

_ALIGNMENT = 16  # bytes
_FIRST = 1 << 16  # bytes of a piece; a larger step lets it grow
_PIECES = 2


class StepUpload:
    """Used by the thread that launches on the stream."""

    def __init__(self, stream: DeviceStream) -> None:
        self._stream = stream
        self._pieces = [stream.host_buffer(_FIRST) for _ in range(_PIECES)]
        self._read = [stream.event() for _ in range(_PIECES)]  # the device has read a piece
        self._next = 0

    def send(self, arrays: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, behind all that was launched so far.

        Args:
            arrays: contiguous, on the host; may be changed afterwards.

        Returns: views of one piece of memory, in the same order.
        """
        begins, end = [], 0
        for array in arrays:
            begins.append(end)
            end = -(-(end + array.nbytes) // _ALIGNMENT) * _ALIGNMENT
        index, self._next = self._next, (self._next + 1) % _PIECES
        self._read[index].synchronize()
        if len(self._pieces[index]) < end:
            self._pieces[index] = self._stream.host_buffer(max(end, 2 * len(self._pieces[index])))
        piece = self._pieces[index]
        for begin, array in zip(begins, arrays, strict=True):
            piece[begin : begin + array.nbytes].view(array.dtype).copy_(array.flatten())
        target = torch.empty(max(end, 1), dtype=torch.uint8, device=self._stream.device)
        target[:end].copy_(piece[:end], non_blocking=True)
        self._read[index].record()
        return [
            target[begin : begin + array.nbytes].view(array.dtype).view(array.shape)
            for begin, array in zip(begins, arrays, strict=True)
        ]
