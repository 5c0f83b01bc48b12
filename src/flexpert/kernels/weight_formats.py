"""The formats in which weights are smaller than their dtype, by name: how each lies in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Final, Literal

import torch
from torch import Tensor

from flexpert.kernels import block_fp8, group_int4, mxfp4, row_int8

FormatName = Literal["fp8", "mxfp4", "int8", "int4"]

Shape = tuple[int, ...]
ShapeOf = Callable[[int, int], Shape]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A matrix [out, in] as two tensors, weights and scales.

    dtype, scale_dtype: of these as they lie in memory.
    elements: of the matrix in one element of the weights; more than one lie side by side in a row.
    scales_of: (out, in) → the shape of the scales. Raises: ValueError: no such matrix can be.
    restore: (weights, scales) → [..., out, in] float32.
    group: elements of a row that share a scale, of int4.
    """

    name: FormatName
    dtype: torch.dtype
    scale_dtype: torch.dtype
    elements: int
    scales_of: ShapeOf
    restore: Callable[[Tensor, Tensor], Tensor]
    round: Callable[[Tensor], tuple[Tensor, Tensor]]
    group: int = group_int4.STEP

    def weights_of(self, rows: int, columns: int) -> Shape:
        """The shape of the weights of a matrix."""
        return rows, columns // self.elements

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and scales of a matrix [out, in] of any float dtype.

        Raises: ValueError: it is not finite, or its size is none that the format has.
        """
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"weights that are infinite or no numbers cannot be made {self.name}: they would "
                "take others with them"
            )
        return self.round(weight)


FP8: Final = WeightFormat(
    "fp8",
    block_fp8.DTYPE,
    torch.float32,
    1,
    block_fp8.scales_of,
    block_fp8.dequantize,
    block_fp8.quantize,
)
MXFP4: Final = WeightFormat(
    "mxfp4",
    torch.uint8,
    torch.uint8,
    2,
    mxfp4.scales_of,
    mxfp4.dequantize,
    mxfp4.quantize,
)
INT8: Final = WeightFormat(
    "int8",
    row_int8.DTYPE,
    torch.float32,
    1,
    row_int8.scales_of,
    row_int8.dequantize,
    row_int8.quantize,
)


@cache
def int4_of(group: int) -> WeightFormat:
    """int4 with a scale for each so many columns, a multiple of 32."""
    return WeightFormat(
        "int4",
        group_int4.DTYPE,
        group_int4.DTYPE,
        group_int4.CODES,
        partial(group_int4.scales_of, group=group),
        group_int4.dequantize,
        partial(group_int4.quantize, group=group),
        group,
    )


INT4: Final = int4_of(group_int4.STEP)

FORMATS: Final[Mapping[str, WeightFormat]] = {f.name: f for f in (FP8, MXFP4, INT8, INT4)}
"""By name; of int4 the one that weights are quantized to."""


def format_of(weight: Tensor, scales: Tensor | None = None) -> WeightFormat | None:
    """That of weights as they lie in memory; None: they are what they are. scales: tell int4's
    groups."""
    if weight.dtype == group_int4.DTYPE and scales is not None and scales.ndim and scales.numel():
        return int4_of(weight.shape[-1] * group_int4.CODES // scales.shape[-1])
    return next((f for f in FORMATS.values() if f.dtype == weight.dtype), None)
