"""The MoE layers of a rank that holds every expert: route → experts → combine, on one GPU.

The counterpart of `flexpert.moe.runtime` without an exchange. All state that a step reads lies in
device memory of a fixed place: a captured graph goes on through any change of the experts' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.kernels.cuda.device_experts import DeviceExperts, SlotAddresses, StagedExperts
from flexpert.kernels.cuda.few_tokens import MOST_TOKENS, FewTokens
from flexpert.kernels.cuda.row_sorting import combine, sort_by_slot
from flexpert.kernels.experts import ExpertShape, Gate
from flexpert.moe.moe_layers import LayerState


@dataclass(frozen=True, slots=True)
class StagedLocalExperts:
    """slot_of: [layers, experts] int32 on the device."""

    experts: StagedExperts
    slot_of: Tensor


class LocalExperts:
    """See the module's docstring.

    Args:
        rank: the own id, which must own every expert.
        layers, experts, shape: of the model.
        deterministic: a token's sum has the same bits in any company, and those of
            `ExchangedExperts` that sum at home.

    Attributes:
        walked: layers so far, as in `MoERuntime`; a replayed step counts none.
    """

    def __init__(
        self,
        rank: int,
        layers: int,
        experts: int,
        shape: ExpertShape,
        device: torch.device,
        *,
        deterministic: bool = False,
    ) -> None:
        self.rank = rank
        self.walked = 0
        self.splits = False
        self._tokens = torch.zeros(1, dtype=torch.int32, device=device)
        self._experts = DeviceExperts(layers, experts, shape, device, deterministic=deterministic)
        self._slot_of = torch.full((layers, experts), -1, dtype=torch.int32, device=device)
        self._few = None if deterministic else FewTokens(device)

    def stage(self, layers: Sequence[LayerState[SlotAddresses]]) -> StagedLocalExperts:
        """As `ElasticMoELayers.stage`.

        Raises:
            ValueError: an expert is on another rank, or what `DeviceExperts.stage` raises.
        """
        slot_of = torch.full(self._slot_of.shape, -1, dtype=torch.int32, device="cpu")
        for index, state in enumerate(layers):
            if not bool((state.table.rank == self.rank).all()):
                raise ValueError(f"MoE layer {index} has experts on other ranks than {self.rank}")
            slot_of[index] = state.table.slot
        experts = self._experts.stage([state.experts for state in layers])
        return StagedLocalExperts(experts, slot_of.to(self._slot_of.device))

    def install(self, staged: StagedLocalExperts) -> None:
        """Use these from the next step on."""
        self._experts.install(staged.experts)
        self._slot_of.copy_(staged.slot_of, non_blocking=True)

    def lost_rows(self) -> None:
        """As `MoERuntime.lost_rows`: a rank that holds all experts loses no choice."""

    def loads(self) -> None:
        """Not counted: where one rank has all experts there is nothing to balance."""

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        """As `MoELayers.expect`."""
        self._tokens.fill_(tokens)

    def forward(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, apply_gate: Gate
    ) -> Tensor:
        """The routed experts' weighted sum; rows of padding become zero.

        Args:
            layer: index among the MoE layers.
            x: [T, hidden]; expert_ids: [T, k] int; weights: [T, k] float; all contiguous.
            apply_gate: transformers' gate of this layer, [rows, 2·inter] → [rows, inter].

        Returns:
            [T, hidden] in x's dtype.
        """
        return self._forward(layer, x, expert_ids, weights, None, apply_gate)

    def _forward(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        residual: Tensor | None,
        apply_gate: Gate,
    ) -> Tensor:
        """With a residual, as kernels that follow those which have computed what is given."""
        self.walked += 1
        out = torch.empty_like(x)
        if x.shape[0] == 0:
            return out
        experts, follows = self._experts, residual is not None
        rows = sort_by_slot(
            expert_ids, self._slot_of[layer], self._tokens, experts.slots, follows=follows
        )
        y = experts.compute(
            layer, x, rows.token, rows.offsets, len(rows.token), apply_gate, follows=follows
        )
        return combine(y, rows.row, weights, out, residual, follows=follows)

    def forward_added(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        residual: Tensor,
        apply_gate: Gate,
    ) -> Tensor | None:
        """As `AddingMoELayers.forward_added`."""
        if self._few is None:
            return None
        experts = self._experts
        if x.shape[0] > MOST_TOKENS or not experts.takes_few(expert_ids.shape[1], apply_gate):
            return self._forward(layer, x, expert_ids, weights, residual, apply_gate)
        self.walked += 1
        return self._few.experts(
            x,
            expert_ids,
            weights,
            self._slot_of[layer],
            self._tokens,
            *experts.addresses(layer),
            experts.shape.height // 2,
            residual,
        )
