"""Weights in MXFP4: 4 bits each, every 32 of a row with a power of two, as in GPT-OSS' files.

The format is that of the Open Compute Project's "Microscaling Formats (MX) v1.0". An element is
e2m1: a sign, two bits of exponent and one of mantissa. A scale is e8m0: a byte b, 2 ** (b - 127);
255 is not a number. Byte i of a row has element 2 * i in its low half.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 32
BIAS: Final = 127
VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the codes 0 to 7; with 8 more each is negative."""

_LARGEST_EXPONENT: Final = 2  # of an element: 6 is 1.5 * 2 ** 2
_MOST_EXPONENT: Final = 125  # of a scale that makes none of them infinite in float32
# between two values lies the middle; there the even code is taken, as IEEE 754 rounds
_MIDDLES: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def packed_of(rows: int, columns: int) -> tuple[int, int]:
    """The shape of packed weights. Raises: ValueError: rows are not made of whole blocks."""
    _check(columns)
    return rows, columns // 2


def scales_of(rows: int, columns: int) -> tuple[int, int]:
    """The shape of their scales. Raises: ValueError: rows are not made of whole blocks."""
    _check(columns)
    return rows, columns // BLOCK


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each block by the one of two scales that leaves the smaller squared error.

    They are the power of two by which the largest element keeps its exponent (the format's paper),
    where what is above 6 becomes 6, and the next one, where nothing is above.

    Args:
        weight: [out, in] of any float dtype, finite; in is a multiple of 32.

    Returns:
        ([out, in / 2] uint8, [out, in / 32] uint8).

    Raises: ValueError: rows are not made of whole blocks.
    """
    rows, columns = weight.shape
    _check(columns)
    blocks = weight.float().reshape(rows, columns // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1)
    exponent = torch.frexp(largest).exponent.int() - 1 - _LARGEST_EXPONENT
    exponent = torch.where(largest > 0, exponent, torch.zeros_like(exponent))
    codes, errors, biased = [], [], []
    for raised in (0, 1):
        power = (exponent + raised).clamp(-BIAS, _MOST_EXPONENT)
        scaled = torch.ldexp(blocks, -power.unsqueeze(-1))
        code = _rounded(scaled)
        values = _values(code)
        # in units of the lower scale, which is 2 ** raised smaller
        errors.append(((values - scaled) * 2**raised).square().sum(-1))
        codes.append(code)
        biased.append((power + BIAS).to(torch.uint8))
    higher = errors[1] < errors[0]
    code = torch.where(higher.unsqueeze(-1), codes[1], codes[0]).view(rows, columns)
    packed = code[:, ::2] | (code[:, 1::2] << 4)
    return packed.contiguous(), torch.where(higher, biased[1], biased[0])


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """What packed weights are, in float32.

    Args:
        weight: [..., out, in / 2] uint8.
        scales: [..., out, in / 32] uint8.

    Returns:
        [..., out, in] float32. bfloat16 holds the same values, but for the subnormal ones.
    """
    codes = torch.stack([weight & 15, weight >> 4], -1)
    blocks = _values(codes.view(*scales.shape, BLOCK))
    powers = scales.int().unsqueeze(-1)
    restored = torch.ldexp(blocks, powers - BIAS)
    nan = torch.full((), torch.nan, dtype=torch.float32, device=weight.device)
    restored = torch.where(powers == 255, nan, restored)
    return restored.view(*weight.shape[:-1], weight.shape[-1] * 2)


def _rounded(scaled: Tensor) -> Tensor:
    """The codes of float32 values, uint8."""
    size = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for index, middle in enumerate(_MIDDLES):
        code += (size > middle) if index % 2 == 0 else (size >= middle)
    return code | (torch.signbit(scaled).to(torch.uint8) << 3)


def _values(codes: Tensor) -> Tensor:
    every = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float32, device="cpu")
    return every.to(codes.device)[codes.int()]


def _check(columns: int) -> None:
    if columns % BLOCK:
        raise ValueError(
            f"MXFP4 has a scale for each {BLOCK} columns, and a matrix has {columns}: choose "
            "another --quantization, or none"
        )
