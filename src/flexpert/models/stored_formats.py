"""How a quantized weight lies in the files, and what it stands for: a class for each layout.

A layout is known by its parts: the codes, their scales, and what else goes with them, each a tensor
of its own. Everything is told from the headers; `dequantize` gets the tensors, or one row of each
(an expert's).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

from torch import Tensor

from flexpert.models.packed_codes import fp8_values
from flexpert.models.scale_grid import (
    PER_CHANNEL,
    PER_TENSOR,
    Grid,
    factors_of,
    grid_shape,
    same_shape,
    scaled,
    shifted,
)
from flexpert.models.tensor_header import TensorEntry

PartName = Literal["codes", "scale", "zero", "global_scale", "order", "shape", "smoothing"]
"""codes: the elements, quantized. scale: what they are multiplied by. zero: the code that stands
for 0. global_scale: of the scales. order: the group of each column (g_idx). shape: of the weight.
smoothing: what its columns are multiplied by (AWQ's pre_quant_scale)."""

FLOATS: Final = frozenset({"F32", "BF16", "F16"})
SCALES: Final = FLOATS | {"F8_E8M0", "U8"}
INTEGERS: Final = frozenset({"I32", "I64"})


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A tensor of a quantized weight.

    name: of it in the files, where "{}" stands for the last part of the weight's own name.
    dtypes: as safetensors calls them.
    """

    name: str
    dtypes: frozenset[str]
    optional: bool = False

    def key(self, weight: str) -> str:
        """In the files; weight: the key that the weight would have unquantized."""
        path, dot, last = weight.rpartition(".")
        return path + dot + self.name.format(last)

    def weight(self, key: str) -> str | None:
        """The reverse of `key`; None: it is no such part."""
        path, dot, last = key.rpartition(".")
        if "{}" not in self.name:
            return f"{path}{dot}weight" if last == self.name else None
        before, after = self.name.split("{}")
        name = last.removeprefix(before).removesuffix(after)
        return path + dot + name if name and self.name.format(name) == last else None


@dataclass(frozen=True)
class StoredFormat(ABC):
    """A layout. `grid`: what shares a scale, in the weight as the model has it."""

    grid: Grid

    @property
    def described(self) -> str:
        """For people: what the codes are, and what shares a scale."""
        rows, columns = self.grid
        if self.grid == PER_TENSOR:
            return f"{self.elements}, a scale for each tensor"
        if self.grid == PER_CHANNEL:
            return f"{self.elements}, a scale for each row"
        if rows == 1:
            return f"{self.elements}, a scale for {columns} in a row"
        return f"{self.elements}, a scale for {rows} x {columns}"

    @property
    @abstractmethod
    def elements(self) -> str:
        """What the codes are, in a word."""

    @property
    @abstractmethod
    def parts(self) -> dict[PartName, WeightPart]:
        """By what they are; "codes" is the one that it is known by."""

    @abstractmethod
    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        """Of the weight that it stands for.

        Raises: ValueError: the parts do not fit each other; says which and how.
        """

    @abstractmethod
    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The weight in float32, or what the row of each part gives; shape: of the whole."""

    def check_scales(
        self, parts: Mapping[PartName, TensorEntry], weight: tuple[int, ...], turned: bool = False
    ) -> None:
        """Raises: ValueError. turned: the scales are [..., in, out]."""
        if len(weight) < 2:
            raise ValueError(f"the codes have the shape {weight}, a weight has two dimensions")
        desired = grid_shape(weight, self.grid)
        if turned:
            desired = (*desired[:-2], desired[-1], desired[-2])
        found = parts["scale"].shape
        if not same_shape(found, desired) and not (self.grid == PER_TENSOR and prod(found) == 1):
            rows, columns = (size or "all" for size in self.grid)
            raise ValueError(
                f"the scales have shape {found}, blocks of {rows} x {columns} need {desired}"
            )


@dataclass(frozen=True)
class ScaledElements(StoredFormat):
    """An element is a number of 8 bits, fp8 or an integer, times its scale.

    dtype: of the elements, as safetensors calls it. scale_name: of the part.
    symmetric: integers need no zero points. smoothed: columns may have a factor of their own.
    """

    dtype: str
    scale_name: str
    symmetric: bool = True
    smoothed: bool = False

    @property
    def elements(self) -> str:
        return "int8" if self.dtype == "I8" else "fp8"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        parts: dict[PartName, WeightPart] = {
            "codes": WeightPart("{}", frozenset({self.dtype})),
            "scale": WeightPart(self.scale_name, SCALES),
        }
        if self.dtype == "I8":
            parts["zero"] = WeightPart("{}_zero_point", frozenset({"I8"}), self.symmetric)
        if self.smoothed:
            parts["smoothing"] = WeightPart("pre_quant_scale", FLOATS, optional=True)
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        shape = parts["codes"].shape
        self.check_scales(parts, shape)
        if "zero" in parts:
            check_zeros(parts["zero"].shape, grid_shape(shape, self.grid))
        check_smoothing(parts, shape)
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        stored = parts["codes"]
        codes = stored.float() if self.dtype == "I8" else fp8_values(stored)
        zeros = parts.get("zero")
        if zeros is not None:
            shifted(codes, zeros.float(), self.grid)
        return with_smoothing(scaled(codes, factors_of(parts["scale"]), self.grid), parts)


def with_smoothing(weight: Tensor, parts: Mapping[PartName, Tensor]) -> Tensor:
    """Changed in place: columns times their own factors, where they have these."""
    factors = parts.get("smoothing")
    return weight if factors is None else weight.mul_(factors.float())


def check_zeros(found: tuple[int, ...], desired: tuple[int, ...]) -> None:
    if not same_shape(found, desired):
        raise ValueError(f"the zero points have shape {found}, its scales need {desired}")


def check_order(parts: Mapping[PartName, TensorEntry], columns: int) -> None:
    if "order" in parts and prod(parts["order"].shape) != columns:
        raise ValueError(f"g_idx has shape {parts['order'].shape}, the weight {columns} columns")


def check_groups(groups: Tensor, count: int) -> None:
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(f"g_idx names groups that are not among its {count}")


def check_smoothing(parts: Mapping[PartName, TensorEntry], shape: tuple[int, ...]) -> None:
    if "smoothing" in parts and parts["smoothing"].shape != shape[-1:]:
        raise ValueError(
            f"pre_quant_scale has shape {parts['smoothing'].shape}, the weight {shape[-1]} columns"
        )
