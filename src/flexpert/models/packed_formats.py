"""Layouts whose codes lie several in a word or byte: integers, FP4, GPTQ's and AWQ's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from flexpert.kernels import group_int4
from flexpert.models.packed_codes import fp4_values, unpack_awq, unpack_bits
from flexpert.models.scale_grid import factors_of, grid_shape, scaled, shifted
from flexpert.models.stored_formats import (
    FLOATS,
    INTEGERS,
    PartName,
    StoredFormat,
    WeightPart,
    check_groups,
    check_order,
    check_smoothing,
    check_zeros,
    with_smoothing,
)
from flexpert.models.tensor_header import TensorEntry


class Int4Codes(StoredFormat):
    """A layout that may be of 4 bits, whose codes can stay packed in memory."""

    @abstractmethod
    def four_bits(
        self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        """Codes [..., out, in] uint8, zero points [..., out, groups] and scales, both float32.

        Raises: ValueError: the parts do not fit each other.
        """

    def group_in_memory(self, shape: tuple[int, ...], scales: str) -> int | None:
        """Columns that share a scale, if a weight's codes can stay packed. scales: their dtype."""
        rows, group = self.grid
        if (
            self.elements != "int4"
            or rows != 1
            or group is None
            or group % group_int4.STEP
            or shape[-1] % group
            or scales not in {"F16", "BF16"}
        ):
            return None
        return group

    def in_memory(
        self, part: PartName, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        """Codes or scales as `flexpert.kernels.group_int4` has them.

        Raises: ValueError: the parts do not fit each other, or columns are in no order of groups.
        """
        order = parts.get("order")
        if order is not None and not _is_unused(order) and not _in_order(order, self.grid[1]):
            raise ValueError("the columns of its groups do not lie side by side (g_idx)")
        codes, zeros, factors = self.four_bits(parts, shape)
        if part == "codes":
            return group_int4.pack_codes(codes)
        return group_int4.pack_scales(factors, zeros)


@dataclass(frozen=True)
class PackedIntegers(Int4Codes):
    """compressed-tensors' pack-quantized: codes packed into words along a row, from 0 on.

    bits: of a code. symmetric: the middle code stands for 0 everywhere.
    """

    bits: int
    symmetric: bool = True

    @property
    def elements(self) -> str:
        return f"int{self.bits}"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        parts: dict[PartName, WeightPart] = {
            "codes": WeightPart("{}_packed", frozenset({"I32"})),
            "scale": WeightPart("{}_scale", FLOATS),
            "shape": WeightPart("{}_shape", INTEGERS),
            "order": WeightPart("{}_g_idx", INTEGERS, optional=True),
        }
        if not self.symmetric:
            parts["zero"] = WeightPart("{}_zero_point", frozenset({"I32", "I8"}))
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        """With the columns that the words have room for; `weight_shape` may say a few less."""
        *before, words = parts["codes"].shape
        shape = (*before, words * 32 // self.bits)
        group = self.grid[1]
        groups = parts["scale"].shape[-1] if parts["scale"].shape else 1
        if group is not None and -(-groups * group * self.bits // 32) == words:
            shape = (*before, groups * group)
        self.check_scales(parts, shape)
        check_order(parts, shape[-1])
        if "zero" in parts:
            rows, columns = grid_shape(shape, self.grid)[-2:]
            if parts["zero"].dtype == "I32":
                rows = -(-rows * self.bits // 32)
            check_zeros(parts["zero"].shape, (*shape[:-2], rows, columns))
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        rows, columns = self._size(parts, shape)
        codes = unpack_bits(parts["codes"], self.bits, columns).float()
        zeros = self._zeros(parts, (*codes.shape[:-2], rows, columns))
        order = parts.get("order")
        if order is None or _is_unused(order) or _in_order(order, self.grid[1]):
            moved = (
                codes.sub_(zeros) if isinstance(zeros, int) else shifted(codes, zeros, self.grid)
            )
            return scaled(moved, factors_of(parts["scale"]), self.grid)
        groups, factors = order.flatten().long(), factors_of(parts["scale"])
        check_groups(groups, factors.shape[-1])
        codes.sub_(zeros if isinstance(zeros, int) else zeros[..., groups])
        return codes.mul_(factors[..., groups])

    def four_bits(
        self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | int, Tensor]:
        rows, columns = self._size(parts, shape)
        if columns != shape[-1]:
            raise ValueError(f"weight_shape says {columns} columns, its codes are {shape[-1]}")
        codes = unpack_bits(parts["codes"], self.bits, columns)
        factors = factors_of(parts["scale"])
        return codes, self._zeros(parts, (*codes.shape[:-2], rows, columns)), factors

    def _size(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns. Raises: ValueError: the codes are of others."""
        *_, rows, columns = parts["shape"].flatten().tolist() if "shape" in parts else shape
        if parts["codes"].shape[-2] != rows or not 0 < columns <= shape[-1]:
            raise ValueError(
                f"weight_shape says {rows} x {columns}, its codes are for {rows} x {shape[-1]}"
            )
        return rows, columns

    def _zeros(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor | int:
        """[..., rows, groups] float32, as unsigned codes."""
        middle = 1 << (self.bits - 1)
        zeros = parts.get("zero")
        if zeros is None:
            return middle
        if zeros.dtype == torch.int8:
            return zeros.float().add_(middle)
        rows = grid_shape(shape, self.grid)[-2]
        return unpack_bits(zeros.mT, self.bits, rows).mT.float()


@dataclass(frozen=True)
class Fp4Groups(StoredFormat):
    """Two codes of e2m1 in a byte, scales along a row: NVFP4 and MXFP4 of a linear layer.

    codes_name, scale_name, global_name: of the parts; no global scale in MXFP4. divided: by the
    global scale (compressed-tensors), else multiplied (ModelOpt). turned: codes and scales lie
    along columns, of a parameter that is [experts, in, out]. smoothed: see `ScaledElements`.
    """

    codes_name: str = "{}_packed"
    scale_name: str = "{}_scale"
    global_name: str | None = None
    divided: bool = False
    turned: bool = False
    smoothed: bool = False

    @property
    def elements(self) -> str:
        return "MXFP4" if self.global_name is None else "NVFP4"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        parts: dict[PartName, WeightPart] = {
            "codes": WeightPart(self.codes_name, frozenset({"U8"}))
        }
        if self.global_name is None:
            parts["scale"] = WeightPart(self.scale_name, frozenset({"U8", "F8_E8M0"}))
        else:
            parts["scale"] = WeightPart(self.scale_name, frozenset({"F8_E4M3"}))
            parts["global_scale"] = WeightPart(self.global_name, frozenset({"F32"}))
        if self.smoothed:
            parts["smoothing"] = WeightPart("pre_quant_scale", FLOATS, optional=True)
        return parts

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found = parts["codes"].shape
        if self.turned:
            if len(found) < 3:
                raise ValueError(f"the codes have shape {found}, not [experts, in / 2, out]")
            found = (*found[:-2], found[-1], found[-2])
        shape = (*found[:-1], 2 * found[-1]) if found else ()
        self.check_scales(parts, shape, turned=self.turned)
        if "global_scale" in parts:
            found = parts["global_scale"].shape
            if prod(found) not in {1, prod(shape[:-2])}:
                raise ValueError(f"the global scale has shape {found}, a weight has one number")
        check_smoothing(parts, shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes, factors = parts["codes"], factors_of(parts["scale"])
        if self.turned:
            codes, factors = codes.mT.contiguous(), factors.mT
        if "global_scale" in parts:
            whole = parts["global_scale"].float()
            whole = whole.reshape(()) if whole.numel() == 1 else whole.reshape(-1, 1, 1)
            factors = factors / whole if self.divided else factors * whole
        weight = with_smoothing(scaled(fp4_values(codes), factors, self.grid), parts)
        return weight.mT if self.turned else weight


@dataclass(frozen=True)
class MxBlocks(StoredFormat):
    """MXFP4 as GPT-OSS has it: blocks [experts, out, in / 32, 16] and scales [experts, out, in /
    32], of a parameter that is [experts, in, out]."""

    @property
    def elements(self) -> str:
        return "MXFP4"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        return {
            "codes": WeightPart("{}_blocks", frozenset({"U8"})),
            "scale": WeightPart("{}_scales", frozenset({"U8", "F8_E8M0"})),
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
class GptqCodes(Int4Codes):
    """GPTQ: codes packed along the inputs, [in * bits / 32, out], each column with its group.

    bits: 2, 3, 4 or 8. minus_one: zero points are stored less one (format "gptq", not "gptq_v2").
    """

    bits: int
    minus_one: bool

    @property
    def elements(self) -> str:
        return f"int{self.bits}"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        return {
            "codes": WeightPart("qweight", frozenset({"I32"})),
            "scale": WeightPart("scales", FLOATS),
            "zero": WeightPart("qzeros", frozenset({"I32"})),
            "order": WeightPart("g_idx", INTEGERS, optional=True),
        }

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found = parts["codes"].shape
        if len(found) != 2:
            raise ValueError(f"the codes have shape {found}, not [in * {self.bits} / 32, out]")
        shape = (found[1], found[0] * 32 // self.bits)
        self.check_scales(parts, shape, turned=True)
        groups = grid_shape(shape, self.grid)[-1]
        check_zeros(parts["zero"].shape, (groups, -(-shape[0] * self.bits // 32)))
        check_order(parts, shape[1])
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        unsigned, zeros, factors = self.four_bits(parts, shape)
        codes = unsigned.float()
        if "order" not in parts or _in_order(parts["order"], self.grid[1]):
            return scaled(shifted(codes, zeros, self.grid), factors, self.grid)
        groups = parts["order"].long()
        check_groups(groups, factors.shape[1])
        return (codes - zeros[:, groups]).mul_(factors[:, groups])

    def four_bits(
        self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = shape
        codes = unpack_bits(parts["codes"].mT, self.bits, columns)
        words = parts["zero"]
        if self.minus_one and 8 % self.bits == 0:
            # as they were subtracted: from a whole word, so that a zero takes from its neighbour
            words = words + _ones(self.bits)
        zeros = unpack_bits(words, self.bits, rows)
        if self.minus_one and 8 % self.bits:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        return codes, zeros.mT.float(), factors_of(parts["scale"]).mT


@dataclass(frozen=True)
class AwqCodes(Int4Codes):
    """AutoAWQ's GEMM: codes of 4 bits packed along the outputs, [in, out / 8], in an order of its
    own."""

    @property
    def elements(self) -> str:
        return "int4"

    @property
    def parts(self) -> dict[PartName, WeightPart]:
        return {
            "codes": WeightPart("qweight", frozenset({"I32"})),
            "scale": WeightPart("scales", FLOATS),
            "zero": WeightPart("qzeros", frozenset({"I32"})),
        }

    def shape(self, parts: Mapping[PartName, TensorEntry]) -> tuple[int, ...]:
        found = parts["codes"].shape
        if len(found) != 2:
            raise ValueError(f"the codes have shape {found}, not [in, out / 8]")
        shape = (8 * found[1], found[0])
        self.check_scales(parts, shape, turned=True)
        check_zeros(parts["zero"].shape, (grid_shape(shape, self.grid)[-1], found[1]))
        return shape

    def dequantize(self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]) -> Tensor:
        codes, zeros, factors = self.four_bits(parts, shape)
        return scaled(shifted(codes.float(), zeros, self.grid), factors, self.grid)

    def four_bits(
        self, parts: Mapping[PartName, Tensor], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        zeros = unpack_awq(parts["zero"]).float()
        return unpack_awq(parts["codes"]), zeros, factors_of(parts["scale"]).mT


def _is_unused(groups: Tensor) -> bool:
    """Whether g_idx was allocated and never filled."""
    return bool((groups < 0).any())


def _in_order(groups: Tensor, size: int | None) -> bool:
    """Whether the columns of a group lie side by side, as they do where nothing was reordered."""
    count = groups.numel()
    numbers = torch.arange(count, device=groups.device)
    desired = torch.zeros_like(numbers) if size is None else numbers // size
    return torch.equal(groups.flatten().long(), desired)


def _ones(bits: int) -> int:
    """A word with 1 in each of its codes."""
    return sum(1 << shift for shift in range(0, 32, bits))
