"""Codes of quantized weights unpacked from the words and bytes that hold several of them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FP4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes of e2m1 stand for; code + 8 is the negative (OCP Microscaling Formats, v1.0)."""


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Code after code from the lowest bit of the first word on, also over the edge of a word.

    Args:
        words: [..., n] int32.
        bits: of a code, 1 to 8.
        count: of codes in a row; at most 32 * n / bits.

    Returns:
        [..., count] uint8.
    """
    octets = words.contiguous().view(torch.uint8)  # little-endian, as safetensors
    if bits == 8:
        return octets[..., :count]
    if 8 % bits == 0:
        mask = (1 << bits) - 1
        codes = torch.stack([(octets >> shift) & mask for shift in range(0, 8, bits)], -1)
        return codes.flatten(-2)[..., :count]
    first = torch.arange(count, dtype=torch.int64, device=words.device) * bits
    wide = torch.nn.functional.pad(octets, (0, 1)).to(torch.int32)
    low, high = wide[..., first // 8], wide[..., first // 8 + 1]
    codes = ((low | high << 8) >> (first % 8).to(torch.int32)) & ((1 << bits) - 1)
    return codes.to(torch.uint8)


def unpack_awq(words: Tensor) -> Tensor:
    """Codes of 4 bits in the order of AutoAWQ's GEMM: a word has the even columns of eight in its
    lower half, the odd ones in its upper half.

    words: [rows, n] int32. Returns: [8 * n, rows] uint8.
    """
    rows, count = words.shape
    octets = words.contiguous().view(torch.uint8).view(rows, count, 2, 2)  # half, byte
    codes = torch.stack([octets & 15, octets >> 4], -1)
    return codes.permute(1, 3, 4, 2, 0).reshape(8 * count, rows)


def fp4_values(octets: Tensor) -> Tensor:
    """[..., n] uint8, the first of two codes in the low nibble → [..., 2 * n] float32."""
    values = [*FP4_VALUES, *(-value for value in FP4_VALUES)]
    return _looked_up(octets, _pairs("e2m1", values, octets.device)).flatten(-2)


def fp8_values(codes: Tensor) -> Tensor:
    """[...] float8 → the same in float32, in half the time that torch takes."""
    if codes.numel() % 2 or not codes.is_contiguous():
        return codes.float()
    every = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype)
    pairs = codes.view(-1).view(torch.uint16)
    return _looked_up(pairs, _pairs(str(codes.dtype), every.tolist(), codes.device)).view(
        codes.shape
    )


def _looked_up(indices: Tensor, table: Tensor) -> Tensor:
    """[..., 2] float32: the pair of each index."""
    found = table.index_select(0, indices.reshape(-1).to(torch.int32))
    return found.view(torch.float32).view(*indices.shape, 2)


_TABLES: Final[dict[tuple[str, torch.device], Tensor]] = {}


def _pairs(name: str, values: list[float], device: torch.device) -> Tensor:
    """[n * n] int64, each the bits of two float32: two codes are looked up at once, as one number,
    which takes a fifth of the time of a lookup of rows or of single values."""
    table = _TABLES.get((name, device))
    if table is None:
        each = torch.tensor(values, dtype=torch.float32, device=device)
        first, second = each.repeat(len(values)), each.repeat_interleave(len(values))
        pairs = torch.stack([first, second], -1)  # the first code is in the low half
        table = _TABLES[name, device] = pairs.view(torch.int64).squeeze(-1)
    return table
