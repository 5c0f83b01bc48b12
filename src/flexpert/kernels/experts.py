"""The experts a rank holds of one layer, and their computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cpu import ops

LIBRARY_ROWS: Final = (256, 128, 64)
"""Rows of one call to torch's product: a large group is cut into such pieces, our kernel takes the
rest. Few sizes, because oneDNN compiles and keeps a kernel for each that it meets."""


def library_rows(dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """The sizes from which on torch's `threads` beat our one (measured on Sapphire Rapids).

    Without AMX: 64 rows of 2048x2048 f32 take torch 3.6 ms, us 3.7. With AMX, bf16, one thread:
    16 rows take torch 0.57 ms, us 0.34, and 512 rows 3.7 and 3.5; torch has the second thread.
    """
    if dtype == torch.bfloat16 and ops.instruction_set() == "amx" and threads == 1:
        return ()
    return LIBRARY_ROWS


ALIGNMENT: Final = 16
"""Bytes; kernels load that many at once."""


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
    """Of one expert. height: rows of gate_up, i.e. 2 * inter (inter for experts without a gate).

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
        return self.over(torch.empty(self.nbytes, dtype=torch.uint8))

    def _parts(self) -> list[_Part]:
        up, down = (self.height, self.hidden), (self.hidden, self.inter)
        scaled = self.dtype == fp8.DTYPE
        wanted: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("gate_up", up, self.dtype),
            ("down", down, self.dtype),
        ]
        if self.biases is not None:
            wanted += [("gate_up_bias", up[:1], self.biases), ("down_bias", down[:1], self.biases)]
        if scaled:
            wanted += [
                ("gate_up_scale", fp8.scales_of(*up), torch.float32),
                ("down_scale", fp8.scales_of(*down), torch.float32),
            ]
        parts: list[_Part] = []
        for name, shape, dtype in wanted:
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
            or any(given != wanted for given, wanted in scales)
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


class LayerExperts:
    """The experts a rank holds of one layer; an expert's slot is its position.

    Args:
        experts: of equal shapes and dtype; may be empty.
        deterministic: give each row the same bits whatever shares the call.
    """

    def __init__(self, experts: Sequence[ExpertWeights], *, deterministic: bool) -> None:
        self.experts = tuple(experts)
        self._deterministic = deterministic
        self._up = self._down = None
        if not self.experts:
            return
        if (self.experts[0].gate_up_bias is None) != (self.experts[0].down_bias is None):
            raise ValueError("experts have both biases or none")
        weight = self.experts[0].gate_up
        if weight.dtype in ops.DTYPES and weight.device.type == "cpu":
            up_biases = [e.gate_up_bias for e in self.experts if e.gate_up_bias is not None]
            down_biases = [e.down_bias for e in self.experts if e.down_bias is not None]
            self._up = ops.WeightTable([e.gate_up for e in self.experts], up_biases or None)
            self._down = ops.WeightTable([e.down for e in self.experts], down_biases or None)
        elif deterministic:
            raise ValueError(f"deterministic experts need bf16 or f32 on a CPU, not {weight.dtype}")

    @property
    def slots(self) -> int:
        return len(self.experts)

    def compute(self, x: Tensor, offsets: Tensor, apply_gate: Callable[[Tensor], Tensor]) -> Tensor:
        """Each row through its expert.

        Args:
            x: [rows, hidden], sorted by slot.
            offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
            apply_gate: [rows, 2 * inter] → [rows, inter]; the model's own, called once.

        Returns:
            [rows, hidden], in x's order and dtype.
        """
        if x.shape[0] == 0:
            return x.new_empty(x.shape)
        if self.experts[0].gate_up.dtype == fp8.DTYPE:
            raise ValueError("torch does not compute fp8 experts with scales of blocks")
        if self._up is None or self._down is None:
            return self._compute_by_torch(x, offsets, apply_gate)
        x = x.contiguous()
        split = self._split(x, offsets)
        hidden = self._linear(self._up, x, offsets, split)
        return self._linear(self._down, apply_gate(hidden).contiguous(), offsets, split)

    def _split(self, x: Tensor, offsets: Tensor) -> list[tuple[int, int, int]]:
        """The pieces of x to give to torch: (slot, first row, rows), of sizes in `library_rows`."""
        if self._deterministic or x.shape[0] < LIBRARY_ROWS[-1]:
            return []
        sizes = library_rows(x.dtype, torch.get_num_threads())
        if not sizes:
            return []
        pieces = []
        for slot, (begin, end) in enumerate(pairwise(offsets.tolist())):
            for size in sizes:
                while end - begin >= size:
                    pieces.append((slot, begin, size))
                    begin += size
        return pieces

    @staticmethod
    def _linear(
        table: ops.WeightTable, x: Tensor, offsets: Tensor, split: list[tuple[int, int, int]]
    ) -> Tensor:
        """`table.linear`, with the pieces in `split` done by torch."""
        if not split:
            return table.linear(x, offsets)
        y = x.new_empty((x.shape[0], table.out_features))
        begins = offsets[:-1].clone()
        for slot, begin, size in split:
            rows = slice(begin, begin + size)
            torch.mm(x[rows], table.weights[slot].t(), out=y[rows])
            if table.biases is not None:
                y[rows] += table.biases[slot]
            begins[slot] = begin + size
        table.linear_ranges(x, begins, offsets[1:], y)
        return y

    def _compute_by_torch(
        self, x: Tensor, offsets: Tensor, apply_gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `compute`, for dtypes and devices that our kernels do not know."""
        bounds = offsets.tolist()
        pieces = [x[a:b] for a, b in pairwise(bounds)]
        hidden = torch.cat(
            [
                F.linear(p, e.gate_up, e.gate_up_bias)
                for p, e in zip(pieces, self.experts, strict=True)
            ]
        )
        gated = apply_gate(hidden)
        return torch.cat(
            [
                F.linear(gated[a:b], e.down, e.down_bias)
                for (a, b), e in zip(pairwise(bounds), self.experts, strict=True)
            ]
        )
