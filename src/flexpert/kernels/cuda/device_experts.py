"""Which experts a rank holds, in device memory, and their computation.

The tables have a fixed size, one slot for each expert of the model. A change of the experts
rewrites them between two steps and moves no weights, so that captured graphs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cuda.grouped_products import grouped_product
from flexpert.kernels.experts import ALIGNMENT, ExpertShape, ExpertWeights, Gate

_TABLES = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")


class DeviceExperts:
    """The experts a rank holds of all MoE layers.

    Args:
        layers: MoE layers of the model.
        slots: most experts the rank can hold of a layer, i.e. the experts of the model.
        shape: of every expert.
        device: of the weights.
    """

    def __init__(self, layers: int, slots: int, shape: ExpertShape, device: torch.device) -> None:
        self.slots = slots
        self.shape = shape
        self.device = device
        self._tables = torch.zeros((len(_TABLES), layers, slots), dtype=torch.int64, device=device)
        self._held: list[list[ExpertWeights]] = []
        self._swiglu: dict[Gate, bool] = {}

    def install(self, layers: Sequence[Sequence[ExpertWeights]]) -> None:
        """Hold these from the next launch on, one list a layer in slot order.

        Raises:
            ValueError: more experts than slots, another shape, or weights that are not contiguous,
                not aligned or elsewhere.
        """
        host = torch.zeros(self._tables.shape, dtype=torch.int64, device="cpu")
        for index, experts in enumerate(layers):
            if len(experts) > self.slots:
                raise ValueError(f"{len(experts)} experts for {self.slots} slots")
            for slot, expert in enumerate(experts):
                self._check(expert)
                for table, name in enumerate(_TABLES):
                    tensor = getattr(expert, name)
                    if tensor is not None:
                        host[table, index, slot] = tensor.data_ptr()
        self._tables.copy_(host)
        # what was held before may go now: its memory is used again only behind the running step
        self._held = [list(experts) for experts in layers]

    def _check(self, expert: ExpertWeights) -> None:
        if expert.shape != self.shape:
            raise ValueError(f"an expert of {expert.shape} among those of {self.shape}")
        for tensor in expert.tensors:
            if tensor.device.type != self.device.type:
                raise ValueError(f"expert weights on {tensor.device}, not on {self.device}")
            if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
                raise ValueError(f"expert weights must be contiguous, aligned to {ALIGNMENT} bytes")

    def compute(
        self,
        layer: int,
        x: Tensor,
        index: Tensor | None,
        offsets: Tensor,
        rows: int,
        apply_gate: Gate,
        expected: int | None = None,
    ) -> Tensor:
        """Each row through its expert; nothing of the sizes is read by the host.

        Args:
            x: [any, hidden] contiguous, of the weights' dtype (any with fp8 weights).
            index: [rows] int32, which row of x each row is; None: its own.
            offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
            rows: at most so many.
            apply_gate: [rows, 2 * inter] → [rows, inter]; where it is SwiGLU, not called.
            expected: about so many; None: as many as there may be.

        Returns:
            [rows, hidden]; what lies behind offsets[slots] is unset.
        """
        up, down, up_bias, down_bias, up_scale, down_scale = self._tables[:, layer]
        scaled = self.shape.dtype == fp8.DTYPE
        gated = self._is_swiglu(apply_gate)
        height = self.shape.height
        hidden = grouped_product(
            x,
            up,
            offsets,
            x.new_empty((rows, height // 2 if gated else height)),
            index=index,
            scales=up_scale if scaled else None,
            biases=None if self.shape.biases is None else up_bias,
            gated=gated,
            expected=expected,
        )
        if not gated:
            hidden = apply_gate(hidden).contiguous()
        return grouped_product(
            hidden,
            down,
            offsets,
            x.new_empty((rows, x.shape[1])),
            scales=down_scale if scaled else None,
            biases=None if self.shape.biases is None else down_bias,
            expected=expected,
        )

    def _is_swiglu(self, apply_gate: Gate) -> bool:
        if apply_gate not in self._swiglu:
            self._swiglu[apply_gate] = is_swiglu(apply_gate)
        return self._swiglu[apply_gate]


def is_swiglu(apply_gate: Gate) -> bool:
    """Whether a gate is silu(first half) · second half; found by trying it."""
    dice = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn((4, 64), generator=dice, dtype=torch.float32, device="cpu") * 8
    a, b = x.chunk(2, dim=-1)
    try:
        y = apply_gate(x)
        return y.shape == a.shape and torch.allclose(y, F.silu(a) * b, rtol=1e-5, atol=1e-6)
    except (RuntimeError, TypeError, ValueError):  # it wants something else to work on
        return False
