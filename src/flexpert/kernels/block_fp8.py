"""Weights in fp8, each block of 128 x 128 with a scale, as in DeepSeek-V3's files."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK: Final = 128
DTYPE: Final = torch.float8_e4m3fn
LARGEST: Final = 448.0


def scales_of(rows: int, columns: int) -> tuple[int, int]:
    """The shape of the scales of a weight."""
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each block so that its largest element becomes the largest of fp8.

    Args:
        weight: [out, in] of any float dtype.

    Returns:
        ([out, in] float8_e4m3fn, [ceil(out / 128), ceil(in / 128)] float32).
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK)).contiguous()
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / LARGEST
    scaled = (blocks / scales[:, None, :, None]).to(DTYPE)
    joined = scaled.view(padded.shape)
    return joined[:rows, :columns].contiguous(), scales


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """What `quantize` gave, in float32.

    Args:
        weight: [..., out, in] float8.
        scales: [..., ceil(out / block[0]), ceil(in / block[1])] of any float dtype.

    Returns:
        [..., out, in] float32.
    """
    rows, columns = weight.shape[-2:]
    factors = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * factors[..., :rows, :columns]
