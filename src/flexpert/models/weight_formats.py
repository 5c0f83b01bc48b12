"""How a quantized weight lies in the files, and what it stands for: a class for each layout.

A layout is known by its parts: the codes, their scales, and what else goes with them, each a tensor
of its own. Everything is told from the headers; `dequantize` gets the tensors, or one row of each
(an expert's).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final, Literal

import torch
from torch import Tensor

from flexpert.models.packed_codes import fp4_values, unpack_awq, unpack_bits
from flexpert.models.tensor_header import TensorEntry

PartName = Literal["codes", "scale", "zero", "global_scale", "order", "shape", "smoothing"]
"""codes: the elements, quantized. scale: what they are multiplied by. zero: the code that stands
for 0. global_scale: of the scales. order: the group of each column (g_idx). shape: of the weight.
smoothing: what its columns are multiplied by (AWQ's pre_quant_scale)."""

Grid = tuple[int | None, int | None]
"""(rows, columns) that share a scale; None: all of them."""

PER_TENSOR: Final[Grid] = (None, None)
PER_CHANNEL: Final[Grid] = (1, None)

_FLOATS: Final = frozenset({"F32", "BF16", "F16"})
_SCALES: Final = _FLOATS | {"F8_E8M0", "U8"}
_INTEGERS: Final = frozenset({"I32", "I64"})


@dataclass(frozen=True, slots=True)
class Part:
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
class WeightFormat(ABC):
    """A layout. `grid`: what shares a scale, in the weight as the model has it."""

    grid: Grid

    @property
    @abstractmethod
    def parts(self) -> dict[PartName, Part]:
        """By what they are; "codes" is the one that it is known by."""

    @abstractmethod
    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        """Of the weight that it stands for.

        Raises: ValueError: the parts do not fit each other; says which and how.
        """

    @abstractmethod
    def dequantize(
        self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """[..., out, in] float32 (of `MxBlocks` [..., in, out]); shape: of the whole weight."""

    def _check_scales(
        self, parts: Mapping[PartName, TensorEntry], weight: tuple[int, ...], turned: bool = False
    ) -> None:
        """Raises: ValueError. turned: the scales are [..., in, out]."""
        if len(weight) < 2:
            raise ValueError(f"the codes have the shape {weight}, a weight has two dimensions")
        desired = _grid_shape(weight, self.grid)
        if turned:
            desired = (*desired[:-2], desired[-1], desired[-2])
        found = parts["scale"].shape
        if not _same(found, desired) and not (self.grid == PER_TENSOR and prod(found) == 1):
            rows, columns = (size or "all" for size in self.grid)
            raise ValueError(
                f"the scales have shape {found}, blocks of {rows} x {columns} need {desired}"
            )


@dataclass(frozen=True)
class ScaledElements(WeightFormat):
    """An element is a number of 8 bits, fp8 or an integer, times its scale.

    dtype: of the elements, as safetensors calls it. scale_name: of the part.
    smoothed: columns may have a factor of their own.
    """

    dtype: str
    scale_name: str
    smoothed: bool = False

    @property
    def parts(self) -> dict[PartName, Part]:
        parts: dict[PartName, Part] = {
            "codes": Part("{}", frozenset({self.dtype})),
            "scale": Part(self.scale_name, _SCALES),
        }
        if self.dtype == "I8":
            parts["zero"] = Part("{}_zero_point", frozenset({"I8"}), optional=True)
        if self.smoothed:
            parts["smoothing"] = Part("pre_quant_scale", _FLOATS, optional=True)
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        shape = parts["codes"].shape
        self._check_scales(parts, shape)
        if "zero" in parts:
            _check_zeros(parts["zero"].shape, _grid_shape(shape, self.grid))
        _check_smoothing(parts, shape)
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes = parts["codes"].float()
        zeros = parts.get("zero")
        if zeros is not None:
            _shifted(codes, zeros.float(), self.grid)
        return _smoothed(_scaled(codes, factors_of(parts["scale"]), self.grid), parts)


@dataclass(frozen=True)
class PackedIntegers(WeightFormat):
    """compressed-tensors' pack-quantized: codes packed into words along a row, from 0 on.

    bits: of a code. symmetric: the middle code stands for 0 everywhere.
    """

    bits: int
    symmetric: bool = True

    @property
    def parts(self) -> dict[PartName, Part]:
        parts: dict[PartName, Part] = {
            "codes": Part("{}_packed", frozenset({"I32"})),
            "scale": Part("{}_scale", _FLOATS),
            "shape": Part("{}_shape", _INTEGERS),
            "order": Part("{}_g_idx", _INTEGERS, optional=True),
        }
        if not self.symmetric:
            parts["zero"] = Part("{}_zero_point", frozenset({"I32", "I8"}))
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        """With the columns that the words have room for; `weight_shape` may say a few less."""
        *before, words = parts["codes"].shape
        shape = (*before, words * 32 // self.bits)
        group = self.grid[1]
        groups = parts["scale"].shape[-1] if parts["scale"].shape else 1
        if group is not None and -(-groups * group * self.bits // 32) == words:
            shape = (*before, groups * group)
        self._check_scales(parts, shape)
        _check_order(parts, shape[-1])
        if "zero" in parts:
            rows, columns = _grid_shape(shape, self.grid)[-2:]
            if parts["zero"].dtype == "I32":
                rows = -(-rows * self.bits // 32)
            _check_zeros(parts["zero"].shape, (*shape[:-2], rows, columns))
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        *_, rows, columns = parts["shape"].flatten().tolist() if "shape" in parts else shape
        words = parts["codes"]
        if words.shape[-2] != rows or not 0 < columns <= shape[-1]:
            raise ValueError(
                f"weight_shape says {rows} x {columns}, its codes are for {rows} x {shape[-1]}"
            )
        codes = unpack_bits(words, self.bits, columns).float()
        zeros = self._zeros(parts, (*codes.shape[:-2], rows, columns))
        order = parts.get("order")
        if order is None or bool((order < 0).any()):  # allocated, and never filled
            shifted = codes.sub_(zeros) if isinstance(zeros, int) else _shifted(codes, zeros, self.grid)
            return _scaled(shifted, factors_of(parts["scale"]), self.grid)
        groups, factors = order.flatten().long(), factors_of(parts["scale"])
        _check_groups(groups, factors.shape[-1])
        codes.sub_(zeros if isinstance(zeros, int) else zeros[..., groups])
        return codes.mul_(factors[..., groups])

    def _zeros(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor | int:
        """[..., rows, groups] float32, as unsigned codes."""
        middle = 1 << (self.bits - 1)
        zeros = parts.get("zero")
        if zeros is None:
            return middle
        if zeros.dtype == torch.int8:
            return zeros.float().add_(middle)
        rows = _grid_shape(shape, self.grid)[-2]
        return unpack_bits(zeros.mT, self.bits, rows).mT.float()


@dataclass(frozen=True)
class Fp4Groups(WeightFormat):
    """Two codes of e2m1 in a byte, scales along a row: NVFP4 and MXFP4 of a linear layer.

    codes_name, global_name: of the parts; no global scale in MXFP4. divided: by the global scale
    (compressed-tensors), else multiplied (ModelOpt). smoothed: see `ScaledElements`.
    """

    codes_name: str = "{}_packed"
    global_name: str | None = None
    divided: bool = False
    smoothed: bool = False

    @property
    def parts(self) -> dict[PartName, Part]:
        parts: dict[PartName, Part] = {"codes": Part(self.codes_name, frozenset({"U8"}))}
        if self.global_name is None:
            parts["scale"] = Part("{}_scale", frozenset({"U8", "F8_E8M0"}))
        else:
            parts["scale"] = Part("{}_scale", frozenset({"F8_E4M3"}))
            parts["global_scale"] = Part(self.global_name, frozenset({"F32"}))
        if self.smoothed:
            parts["smoothing"] = Part("pre_quant_scale", _FLOATS, optional=True)
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        *before, octets = parts["codes"].shape or (0,)
        shape = (*before, 2 * octets)
        self._check_scales(parts, shape)
        if "global_scale" in parts:
            found = parts["global_scale"].shape
            if prod(found) not in {1, prod(shape[:-2])}:
                raise ValueError(f"the global scale has shape {found}, a weight has one number")
        _check_smoothing(parts, shape)
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        factors = factors_of(parts["scale"])
        if "global_scale" in parts:
            whole = parts["global_scale"].float()
            whole = whole.reshape(()) if whole.numel() == 1 else whole.reshape(-1, 1, 1)
            factors = factors / whole if self.divided else factors * whole
        return _smoothed(_scaled(fp4_values(parts["codes"]), factors, self.grid), parts)


@dataclass(frozen=True)
class MxBlocks(WeightFormat):
    """MXFP4 as GPT-OSS has it: blocks [experts, out, in / 32, 16] and scales [experts, out, in /
    32], of a parameter that is [experts, in, out]."""

    @property
    def parts(self) -> dict[PartName, Part]:
        return {
            "codes": Part("{}_blocks", frozenset({"U8"})),
            "scale": Part("{}_scales", frozenset({"U8", "F8_E8M0"})),
        }

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found, scales = parts["codes"].shape, parts["scale"].shape
        if len(found) < 3 or 2 * found[-1] != self.grid[1] or found[:-1] != scales:
            raise ValueError(
                f"the blocks have shape {found} and the scales {scales}, blocks of "
                f"{self.grid[1]} elements have [experts, out, blocks, 16] and one scale each"
            )
        *before, out, blocks, octets = found
        return (*before, 2 * blocks * octets, out)

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        values = fp4_values(parts["codes"]).mul_(factors_of(parts["scale"]).unsqueeze(-1))
        return values.flatten(-2).mT


@dataclass(frozen=True)
class GptqCodes(WeightFormat):
    """GPTQ: codes packed along the inputs, [in * bits / 32, out], each column with its group.

    bits: 2, 3, 4 or 8. minus_one: zero points are stored less one (format "gptq", not "gptq_v2").
    """

    bits: int
    minus_one: bool

    @property
    def parts(self) -> dict[PartName, Part]:
        return {
            "codes": Part("q{}", frozenset({"I32"})),
            "scale": Part("scales", _FLOATS),
            "zero": Part("qzeros", frozenset({"I32"})),
            "order": Part("g_idx", _INTEGERS, optional=True),
        }

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found = parts["codes"].shape
        if len(found) != 2:
            raise ValueError(f"the codes have shape {found}, not [in * {self.bits} / 32, out]")
        shape = (found[1], found[0] * 32 // self.bits)
        self._check_scales(parts, shape, turned=True)
        groups = _grid_shape(shape, self.grid)[-1]
        _check_zeros(parts["zero"].shape, (groups, -(-shape[0] * self.bits // 32)))
        _check_order(parts, shape[1])
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        rows, columns = shape
        codes = unpack_bits(parts["codes"].mT, self.bits, columns).float()
        words = parts["zero"]
        if self.minus_one and 8 % self.bits == 0:
            # as they were subtracted: from a whole word, so that a zero borrows from its neighbour
            words = words + _ones(self.bits)
        zeros = unpack_bits(words, self.bits, rows)
        if self.minus_one and 8 % self.bits:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        zeros, factors = zeros.mT.float(), factors_of(parts["scale"]).mT
        if "order" not in parts:
            return _scaled(_shifted(codes, zeros, self.grid), factors, self.grid)
        groups = parts["order"].long()
        _check_groups(groups, factors.shape[1])
        return (codes - zeros[:, groups]).mul_(factors[:, groups])


@dataclass(frozen=True)
class AwqCodes(WeightFormat):
    """AutoAWQ's GEMM: codes of 4 bits packed along the outputs, [in, out / 8], in an order of its
    own."""

    @property
    def parts(self) -> dict[PartName, Part]:
        return {
            "codes": Part("q{}", frozenset({"I32"})),
            "scale": Part("scales", _FLOATS),
            "zero": Part("qzeros", frozenset({"I32"})),
        }

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found = parts["codes"].shape
        if len(found) != 2:
            raise ValueError(f"the codes have shape {found}, not [in, out / 8]")
        shape = (8 * found[1], found[0])
        self._check_scales(parts, shape, turned=True)
        _check_zeros(parts["zero"].shape, (_grid_shape(shape, self.grid)[-1], found[1]))
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes = unpack_awq(parts["codes"]).mT.contiguous().float()
        zeros = unpack_awq(parts["zero"]).mT.float()
        return _scaled(_shifted(codes, zeros, self.grid), factors_of(parts["scale"]).mT, self.grid)


def factors_of(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents, e8m0."""
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def _grid_shape(weight: tuple[int, ...], grid: Grid) -> tuple[int, ...]:
    """[..., scales in a column, scales in a row]."""
    parts = (
        1 if size is None else -(-length // size)
        for length, size in zip(weight[-2:], grid, strict=True)
    )
    return (*weight[:-2], *parts)


def _scaled(values: Tensor, factors: Tensor, grid: Grid) -> Tensor:
    """[..., out, in] float32, changed in place: times the factor of each block of the grid."""
    return _blockwise(values, factors, grid, Tensor.mul_)


def _shifted(values: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """[..., out, in] float32, changed in place: less the zero point of each block of the grid."""
    return _blockwise(values, zeros, grid, Tensor.sub_)


def _blockwise(
    values: Tensor, blocks: Tensor, grid: Grid, operation: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The operation with what each block of the grid has, in any shape of so many elements."""
    if blocks.numel() == 1:
        return operation(values, blocks.reshape(()))
    (rows, columns), (height, width) = values.shape[-2:], grid
    blocks = blocks.reshape(_grid_shape(tuple(values.shape), grid))
    if height not in {None, 1}:
        blocks = blocks.repeat_interleave(height, -2)[..., :rows, :]
    if width is None:
        return operation(values, blocks)
    if columns % width:
        return operation(values, blocks.repeat_interleave(width, -1)[..., :columns])
    operation(values.unflatten(-1, (-1, width)), blocks.unsqueeze(-1))
    return values


def _smoothed(weight: Tensor, parts: Mapping[PartName, Tensor]) -> Tensor:
    factors = parts.get("smoothing")
    return weight if factors is None else weight.mul_(factors.float())


def _same(found: tuple[int, ...], desired: tuple[int, ...]) -> bool:
    """Dimensions of 1 are left out or kept as a tool likes."""
    return [n for n in found if n != 1] == [n for n in desired if n != 1]


def _check_zeros(found: tuple[int, ...], desired: tuple[int, ...]) -> None:
    if not _same(found, desired):
        raise ValueError(f"the zero points have shape {found}, its scales need {desired}")


def _check_order(parts: Mapping[PartName, TensorEntry], columns: int) -> None:
    if "order" in parts and prod(parts["order"].shape) != columns:
        raise ValueError(f"g_idx has shape {parts['order'].shape}, the weight {columns} columns")


def _check_groups(groups: Tensor, count: int) -> None:
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ValueError(f"g_idx names groups that are not among its {count}")


def _check_smoothing(parts: Mapping[PartName, TensorEntry], shape: tuple[int, ...]) -> None:
    if "smoothing" in parts and parts["smoothing"].shape != shape[-1:]:
        raise ValueError(
            f"pre_quant_scale has shape {parts['smoothing'].shape}, the weight {shape[-1]} columns"
        )


def _ones(bits: int) -> int:
    """A word with 1 in each of its codes."""
    return sum(1 << shift for shift in range(0, 32, bits))
