"""Sizes of a step by which kernels are chosen: few, since each is compiled and met once (pure)."""

from __future__ import annotations

from typing import Final

FEW_TOKENS: Final = 4
"""Of a step in which a decoder layer is computed by a few kernels (`cuda.few_tokens`)."""
FEW: Final = 64
MANY: Final = 512
"""Sequences of a step with prompts up to which each of two kernels of attention goes."""


def lanes(sequences: int) -> int:
    """How many lanes look for the sequence of a row; a power of two."""
    if sequences <= FEW:
        return FEW
    return int(max(MANY, 1 << (sequences - 1).bit_length()))
