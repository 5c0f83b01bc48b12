"""fp8 on the wire: e4m3fn with one scale for 128 channels of a token.

With amax = max |x| of the block, at least 1e-4, over what is finite:

    "float32"   scale = amax / 448, float32; q = e4m3(x · (448 / amax))
    "power2"    scale = amax / 448 rounded up to a power of two, float32; q = e4m3(x / scale)
    "ue8m0"     the same; the scale is stored as its biased exponent, one byte, four in an int32

e4m3() rounds to nearest even and saturates at ±448; x ≈ q · scale. NaN and infinities become NaN:
e4m3fn has no infinity, and one such channel does not spoil the scale of its block.

These functions are the reference; the host backend does the same, bit for bit, in quant.c.
"""

from __future__ import annotations

import torch

from flexpert.comm.buffer import Scales

BLOCK = 128
LARGEST = 448.0
SMALLEST_AMAX = 1e-4
PACKED = 4  # exponents in an int32


def check(hidden: int, scales: Scales) -> None:
    """Raises: ValueError: no such scales, or `hidden` has no whole blocks."""
    if scales not in ("float32", "power2", "ue8m0"):
        raise ValueError(f"fp8 scales are {scales!r}, must be 'float32', 'power2' or 'ue8m0'")
    unit = BLOCK * (PACKED if scales == "ue8m0" else 1)
    if hidden % unit:
        raise ValueError(
            f"fp8 with {scales} scales needs a hidden size that is a multiple of {unit}, "
            f"not {hidden}; pad it, or send {'float32 scales' if unit > BLOCK else 'rows'} instead"
        )


def row_bytes(hidden: int, scales: Scales) -> int:
    """Bytes of a quantised row: the values, then the scales."""
    return hidden + hidden // BLOCK * (1 if scales == "ue8m0" else 4)


def quantise(x: torch.Tensor, scales: Scales = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise rows.

    Args:
        x: [tokens, hidden] bfloat16, float16 or float32.
        scales: see the module.

    Returns:
        q: [tokens, hidden] float8_e4m3fn.
        scales: [tokens, hidden / 128] float32, or [tokens, hidden / 512] int32 for "ue8m0".

    Raises: ValueError: see `check`.
    """
    tokens, hidden = x.shape
    check(hidden, scales)
    blocks = x.float().view(tokens, hidden // BLOCK, BLOCK)
    finite = torch.where(blocks.isfinite(), blocks, 0.0)
    amax = finite.abs().amax(-1).clamp(min=SMALLEST_AMAX)
    # as a tensor: torch divides a number by way of 1 / amax
    largest = torch.tensor(LARGEST, dtype=torch.float32, device="cpu")
    scale, inverse = amax / largest, largest / amax
    if scales != "float32":
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).int()
        one = torch.ones_like(scale)
        scale, inverse = torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    scaled = torch.where(blocks.isfinite(), blocks * inverse[..., None], blocks - blocks)
    q = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(tokens, hidden)
    if scales != "ue8m0":
        return q, scale
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return q, exponents.view(torch.int32)


def dequantise(q: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q · scale in float32, rounded to dtype: [tokens, hidden].

    Args:
        q: [tokens, hidden] float8_e4m3fn.
        scales: what `quantise` returned with it.
        dtype: bfloat16, float16 or float32.
    """
    tokens, hidden = q.shape
    if scales.dtype is torch.int32:
        exponents = scales.contiguous().view(torch.uint8).to(torch.int32)
        scales = (exponents << 23).view(torch.float32)
    values = q.float().view(tokens, hidden // BLOCK, BLOCK) * scales[..., None]
    return values.view(tokens, hidden).to(dtype)
