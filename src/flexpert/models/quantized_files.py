"""Files whose weights are quantized, read as the weights that they stand for.

Where the files have the codes of a weight, its scales and more, here is one tensor under the name
that it has unquantized: `read` and `read_row` give it in float32. Other tensors are as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from flexpert.errors import ModelError
from flexpert.kernels import block_fp8, mxfp4
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat, int4_of
from flexpert.models.checkpoint import TensorFiles
from flexpert.models.checkpoint_file import CheckpointFile
from flexpert.models.packed_formats import Fp4Groups, Int4Codes, MxBlocks
from flexpert.models.quantization import Quantization
from flexpert.models.scale_grid import PER_TENSOR, factors_of
from flexpert.models.stored_formats import (
    PartName,
    ScaledElements,
    StoredFormat,
)
from flexpert.models.tensor_header import TensorEntry

ACTIVATION_SCALES: Final = frozenset(
    {
        "input_scale",
        "input_scale_inv",
        "input_global_scale",
        "input_zero_point",
        "activation_scale",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "k_scale",
        "v_scale",
        "k_zero_point",
        "v_zero_point",
        "prob_output_scale",
    }
)
"""Tensors that say how activations or the KV cache would be quantized. Here these are not."""

_CODES: Final = frozenset(
    {"F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2"}
)
_PARTS: Final = {"qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv"}
_NOT_WEIGHTS: Final = ("scale", "scale_inv", "scales", "zero_point", "qzeros", "pre_quant_scale")


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight by the parts that the files have of it. parts: → their keys."""

    format: StoredFormat
    parts: Mapping[PartName, str]
    shape: tuple[int, ...]


class QuantizedFiles(TensorFiles):
    """The safetensors files of a quantized checkpoint.

    Raises: ModelError: files are missing or damaged, parts of a weight are missing or do not fit
        each other, or some tensor is quantized and the configuration does not say how.
    """

    def __init__(self, path: Path, quantization: Quantization, named: object = None) -> None:
        super().__init__(path, named)
        self.quantization = quantization
        self.weights = self._find_weights()
        used = {part for weight in self.weights.values() for part in weight.parts.values()}
        self.unused = frozenset(
            key
            for key in self._place
            if key not in used and key.rpartition(".")[2] in ACTIVATION_SCALES
        )
        self._keys = tuple(
            dict.fromkeys(
                (
                    *(key for key in self._place if key not in used and key not in self.unused),
                    *self.weights,
                )
            )
        )
        self._check_explained()

    @property
    def format(self) -> str:
        """How weights are stored, for people."""
        kinds = sorted({weight.format.described for weight in self.weights.values()})
        return f"{self.quantization.method}: {', '.join(kinds) or 'nothing is quantized'}"

    def parts(self, key: str) -> Sequence[str]:
        weight = self.weights.get(key)
        return (key,) if weight is None else tuple(weight.parts.values())

    @property
    def unexplained(self) -> str:
        return (
            f"and what {self.quantization.source} says ({self.quantization.method}) explains it not"
        )

    def is_quantized(self, key: str) -> bool:
        return key in self.weights

    def keys(self) -> Iterable[str]:
        """Of weights, and of what is not quantized."""
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        weight = self.weights.get(key)
        return super().shape(key) if weight is None else weight.shape

    def is_plain(self, key: str) -> bool:
        return key not in self.weights and super().is_plain(key)

    def dtype(self, key: str) -> str:
        """As safetensors calls it; of a quantized weight, that of its codes."""
        weight = self.weights.get(key)
        return super().dtype(key if weight is None else weight.parts["codes"])

    def read(self, key: str) -> Tensor:
        weight = self.weights.get(key)
        if weight is None:
            return super().read(key)
        parts = {part: super(QuantizedFiles, self).read(k) for part, k in weight.parts.items()}
        return self._dequantized(key, weight, parts)

    def read_row(self, key: str, row: int) -> Tensor:
        weight = self.weights.get(key)
        if weight is None:
            return super().read_row(key, row)
        rows = weight.shape[0]
        if len(weight.shape) < 3:
            raise ModelError(f"{self.path}: {key} is one matrix, and has no row {row} of experts")
        parts = {part: self._row_of_part(k, row, rows) for part, k in weight.parts.items()}
        return self._dequantized(key, weight, parts)

    def format_in_memory(self, key: str) -> WeightFormat | None:
        """The format of `flexpert.kernels` that a weight's codes and scales are in, if they are all
        that there is of it; blocks may have another size."""
        weight = self.weights.get(key)
        if weight is None:
            return None
        if isinstance(weight.format, Int4Codes):
            entry = self._place[weight.parts["scale"]][1]
            group = weight.format.group_in_memory(weight.shape, entry.dtype)
            return None if group is None else int4_of(group)
        if set(weight.parts) != {"codes", "scale"}:
            return None
        match weight.format:
            case ScaledElements(dtype="F8_E4M3"):
                return FP8
            case MxBlocks() | Fp4Groups(turned=False):
                return MXFP4
        return None

    def has_blocks(self, key: str) -> bool:
        """Whether `stored` gives its codes and scales with that format's blocks."""
        size, grid = block_fp8.BLOCK, self.weights[key].format.grid
        of = self.format_in_memory(key)
        if of is not None and of.name == "int4":
            return True
        return (of is FP8 and grid in {(size, size), PER_TENSOR}) or (
            of is MXFP4 and grid == (1, mxfp4.BLOCK)
        )

    def is_turned(self, key: str) -> bool:
        """Whether the codes are [..., out, in] though the weight is [..., in, out]."""
        return isinstance(self.weights[key].format, MxBlocks)

    def stored(self, part: PartName) -> StoredParts:
        """Codes or scales of weights that have a format in memory, by the weights' keys."""
        return StoredParts(self, part)

    def as_int4(self, key: str, part: PartName, row: int | None = None) -> Tensor:
        """Codes or scales of a weight, or of its row of experts, as `flexpert.kernels.group_int4`
        has them."""
        weight = self.weights[key]
        try:
            if not isinstance(weight.format, Int4Codes):
                raise ValueError("it is in no int4")
            parts = {name: self.part(key, name, row) for name in weight.parts}
            return weight.format.in_memory(part, parts, weight.shape)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.path}: {key} cannot stay packed: {error}; leave --quantization int4 out, "
                "and it is dequantized"
            ) from error

    def part(self, key: str, part: PartName, row: int | None = None) -> Tensor:
        """A part of a weight, or its row of it, as it lies in the files."""
        name = self.weights[key].parts[part]
        if row is None:
            return super().read(name)
        return self._row_of_part(name, row, self.weights[key].shape[0])

    def _row_of_part(self, key: str, row: int, rows: int) -> Tensor:
        """[1, …]; the whole, where all rows have the same."""
        shape = super().shape(key)
        if shape[:1] == (rows,):
            return super().read_row(key, row)
        return super().read(key)

    def _dequantized(
        self, key: str, weight: QuantizedWeight, parts: Mapping[PartName, Tensor]
    ) -> Tensor:
        try:
            return weight.format.dequantize(parts, weight.shape)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{self.path}: {key} cannot be dequantized: {error}") from error

    def _find_weights(self) -> dict[str, QuantizedWeight]:
        weights: dict[str, QuantizedWeight] = {}
        formats: dict[str, tuple[StoredFormat, ...]] = {}
        for key in sorted(self._place):
            entry = self._place[key][1]
            module = key.rpartition(".")[0]
            if module not in formats:
                formats[module] = self.quantization.formats_of(module)
            candidates = [
                (one, name)
                for one in formats[module]
                if entry.dtype in one.parts["codes"].dtypes
                and (name := one.parts["codes"].weight(key)) is not None
                and not name.endswith(_NOT_WEIGHTS)
            ]
            if candidates:
                weights[candidates[0][1]] = self._weight(key, candidates)
        return weights

    def _weight(self, codes: str, candidates: list[tuple[StoredFormat, str]]) -> QuantizedWeight:
        """The first layout that fits. Raises: ModelError: none does; says why not."""
        problem = ""
        for one, name in candidates:
            parts: dict[PartName, str] = {
                role: part.key(name)
                for role, part in one.parts.items()
                if part.key(name) in self._place
            }
            missing = [
                part.key(name)
                for role, part in one.parts.items()
                if role not in parts and not part.optional
            ]
            if missing:
                problem = problem or (
                    f"has {codes} in {self.dtype_of_file(codes)} without {missing[0]}"
                )
                continue
            try:
                return QuantizedWeight(one, parts, self._shape(one, parts))
            except ValueError as error:
                problem = f"has {codes}, which cannot be dequantized: {error}"
        raise ModelError(
            f"{self.path} {problem}; its {self.quantization.source} says "
            f"{self.quantization.method}: download it again, or the layout is not served"
        )

    def dtype_of_file(self, key: str) -> str:
        return self._place[key][1].dtype

    def _shape(self, one: StoredFormat, parts: Mapping[PartName, str]) -> tuple[int, ...]:
        """Raises: ValueError"""
        entries: dict[PartName, TensorEntry] = {}
        for role, key in parts.items():
            entries[role] = entry = self._place[key][1]
            if entry.dtype not in one.parts[role].dtypes:
                desired = " or ".join(sorted(one.parts[role].dtypes))
                raise ValueError(f"{key} is {entry.dtype}, not {desired}")
        return one.shape(entries)

    def _check_explained(self) -> None:
        """Raises: ModelError: a tensor is left that is quantized, or belongs to one that is."""
        left = [key for key in self._keys if key not in self.weights]
        # codes first: scales that are left over are theirs
        for key in (key for key in left if self.dtype_of_file(key) in _CODES):
            raise self._unexplained(key, f"is {self.dtype_of_file(key)}")
        for key in (key for key in left if key.rpartition(".")[2] in _PARTS):
            raise self._unexplained(key, "belongs to a quantized weight")

    def _unexplained(self, key: str, why: str) -> ModelError:
        return ModelError(
            f"{self.path}: {key} {why}, and nothing that {self.quantization.source} says "
            f"({self.quantization.method}) explains it; download it again"
        )


class StoredParts:
    """One part of weights that have a format in memory, by the weights' keys, as they have it
    there: codes as bytes; scales of fp8 in float32 (for each block, where the files have one for
    the whole weight), of MXFP4 as bytes."""

    def __init__(self, files: QuantizedFiles, part: PartName) -> None:
        self._files = files
        self._part = part

    def shape(self, key: str) -> tuple[int, ...]:
        of, shape = self._files.format_in_memory(key), self._files.shape(key)
        if of is None:
            raise ValueError(f"{key} is in no format that there is in memory")
        *before, rows, columns = shape
        if self._files.is_turned(key):
            rows, columns = columns, rows
        matrix = of.weights_of if self._part == "codes" else of.scales_of
        return (*before, *matrix(rows, columns))

    def read(self, key: str) -> Tensor:
        if self._is_int4(key):
            return self._files.as_int4(key, self._part)
        return self._as_used(key, self._files.part(key, self._part), self.shape(key))

    def read_row(self, key: str, row: int) -> Tensor:
        if self._is_int4(key):
            return self._files.as_int4(key, self._part, row)
        part = self._files.part(key, self._part, row)
        return self._as_used(key, part, (1, *self.shape(key)[1:]))

    def _is_int4(self, key: str) -> bool:
        of = self._files.format_in_memory(key)
        return of is not None and of.name == "int4"

    def place(self, key: str) -> tuple[CheckpointFile, TensorEntry]:
        """Where the bytes of the part are."""
        return self._files.place(self._files.weights[key].parts[self._part])

    def _as_used(self, key: str, part: Tensor, shape: tuple[int, ...]) -> Tensor:
        if self._part == "codes" or self._files.format_in_memory(key) is MXFP4:
            return part.view(torch.uint8).view(shape)
        factors = factors_of(part)
        if factors.numel() == prod(shape):
            return factors.view(shape)
        if self._files.weights[key].format.grid != PER_TENSOR:
            return factors  # whoever uses them says what does not fit
        return factors.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
