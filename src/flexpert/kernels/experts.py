"""The weights of one expert, in one layout for all models and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8

ALIGNMENT: Final = 16
"""Bytes; kernels load that many at once."""

Gate = Callable[[Tensor], Tensor]
"""What a model computes between both products, transformers' own: [rows, height] → [rows, inter],
in SwiGLU silu of the first half times the second."""


class _Part(NamedTuple):
    """One tensor of an expert. begin: in the expert's memory, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def end(self) -> int:
        return self.begin + prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of one expert. height: rows of gate_up, 2 * inter (inter for experts without a gate).

    dtype: of the weights; that of fp8 means that they have scales (see
    `flexpert.kernels.block_fp8`). biases: their dtype; None: there are none.
    """

    hidden: int
    height: int
    inter: int
    dtype: torch.dtype
    biases: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of an expert's tensors, each aligned to `ALIGNMENT`."""
        return self._parts()[-1].end

    @property
    def begins(self) -> dict[str, int]:
        """Where each of an expert's tensors begins in its memory, in bytes."""
        return {part.name: part.begin for part in self._parts()}

    def over(self, memory: Tensor) -> ExpertWeights:
        """An expert whose tensors are views of `memory`, [`nbytes`] uint8, one behind the other."""
        return ExpertWeights(
            **{
                part.name: memory[part.begin : part.end].view(part.dtype).view(part.shape)
                for part in self._parts()
            }
        )

    def empty(self) -> ExpertWeights:
        """An expert in memory of its own, not yet filled."""
        return self.over(torch.empty(self.nbytes, dtype=torch.uint8, device="cpu"))

    def _parts(self) -> list[_Part]:
        up, down = (self.height, self.hidden), (self.hidden, self.inter)
        scaled = self.dtype == fp8.DTYPE
        desired: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("gate_up", up, self.dtype),
            ("down", down, self.dtype),
        ]
        if self.biases is not None:
            desired += [("gate_up_bias", up[:1], self.biases), ("down_bias", down[:1], self.biases)]
        if scaled:
            desired += [
                ("gate_up_scale", fp8.scales_of(*up), torch.float32),
                ("down_scale", fp8.scales_of(*down), torch.float32),
            ]
        parts: list[_Part] = []
        for name, shape, dtype in desired:
            at = -(-parts[-1].end // ALIGNMENT) * ALIGNMENT if parts else 0
            parts.append(_Part(name, shape, dtype, at))
        return parts


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert of one layer, in one layout whatever the checkpoint's.

    gate_up: [2 * inter, hidden], contiguous ([inter, hidden] for experts without a gate).
    down: [hidden, inter], contiguous.
    gate_up_bias: [2 * inter] or None.
    down_bias: [hidden] or None.
    gate_up_scale, down_scale: float32 scales of fp8 weights (see `flexpert.kernels.block_fp8`), or
    None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those it has."""
        every = (getattr(self, field.name) for field in fields(self))
        return [tensor for tensor in every if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shape(self) -> ExpertShape:
        """Raises: ValueError: tensors that do not fit each other."""
        height, hidden = self.gate_up.shape
        inter = self.down.shape[1]
        biases = [b.shape[0] for b in (self.gate_up_bias, self.down_bias) if b is not None]
        scales = [
            (scale is not None, weight.dtype == fp8.DTYPE)
            for scale, weight in ((self.gate_up_scale, self.gate_up), (self.down_scale, self.down))
        ]
        if (
            self.down.shape[0] != hidden
            or biases not in ([], [height, hidden])
            or self.down.dtype != self.gate_up.dtype
            or any(given != desired for given, desired in scales)
        ):
            raise ValueError("the tensors of an expert do not fit each other")
        bias = self.gate_up_bias
        return ExpertShape(
            hidden, height, inter, self.gate_up.dtype, None if bias is None else bias.dtype
        )

    def to(self, device: torch.device) -> ExpertWeights:
        """A copy on a device; itself if it is there."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return ExpertWeights(
            self.gate_up.to(device),
            self.down.to(device),
            moved(self.gate_up_bias),
            moved(self.down_bias),
            moved(self.gate_up_scale),
            moved(self.down_scale),
        )

    def quantized(self) -> ExpertWeights:
        """The same in fp8 with a scale for each block of 128 x 128; biases stay."""
        gate_up, gate_up_scale = fp8.quantize(self.gate_up)
        down, down_scale = fp8.quantize(self.down)
        return ExpertWeights(
            gate_up, down, self.gate_up_bias, self.down_bias, gate_up_scale, down_scale
        )

    def dequantized(self) -> ExpertWeights:
        """The same in float32 without scales; itself if it has none."""
        if self.gate_up_scale is None or self.down_scale is None:
            return self
        return ExpertWeights(
            fp8.dequantize(self.gate_up, self.gate_up_scale),
            fp8.dequantize(self.down, self.down_scale),
            self.gate_up_bias,
            self.down_bias,
        )
