"""Weights that are not finite, found while they are in the processor's cache, and where they are.

One of them makes NaN of every answer that it takes part in, or of a whole block when it is
quantized. torch.isfinite would take longer than the reading (0.6 GB/s, and memory for its masks):
a sum, which is not finite if an element is not, reads as fast as memory gives (20 GB/s from the
page cache's memory, 29 from the processor's cache; Xeon with AVX-512, one thread).
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from flexpert.errors import ModelError

AT_ONCE: Final = 512 * 2**10
"""Bytes that are looked at in one go: they stay in a processor's second cache."""

_SUMMED: Final = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def find_not_finite(tensor: Tensor) -> int | None:
    """The number of the first element, in memory's order, that is infinite or NaN; None: there is
    none. Whole numbers are finite.

    tensor: contiguous, of any shape and dtype, on the host.
    """
    flat = tensor.view(-1)
    step = max(1, AT_ONCE // tensor.element_size())
    for at in range(0, flat.shape[0], step):
        piece = flat[at : at + step]
        if _may_not_be_finite(piece):
            numbers = piece if piece.dtype in _SUMMED else piece.float()
            bad = (~numbers.isfinite()).nonzero()
            if len(bad):
                return at + int(bad[0])
    return None


def check_finite(tensor: Tensor, what: str) -> None:
    """tensor: as `find_not_finite` takes it. what: it is called in the message.

    Raises: ModelError: names the first element that is not finite.
    """
    found = find_not_finite(tensor)
    if found is not None:
        raise not_finite(what, tensor.shape, found, float(tensor.view(-1)[found]))


def not_finite(what: str, shape: tuple[int, ...], number: int, value: float) -> ModelError:
    """number: of the element, in the order of the memory of a tensor of this shape."""
    index: list[int] = []
    for size in reversed(shape):
        number, place = divmod(number, size)
        index.insert(0, place)
    return ModelError(
        f"{what} is not finite: element {index} is {value}; no answer can be computed with it. "
        "Download the checkpoint again, or ask who made it"
    )


def _may_not_be_finite(piece: Tensor) -> bool:
    """Whether it is worth a closer look; false only if all are finite."""
    if piece.dtype in _SUMMED:
        return not math.isfinite(piece.sum(dtype=_sum_dtype(piece.dtype)).item())
    if piece.dtype == torch.float8_e4m3fn:  # has no infinity, and two NaN: 0x7f and 0xff
        largest = piece.view(torch.uint8).max().item(), piece.view(torch.int8).max().item()
        return largest[0] == 0xFF or largest[1] == 0x7F
    return piece.dtype.is_floating_point


def _sum_dtype(dtype: torch.dtype) -> torch.dtype | None:
    return torch.float32 if dtype == torch.float16 else None
