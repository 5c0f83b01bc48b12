"""The experts a rank holds of one layer, and their computation on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels.cpu import ops
from flexpert.kernels.experts import ExpertWeights, Gate
from flexpert.kernels.weight_formats import format_of

LIBRARY_ROWS: Final = (256, 128, 64)
"""Rows of one call to torch's product: a large group is cut into such pieces, our kernel takes the
rest. Few sizes, because oneDNN compiles and keeps a kernel for each that it meets."""


def library_rows(dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """The sizes from which on torch's `threads` beat our one (measured on Sapphire Rapids).

    Without AMX: 64 rows of 2048x2048 f32 take torch 3.6 ms, us 3.7. With AMX, bf16, one thread:
    16 rows take torch 0.57 ms, us 0.34, and 512 rows 3.7 and 3.5; torch has the second thread.
    Products of bf16 without AMX are alike (see `kernel_set.BF16_ROWS`), and with AVX2 alone torch's
    are never the faster ones.
    """
    here = ops.instruction_set()
    if dtype == torch.bfloat16 and (
        here == "avx2" or (here in {"amx", "avx512_bf16"} and threads == 1)
    ):
        return ()
    return LIBRARY_ROWS


_PARTS: Final = ("", "_bias", "_scale")


def _of(experts: Sequence[ExpertWeights], part: str) -> list[Tensor]:
    """One tensor of each expert; none, where they do not have it."""
    found = (getattr(expert, part) for expert in experts)
    return [tensor for tensor in found if tensor is not None]


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
        packed = format_of(weight, self.experts[0].gate_up_scale)
        ours = weight.dtype in ops.DTYPES if packed is None else ops.unpacks(packed)
        if ours and weight.device.type == "cpu":
            self._up, self._down = (
                ops.WeightTable(
                    *(_of(self.experts, f"{name}{part}") for part in _PARTS), fixed=deterministic
                )
                for name in ("gate_up", "down")
            )
        elif packed is not None:
            raise ValueError(f"a CPU does not compute with experts in {packed.name}")
        elif deterministic:
            raise ValueError(f"deterministic experts need bf16 or f32 on a CPU, not {weight.dtype}")

    @property
    def slots(self) -> int:
        return len(self.experts)

    @property
    def tables(self) -> tuple[ops.WeightTable, ops.WeightTable] | None:
        """Of gate_up and down, for our kernels; None: there are no experts, or torch computes."""
        return None if self._up is None or self._down is None else (self._up, self._down)

    def compute(
        self, x: Tensor, offsets: Tensor, apply_gate: Gate, out: Tensor | None = None
    ) -> Tensor:
        """Each row through its expert.

        Args:
            x: [rows, hidden], sorted by slot.
            offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
            apply_gate: [rows, 2 * inter] → [rows, inter]; the model's own, called once.
            out: [rows, hidden] of x's dtype, contiguous, to fill; None: new.

        Returns:
            [rows, hidden], in x's order and dtype.
        """
        y = x.new_empty(x.shape) if out is None else out
        if x.shape[0] == 0:
            return y
        if self._up is None or self._down is None:
            return self._compute_by_torch(x, offsets, apply_gate, y)
        x = x.contiguous()
        split = self._split(x, offsets)
        hidden = x.new_empty((x.shape[0], self._up.out_features))
        self._linear(self._up, x, offsets, split, hidden)
        self._linear(self._down, apply_gate(hidden).contiguous(), offsets, split, y)
        return y

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
        table: ops.WeightTable,
        x: Tensor,
        offsets: Tensor,
        split: list[tuple[int, int, int]],
        y: Tensor,
    ) -> None:
        """`table.linear_ranges` of all rows, with the pieces in `split` done by torch."""
        begins = offsets[:-1].clone()
        whole_of, whole = -1, x
        for slot, begin, size in split:
            rows = slice(begin, begin + size)
            if slot != whole_of:
                whole_of, whole = slot, table.whole(slot, x.dtype)
            torch.mm(x[rows], whole.t(), out=y[rows])
            if table.biases is not None:
                y[rows] += table.biases[slot]
            begins[slot] = begin + size
        table.linear_ranges(x, begins, offsets[1:], y)

    def _compute_by_torch(self, x: Tensor, offsets: Tensor, apply_gate: Gate, y: Tensor) -> Tensor:
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
            ],
            out=y,
        )
