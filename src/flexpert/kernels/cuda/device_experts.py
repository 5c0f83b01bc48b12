"""Which experts a rank holds, in device memory, and their computation.

The tables have a fixed size, one slot for each expert of the model. A change of the experts
rewrites them between two steps and moves no weights, so that captured graphs stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels.cuda.few_tokens import fits
from flexpert.kernels.cuda.gates import clamped_swiglu, clamped_swiglu_of
from flexpert.kernels.cuda.grouped_products import grouped_product, launched_rows
from flexpert.kernels.experts import ALIGNMENT, ExpertShape, ExpertWeights, Gate

_TABLES = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")


@dataclass(frozen=True, slots=True)
class SlotAddresses:
    """Where the experts of one layer lie, in the order of their slots.

    table: [tables, experts] int64, addresses on the device; 0 where an expert has no such tensor.
    shape: of each; None: there are none. weights: kept alive here, or by somebody else.
    """

    table: npt.NDArray[np.int64]
    shape: ExpertShape | None
    weights: tuple[ExpertWeights, ...] = ()

    @classmethod
    def at(cls, begins: Sequence[int], shape: ExpertShape) -> SlotAddresses:
        """Of experts in memory that begins at these addresses, each as `ExpertShape.over` has it.

        Raises: ValueError: one is not aligned.
        """
        first = np.array(begins, dtype=np.int64)
        if (first % ALIGNMENT).any():
            raise ValueError(f"expert weights must be aligned to {ALIGNMENT} bytes")
        table = np.zeros((len(_TABLES), len(begins)), dtype=np.int64)
        for name, begin in shape.begins.items():
            table[_TABLES.index(name)] = first + begin
        return cls(table, shape if begins else None)

    @classmethod
    def of(cls, weights: Sequence[ExpertWeights]) -> SlotAddresses:
        """Of experts anywhere on the device.

        Raises: ValueError: their shapes differ, or weights are not contiguous or not aligned.
        """
        table = np.zeros((len(_TABLES), len(weights)), dtype=np.int64)
        shapes = {expert.shape for expert in weights}
        if len(shapes) > 1:
            raise ValueError(f"experts of one layer have different shapes: {shapes}")
        for slot, expert in enumerate(weights):
            for row, name in enumerate(_TABLES):
                tensor = getattr(expert, name)
                if tensor is None:
                    continue
                if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
                    raise ValueError(
                        f"expert weights must be contiguous, aligned to {ALIGNMENT} bytes"
                    )
                table[row, slot] = tensor.data_ptr()
        return cls(table, next(iter(shapes), None), tuple(weights))

    @property
    def experts(self) -> int:
        return int(self.table.shape[1])


@dataclass(frozen=True, slots=True)
class StagedExperts:
    """What `DeviceExperts.install` needs, on the device. tables: [tables, layers, slots] int64."""

    tables: Tensor
    held: tuple[SlotAddresses, ...]


class DeviceExperts:
    """The experts a rank holds of all MoE layers.

    Args:
        layers: MoE layers of the model.
        slots: most experts the rank can hold of a layer, i.e. the experts of the model.
        shape: of every expert.
        device: of the weights.
        deterministic: a row has the same bits in any company.
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        shape: ExpertShape,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        self.slots = slots
        self._deterministic = deterministic
        self.shape = shape
        self.device = device
        self._tables = torch.zeros((len(_TABLES), layers, slots), dtype=torch.int64, device=device)
        self._held: tuple[SlotAddresses, ...] = ()
        self._swiglu: dict[Gate, bool] = {}
        self._clamped: dict[Gate, tuple[float, float] | None] = {}

    def stage(self, layers: Sequence[SlotAddresses]) -> StagedExperts:
        """Ready to be held, one for each layer; changes nothing yet.

        May be called in another thread than the one that computes; the calling thread's stream is
        to be waited for.

        Raises:
            ValueError: more experts than slots, another shape, or weights elsewhere.
        """
        host = np.zeros(self._tables.shape, dtype=np.int64)
        for index, experts in enumerate(layers):
            self._check(experts)
            host[:, index, : experts.experts] = experts.table
        return StagedExperts(torch.from_numpy(host).to(self.device), tuple(layers))

    def install(self, staged: StagedExperts) -> None:
        """Hold these from the next launch on."""
        self._tables.copy_(staged.tables, non_blocking=True)
        # what was held before may go now: its memory is used again only behind the running step
        self._held = staged.held

    def _check(self, layer: SlotAddresses) -> None:
        if layer.experts > self.slots:
            raise ValueError(f"{layer.experts} experts for {self.slots} slots")
        if layer.shape not in (None, self.shape):
            raise ValueError(f"an expert of {layer.shape} among those of {self.shape}")
        for expert in layer.weights:
            for tensor in expert.tensors:
                if tensor.device.type != self.device.type:
                    raise ValueError(f"expert weights on {tensor.device}, not on {self.device}")

    def compute(
        self,
        layer: int,
        x: Tensor,
        index: Tensor | None,
        offsets: Tensor,
        rows: int,
        apply_gate: Gate,
        expected: int | None = None,
        *,
        follows: bool = False,
    ) -> Tensor:
        """Each row through its expert; nothing of the sizes is read by the host.

        Args:
            x: [any, hidden] contiguous, of the weights' dtype (any with fp8 weights).
            index: [rows] int32, which row of x each row is; None: its own.
            offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
            rows: at most so many.
            apply_gate: [rows, 2 * inter] → [rows, inter]; where it is SwiGLU, not called.
            expected: about so many; None: as many as there may be.
            follows: see `grouped_product`.

        Returns:
            [rows, hidden]; what lies behind offsets[slots] is unset.
        """
        up, down, up_bias, down_bias, up_scale, down_scale = self._tables[:, layer]
        packed = self.shape.format
        gated = self._is_swiglu(apply_gate)
        height = self.shape.height
        hidden = grouped_product(
            x,
            up,
            offsets,
            x.new_empty((rows, height // 2 if gated else height)),
            index=index,
            packed=packed,
            scales=None if packed is None else up_scale,
            biases=None if self.shape.biases is None else up_bias,
            gated=gated,
            expected=expected,
            deterministic=self._deterministic,
            follows=follows,
        )
        if not gated:
            programs = launched_rows(expected or rows, rows)
            hidden = self._apply(apply_gate, hidden, offsets[self.slots :], programs)
        return grouped_product(
            hidden,
            down,
            offsets,
            x.new_empty((rows, x.shape[1])),
            packed=packed,
            scales=None if packed is None else down_scale,
            biases=None if self.shape.biases is None else down_bias,
            expected=expected,
            deterministic=self._deterministic,
            follows=follows,
        )

    def addresses(self, layer: int) -> tuple[Tensor, Tensor]:
        """[slots] int64 each: where gate_up and down of a layer's experts lie."""
        gate_up, down = self._tables[:2, layer]
        return gate_up, down

    def takes_few(self, topk: int, apply_gate: Gate) -> bool:
        """Whether `FewTokens.experts` computes them, of tokens with so many choices."""
        shape = self.shape
        return (
            shape.format is None
            and shape.biases is None
            and fits(shape.hidden, shape.height // 2, topk)
            and self._is_swiglu(apply_gate)
        )

    def _apply(self, apply_gate: Gate, hidden: Tensor, rows: Tensor, programs: int) -> Tensor:
        if apply_gate not in self._clamped:
            self._clamped[apply_gate] = clamped_swiglu_of(apply_gate)
        clamped = self._clamped[apply_gate]
        if clamped is None:
            return apply_gate(hidden).contiguous()
        return clamped_swiglu(hidden, rows, *clamped, programs=programs)

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
