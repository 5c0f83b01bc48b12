"""The weights of one expert, in one layout for all models and kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Final, NamedTuple

import torch
from torch import Tensor

from flexpert.kernels.weight_formats import WeightFormat, format_of

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

    weights: their dtype, or the format of which they have scales. biases: their dtype; None: there
    are none.
    """

    hidden: int
    height: int
    inter: int
    weights: torch.dtype | WeightFormat
    biases: torch.dtype | None = None

    @property
    def format(self) -> WeightFormat | None:
        """Of weights with scales; None: these have none."""
        return self.weights if isinstance(self.weights, WeightFormat) else None

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
        desired: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for name, matrix in (("gate_up", up), ("down", down)):
            if isinstance(self.weights, WeightFormat):
                desired.append((name, self.weights.weights_of(*matrix), self.weights.dtype))
            else:
                desired.append((name, matrix, self.weights))
        if self.biases is not None:
            desired += [("gate_up_bias", up[:1], self.biases), ("down_bias", down[:1], self.biases)]
        if self.format is not None:
            of = self.format
            desired += [
                ("gate_up_scale", of.scales_of(*up), of.scale_dtype),
                ("down_scale", of.scales_of(*down), of.scale_dtype),
            ]
        parts: list[_Part] = []
        for name, shape, dtype in desired:
            at = -(-parts[-1].end // ALIGNMENT) * ALIGNMENT if parts else 0
            parts.append(_Part(name, shape, dtype, at))
        return parts


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert of one layer, in one layout whatever the checkpoint's.

    gate_up: [2 * inter, hidden], contiguous ([inter, hidden] for experts without a gate). The rows
        of gate and up are in the order that the model's own gate expects.
    down: [hidden, inter], contiguous.
    gate_up_bias: [2 * inter] or None.
    down_bias: [hidden] or None.
    gate_up_scale, down_scale: scales of weights in a format of `flexpert.kernels.weight_formats`,
        or None.
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
        packed = format_of(self.gate_up, self.gate_up_scale)
        elements = packed.elements if packed else 1
        height, hidden = self.gate_up.shape[0], self.gate_up.shape[1] * elements
        biases = [b.shape[0] for b in (self.gate_up_bias, self.down_bias) if b is not None]
        bias = self.gate_up_bias
        shape = ExpertShape(
            hidden,
            height,
            self.down.shape[1] * elements,
            packed or self.gate_up.dtype,
            None if bias is None else bias.dtype,
        )
        if biases not in ([], [height, hidden]) or [
            (part.shape, part.dtype) for part in shape._parts()
        ] != [(tuple(tensor.shape), tensor.dtype) for tensor in self.tensors]:
            raise ValueError("the tensors of an expert do not fit each other")
        return shape

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

    def quantized(self, to: WeightFormat) -> ExpertWeights:
        """The same in another format; biases stay.

        Raises: ValueError: weights are not finite, or of a size that the format does not have.
        """
        gate_up, gate_up_scale = to.quantize(self.gate_up)
        down, down_scale = to.quantize(self.down)
        return ExpertWeights(
            gate_up, down, self.gate_up_bias, self.down_bias, gate_up_scale, down_scale
        )

    def dequantized(self) -> ExpertWeights:
        """The same in float32 without scales; itself if it has none."""
        packed = format_of(self.gate_up, self.gate_up_scale)
        if packed is None or self.gate_up_scale is None or self.down_scale is None:
            return self
        return ExpertWeights(
            packed.restore(self.gate_up, self.gate_up_scale),
            packed.restore(self.down, self.down_scale),
            self.gate_up_bias,
            self.down_bias,
        )
