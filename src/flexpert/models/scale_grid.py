"""What the elements of a weight share: scales and zero points of its blocks of rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

Grid = tuple[int | None, int | None]
"""(rows, columns) that share a scale; None: all of them."""

PER_TENSOR: Final[Grid] = (None, None)
PER_CHANNEL: Final[Grid] = (1, None)


def factors_of(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents, e8m0."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def same_shape(found: tuple[int, ...], desired: tuple[int, ...]) -> bool:
    """Dimensions of 1 are left out or kept as a tool likes."""
    return [n for n in found if n != 1] == [n for n in desired if n != 1]


def grid_shape(weight: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    """[..., scales in a column, scales in a row]."""
    parts = (
        1 if size is None else -(-length // size)
        for length, size in zip(weight[-2:], grid, strict=True)
    )
    return (*weight[:-2], *parts)


def scaled(values: Tensor, factors: Tensor, grid: Grid) -> Tensor:
    """[..., out, in] float32, changed in place: times the factor of each block of the grid."""
    return _blockwise(values, factors, grid, Tensor.mul_)


def shifted(values: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """[..., out, in] float32, changed in place: less the zero point of each block of the grid."""
    return _blockwise(values, zeros, grid, Tensor.sub_)


def _blockwise(
    values: Tensor, blocks: Tensor, grid: Grid, operation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The operation with what each block of the grid has, in any shape of so many elements."""
    if blocks.numel() == 1:
        return operation(values, blocks.reshape(()))
    (rows, columns), (height, width) = values.shape[-2:], grid
    blocks = blocks.reshape(grid_shape(tuple(values.shape), grid))
    if height is not None and height > 1:
        blocks = blocks.repeat_interleave(height, -2)[..., :rows, :]
    if width is None:
        return operation(values, blocks)
    if columns % width:
        return operation(values, blocks.repeat_interleave(width, -1)[..., :columns])
    groups = values.view(*values.shape[:-1], columns // width, width)
    operation(groups, blocks.unsqueeze(-1))
    return values
