"""Sizes of a step by which kernels are chosen: few, since each is compiled and met once (pure)."""

from __future__ import annotations

from typing import Final

FEW_TOKENS: Final = 2
"""Of a step in which a decoder layer is computed by a few kernels (`cuda.few_tokens`). Of four they
take as long as all others, on an H200."""
SOME_TOKENS: Final = 128
"""Of a step in which it is computed by those of `cuda.some_tokens`, at most."""
FEW: Final = 64
MANY: Final = 512
"""Sequences of a step with prompts up to which each of two kernels of attention goes."""


def graph_size(rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … that holds `rows`: steps are captured in
    these sizes."""
    if rows <= 8:
        return 1 << max(rows - 1, 0).bit_length()
    unit = max(8, 1 << (rows - 1).bit_length() - 2)
    return -(-rows // unit) * unit


def lanes(sequences: int) -> int:
    """How many lanes look for the sequence of a row; a power of two."""
    if sequences <= FEW:
        return FEW
    return int(max(MANY, 1 << (sequences - 1).bit_length()))
