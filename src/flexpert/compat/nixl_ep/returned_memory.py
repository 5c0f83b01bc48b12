"""ReturnedMemory for the tensors that dispatch returns, used again and again.

An expert-major tensor has room for the worst case and is mostly empty. Taken anew for each
dispatch it would cost a page fault for every 4 KiB that arrive; so there are two of each, used in
turns, as in nixl_ep: what a dispatch returned is valid until the dispatch after the next.
"""

from __future__ import annotations

import math

import torch

from flexpert.compat.nixl_ep.expert_major_tensors import column_major


class Room:
    """Memory that grows when more is asked for."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """[shape] of dtype, uninitialised; shares its memory with what was taken before."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._bytes.numel():
            self._bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._bytes[:size].view(dtype).view(shape)


class ReturnedMemory:
    """What a rank's calls write into."""

    def __init__(self) -> None:
        self._rows = (Room(), Room())
        self._scales = (Room(), Room())
        self._next = 0
        self.combine = Room()

    def next_dispatch(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        scale_columns: int,
        scale_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """recv_x of this shape and its scales, column-major; None without scales."""
        turn, self._next = self._next, 1 - self._next
        rows = self._rows[turn].take(shape, dtype)
        if not scale_columns:
            return rows, None
        experts, limit, _ = shape
        scales = self._scales[turn].take((experts, scale_columns, limit), scale_dtype)
        return rows, column_major(scales)
