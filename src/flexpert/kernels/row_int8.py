"""Weights in int8, each row of the matrix with a scale in float32."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DTYPE: Final = torch.int8
LARGEST: Final = 127.0


def scales_of(rows: int, columns: int) -> tuple[int]:
    """The shape of the scales of a weight."""
    return (rows,)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each row so that its largest element becomes 127 or -127.

    Args:
        weight: [out, in] of any float dtype, finite.

    Returns:
        ([out, in] int8, [out] float32).
    """
    whole = weight.float()
    scales = whole.abs().amax(1).clamp(min=1e-30) / LARGEST
    return (whole / scales.unsqueeze(1)).round().to(DTYPE).contiguous(), scales


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` gave, in float32.

    Args:
        weight: [..., out, in] int8.
        scales: [..., out] of any float dtype.

    Returns:
        [..., out, in] float32.
    """
    return weight.float() * scales.float().unsqueeze(-1)
