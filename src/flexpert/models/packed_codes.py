"""Codes of quantized weights unpacked from the words and bytes that hold several of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

FP4_VALUES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes of e2m1 stand for; code + 8 is the negative (OCP Microscaling Formats, v1.0)."""

_AWQ_NIBBLES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble of a word, lowest first, that has its first, second, … column (AutoAWQ's GEMM)."""


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
    """[..., n] int32 → [..., 8 * n] uint8: codes of 4 bits in the order of AutoAWQ's GEMM."""
    codes = unpack_bits(words, 4, 8 * words.shape[-1])
    return codes.reshape(*words.shape, 8)[..., _AWQ_NIBBLES].flatten(-2)


def fp4_values(octets: Tensor) -> Tensor:
    """[..., n] uint8, the first of two codes in the low nibble → [..., 2 * n] float32."""
    # both values of a byte at once: a gather of pairs takes half as long as two of values
    return _pairs_of_fp4(octets.device)[octets.to(torch.int32)].flatten(-2)


@lru_cache
def _pairs_of_fp4(device: torch.device) -> Tensor:
    """[256, 2] float32: what a byte stands for."""
    values = [*FP4_VALUES, *(-value for value in FP4_VALUES)]
    pairs = [[values[octet % 16], values[octet // 16]] for octet in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)
