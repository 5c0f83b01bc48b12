"""The MoE layers of one GPU rank among several: route → dispatch → local experts → combine.

The counterpart of `flexpert.moe.runtime` for a buffer whose rows stay where they arrived on the
GPU. All state that a step reads lies in device memory of a fixed place, with as many slots as the
model has experts: a captured graph goes on through joins, leaves and moves of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flexpert.comm import ExpertTable
from flexpert.comm.buffer import Reduce
from flexpert.kernels.cuda.device_experts import DeviceExperts, SlotAddresses, StagedExperts
from flexpert.kernels.experts import ExpertShape, Gate
from flexpert.moe.load_counter import DeviceLoadCounter
from flexpert.moe.load_snapshot import LoadSnapshot
from flexpert.moe.moe_layers import LayerState


class IndexedRows(Protocol):
    """Where the rows of a dispatch lie, without waiting for the device.

    offsets: [slots + 1] int32. rows: [most rows] int32, of payload. payload: [any, hidden].
    """

    @property
    def offsets(self) -> Tensor: ...
    @property
    def rows(self) -> Tensor: ...
    @property
    def payload(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StagedExchangedExperts:
    """places: [2, layers, experts] int32 on the device: the owner of each expert, its slot."""

    experts: StagedExperts
    places: Tensor


class ExchangedExperts:
    """See the module's docstring.

    Args:
        buffer: a `Buffer` whose `Received` has `indexed`, an `IndexedRows`.
        layers, experts, shape: of the model.
        deterministic: a token's sum has the same bits in any company and placement: results come
            back for each choice, and are summed at home.

    Attributes:
        walked: layers so far, as in `MoERuntime`; a replayed step counts none.
    """

    def __init__(
        self,
        buffer: Any,
        layers: int,
        experts: int,
        shape: ExpertShape,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        self.buffer = buffer
        self.reduce: Reduce = "home" if deterministic else "rank"
        self.walked = 0
        self.splits = False
        self._experts = DeviceExperts(layers, experts, shape, device, deterministic=deterministic)
        self._counter = DeviceLoadCounter(layers, experts, device)
        self._places = torch.full((2, layers, experts), -1, dtype=torch.int32, device=device)
        self._tables = [
            ExpertTable(rank=self._places[0, layer], slot=self._places[1, layer], slots=experts)
            for layer in range(layers)
        ]
        self._row = torch.arange(buffer.spec.max_tokens, dtype=torch.int32, device=device)[:, None]
        self._mean_tokens = 0
        self._padding = torch.ones_like(self._row, dtype=torch.bool)  # rows that do not count

    def stage(self, layers: Sequence[LayerState[SlotAddresses]]) -> StagedExchangedExperts:
        """As `ElasticMoELayers.stage`. Raises: ValueError: what `DeviceExperts.stage` raises."""
        places = torch.full(self._places.shape, -1, dtype=torch.int32, device="cpu")
        for index, state in enumerate(layers):
            places[0, index], places[1, index] = state.table.rank, state.table.slot
        experts = self._experts.stage([state.experts for state in layers])
        return StagedExchangedExperts(experts, places.to(self._places.device))

    def install(self, staged: StagedExchangedExperts) -> None:
        """Use these from the next step on."""
        self._experts.install(staged.experts)
        self._places.copy_(staged.places, non_blocking=True)

    def lost_rows(self) -> None:
        """Not told: where nobody holds an expert, the buffer skips it."""

    def loads(self) -> LoadSnapshot:
        """As `ElasticMoELayers.loads`."""
        return self._counter.snapshot()

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        """As `MoELayers.expect`."""
        self._mean_tokens = mean_tokens
        torch.ge(self._row, tokens, out=self._padding)

    def forward(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, apply_gate: Gate
    ) -> Tensor:
        """The routed experts' weighted sum for this rank's tokens; serves the peers' on the way.

        Args:
            layer: index among the MoE layers.
            x: [T, hidden]; expert_ids: [T, k] int; weights: [T, k] float; all contiguous. T may be
                0, the exchanges are walked all the same.
            apply_gate: transformers' gate of this layer, [rows, 2·inter] → [rows, inter].

        Returns:
            [T, hidden] in x's dtype.
        """
        self.walked += 1
        expert_ids = expert_ids.masked_fill(self._padding[: x.shape[0]], -1)
        self._counter.count(layer, expert_ids)
        received = self.buffer.dispatch(x, expert_ids, weights.float(), self._tables[layer])
        expected = max(x.shape[0], self._mean_tokens) * expert_ids.shape[1]
        y = self.compute(layer, received.indexed, apply_gate, expected)
        result: Tensor = self.buffer.combine(y, received, reduce=self.reduce)
        return result

    def compute(self, layer: int, rows: IndexedRows, apply_gate: Gate, expected: int) -> Tensor:
        """[most rows, hidden]: each row that arrived through its expert.

        expected: about how many there are: as many as this rank sends, or all ranks on average.
        """
        return self._experts.compute(
            layer,
            rows.payload,
            rows.rows,
            rows.offsets,
            rows.rows.shape[0],
            apply_gate,
            max(1, expected),
        )
