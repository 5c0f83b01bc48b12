"""Weights in int4, each group of a row with a scale and a zero point: w4a16 as it is published.

A word of 32 bits has eight codes, the first in its lowest bits. An element is (code - zero) *
scale. A group's scale is a word, too: a float32 whose lowest eight bits are the zero point, which
takes nothing from scales of 16 bits.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DTYPE: Final = torch.int32
CODES: Final = 8  # in a word
MIDDLE: Final = 8  # the zero point of what is symmetric
STEP: Final = 32
"""Groups are of a multiple of so many columns."""
_ZERO: Final = 255
_LARGEST: Final = 7.0


def scales_of(rows: int, columns: int, group: int) -> tuple[int, int]:
    """The shape of the scales. Raises: ValueError: rows are not made of whole groups."""
    if columns % group:
        raise ValueError(
            f"int4 has a scale for each {group} columns, and a matrix has {columns}: choose "
            "another --quantization, or none"
        )
    return rows, columns // group


def pack_codes(codes: Tensor) -> Tensor:
    """[..., in] uint8, each below 16 → [..., in / 8] int32."""
    octets = codes[..., ::2] | (codes[..., 1::2] << 4)
    return octets.contiguous().view(DTYPE)


def pack_scales(scales: Tensor, zeros: Tensor | int) -> Tensor:
    """[..., groups] of scales of 16 bits in float32, and zero points → [..., groups] int32.

    Raises: ValueError: a scale is not finite or has more bits, or a zero point is beyond 0 to 255.
    """
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("a scale is infinite or no number")
    words = scales.float().contiguous().view(DTYPE)
    points = torch.as_tensor(zeros, dtype=torch.int32, device=scales.device).expand(words.shape)
    if bool(((words & _ZERO) != 0).any()) or bool(((points < 0) | (points > _ZERO)).any()):
        raise ValueError("a scale has more than 16 bits, or a zero point more than 8")
    return words | points


def quantize(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scale each group so that its largest element becomes 7 or -7.

    Args:
        weight: [out, in] of any float dtype, finite.

    Returns:
        ([out, in / 8] int32, [out, in / group] int32).

    Raises: ValueError: rows are not made of whole groups.
    """
    out, columns = weight.shape
    rows, groups = scales_of(out, columns, group)
    whole = weight.float().reshape(rows, groups, group)
    scales = (whole.abs().amax(-1).clamp(min=1e-30) / _LARGEST).bfloat16().float()
    codes = (whole / scales.unsqueeze(-1)).round().clamp(-MIDDLE, MIDDLE - 1) + MIDDLE
    return pack_codes(codes.to(torch.uint8).view(weight.shape)), pack_scales(scales, MIDDLE)


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What codes and scales are.

    Args:
        weight: [..., out, in / 8] int32.
        scales: [..., out, groups] int32.

    Returns:
        [..., out, in] float32.
    """
    octets = weight.contiguous().view(torch.uint8)
    codes = torch.stack([octets & 15, octets >> 4], -1).view(*scales.shape, -1)
    factors = (scales & ~_ZERO).view(torch.float32)
    moved = codes.float() - (scales & _ZERO).unsqueeze(-1)
    return (moved * factors.unsqueeze(-1)).view(*weight.shape[:-1], weight.shape[-1] * CODES)
