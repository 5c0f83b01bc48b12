"""The experts a rank holds of one layer, and their computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.moe import ops

LARGE_GROUP_ROWS: Final = 32
"""From so many rows of an expert on, torch's product beats ours (measured, see tests/moe)."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert of one layer, in one layout whatever the checkpoint's.

    gate_up: [2 * inter, hidden], contiguous ([inter, hidden] for experts without a gate).
    down: [hidden, inter], contiguous.
    gate_up_bias: [2 * inter] or None.
    down_bias: [hidden] or None.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return sum(t.nbytes for t in tensors if t is not None)


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

    def compute(
        self, x: Tensor, offsets: Tensor, apply_gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
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
        if self._up is None or self._down is None:
            return self._compute_by_torch(x, offsets, apply_gate)
        x = x.contiguous()
        if not self._deterministic and x.shape[0] >= LARGE_GROUP_ROWS:
            bounds = offsets.tolist()
            if max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) >= LARGE_GROUP_ROWS:
                return self._compute_mixed(x, offsets, bounds, apply_gate)
        gated = apply_gate(self._up.linear(x, offsets))
        return self._down.linear(gated.contiguous(), offsets)

    def _compute_mixed(
        self, x: Tensor, offsets: Tensor, bounds: list[int], apply_gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `compute`: torch for the large groups, our kernel for the rest."""
        assert self._up is not None
        assert self._down is not None
        large = [
            slot for slot in range(self.slots) if bounds[slot + 1] - bounds[slot] >= LARGE_GROUP_ROWS
        ]
        hidden = _grouped_linear(x, offsets, bounds, large, self._up)
        return _grouped_linear(apply_gate(hidden).contiguous(), offsets, bounds, large, self._down)

    def _compute_by_torch(
        self, x: Tensor, offsets: Tensor, apply_gate: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `compute`, for dtypes and devices that our kernels do not know."""
        bounds = offsets.tolist()
        pieces = [x[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        hidden = torch.cat(
            [F.linear(p, e.gate_up, e.gate_up_bias) for p, e in zip(pieces, self.experts, strict=True)]
        )
        gated = apply_gate(hidden)
        return torch.cat(
            [
                F.linear(gated[a:b], e.down, e.down_bias)
                for a, b, e in zip(bounds, bounds[1:], self.experts, strict=False)
            ]
        )


def _grouped_linear(
    x: Tensor, offsets: Tensor, bounds: list[int], large: list[int], table: ops.WeightTable
) -> Tensor:
    """`table.linear`, with the slots in `large` done by torch."""
    y = x.new_empty((x.shape[0], table.out_features))
    start = 0
    for slot in large:
        table.linear_into(x, offsets, y, start, slot)
        rows = slice(bounds[slot], bounds[slot + 1])
        torch.mm(x[rows], table.weights[slot].t(), out=y[rows])
        if table.biases is not None:
            y[rows] += table.biases[slot]
        start = slot + 1
    table.linear_into(x, offsets, y, start, table.slots)
    return y
