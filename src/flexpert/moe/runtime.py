"""The MoE layers of one rank: route → dispatch → local experts → combine, in the current epoch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from flexpert.comm import Buffer, ExpertTable
from flexpert.comm.buffer import Reduce
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import Gate
from flexpert.moe.load_counter import HostLoadCounter
from flexpert.moe.load_snapshot import LoadSnapshot
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.native_layers import LayerTables, NativeLayers
from flexpert.moe.placement import Placement

SPLIT_PERIOD = 12
"""Tokens after which their distribution over replicas repeats: 1, 2, 3, 4 and 6 divide it."""


def expert_tables(
    placement: Placement, rank: int, machines: Mapping[int, str] | None = None
) -> list[ExpertTable]:
    """The routing tables of a rank under a placement, one per layer.

    machines: rank → its machine, see `Placement.owners`. Which replica a token goes to changes the
    order in which results are added only where ranks sum their own; with `reduce="home"` any
    replica gives the same bits.
    """
    tables = []
    for layer, held in enumerate(placement.held_by(rank)):
        owners, slots = placement.owners(layer, rank, machines)
        tables.append(
            ExpertTable(
                rank=torch.tensor(owners, dtype=torch.int32, device="cpu"),
                slot=torch.tensor(slots, dtype=torch.int32, device="cpu"),
                slots=len(held),
            )
        )
    return tables


@dataclass(frozen=True, slots=True)
class Route:
    """Where tokens go in one layer; see `LayerState` for `split`."""

    table: ExpertTable
    split: torch.Tensor | None = None


def replica_routes(
    placement: Placement, rank: int, machines: Mapping[int, str] | None = None
) -> list[Route]:
    """As `expert_tables`, but tokens spread over all replicas that are equally near, by their
    index: no message between ranks is needed for that. A table has further entries then, behind
    those of the experts, one for each further replica.
    """
    routes = []
    for layer, held in enumerate(placement.held_by(rank)):
        nearest = placement.nearest(layer, rank, machines)
        entries = [near[0] if near else (-1, -1) for near in nearest]
        split = None
        if max(map(len, nearest), default=0) > 1:
            split = torch.full(
                (SPLIT_PERIOD, placement.experts + 1), -1, dtype=torch.int64, device="cpu"
            )
            split[:, :-1] = torch.arange(placement.experts, dtype=torch.int64, device="cpu")
            for expert, near in enumerate(nearest):
                of = [expert, *range(len(entries), len(entries) + len(near) - 1)]
                entries += near[1:]
                for turn in range(SPLIT_PERIOD if len(near) > 1 else 0):
                    split[turn, expert] = of[turn % len(of)]
        ranks, slots = zip(*entries, strict=True)
        table = ExpertTable(
            rank=torch.tensor(ranks, dtype=torch.int32, device="cpu"),
            slot=torch.tensor(slots, dtype=torch.int32, device="cpu"),
            slots=len(held),
        )
        routes.append(Route(table, split))
    return routes


def warmup_tables(placement: Placement, rank: int) -> list[ExpertTable]:
    """Tables that keep every token at home, on whichever local expert: to warm up alone.

    A layer without local experts gets a table that owns nothing; give it tokens without experts.
    """
    tables = []
    for held in placement.held_by(rank):
        local = torch.arange(placement.experts, dtype=torch.int32, device="cpu")
        tables.append(
            ExpertTable(
                rank=torch.full_like(local, rank if held else -1),
                slot=local % len(held) if held else torch.full_like(local, -1),
                slots=len(held),
            )
        )
    return tables


def without(
    absent: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token's choices without the absent experts; its other weights keep the whole sum.

    Args:
        absent: [experts] bool.
        expert_ids: [tokens, k] int, -1 = none. weights: [tokens, k] float32, not negative.

    Returns:
        expert_ids with -1 in place of absent ones; weights, 0 there (all of them where no choice is
        left); [tokens] bool, which tokens lost a choice.
    """
    lost = absent[expert_ids] & (expert_ids >= 0)
    left = weights.masked_fill(lost, 0.0)
    rest = left.sum(1, keepdim=True)
    # divided first: however small the rest, no factor is beyond what a float holds
    scaled = torch.where(rest > 0, left / rest * weights.sum(1, keepdim=True), left)
    rows = lost.any(1)
    return (
        expert_ids.masked_fill(lost, -1),
        torch.where(rows.unsqueeze(1), scaled, weights),
        rows,
    )


@dataclass(frozen=True, slots=True)
class StagedLayers:
    """absent: layer → [experts] bool, which experts nobody holds, where there are any. tables: the
    same layers for C, which leaves those to Python."""

    layers: tuple[LayerState[LayerExperts], ...]
    absent: Mapping[int, torch.Tensor]
    tables: LayerTables


class MoERuntime:
    """Walks the exchanges of each layer; the layers' state is swapped whole at a commit.

    Where nobody holds an expert, tokens go on with their other choices, and `lost_rows` tells
    which. Tokens spread over the replicas of an expert. `forward` computes a layer; while `native`
    is entered C does so, as far as all is as usual.
    """

    def __init__(
        self, buffer: Buffer, *, reduce: Reduce, layers: int = 0, experts: int = 0
    ) -> None:
        """layers, experts: of the model, for `loads`; 0: nothing is counted."""
        self.buffer = buffer
        self.reduce: Reduce = reduce
        self.splits = True
        self._walked = 0
        tokens = torch.arange(buffer.spec.max_tokens, dtype=torch.int64, device="cpu")
        self._turns = tokens[:, None] % SPLIT_PERIOD
        self._counter = HostLoadCounter(layers, experts) if layers else None
        self._native = NativeLayers(buffer, reduce)
        self._lost: torch.Tensor | None = None
        self.install(self.stage([]))

    @property
    def walked(self) -> int:
        """Layers so far."""
        return self._walked + int(self._native.step.walked)

    def native(self) -> AbstractContextManager[int]:
        """See `NativeMoELayers`."""
        return self._native

    def stage(self, layers: Sequence[LayerState[LayerExperts]]) -> StagedLayers:
        """As `ElasticMoELayers.stage`."""
        absent = {}
        for index, state in enumerate(layers):
            experts = None if state.split is None else state.split.shape[1] - 1
            absent[index] = state.table.rank[:experts] < 0
        missing = {index: mask for index, mask in absent.items() if bool(mask.any())}
        tables = LayerTables(layers, left=missing, counter=self._counter)
        return StagedLayers(tuple(layers), missing, tables)

    def install(self, staged: StagedLayers) -> None:
        """Use these layers from the next step on."""
        self._staged = staged
        self._native.install(staged.tables)
        self._lost = None

    def lost_rows(self) -> torch.Tensor | None:
        """[tokens] bool: which tokens of the step lost a choice in any layer; None: none was
        missing. To be asked after each step with tokens; `install` forgets one that broke off.
        """
        lost, self._lost = self._lost, None
        return lost

    def loads(self) -> LoadSnapshot | None:
        """As `ElasticMoELayers.loads`."""
        if self._counter is None:
            return None
        counted = self._counter.snapshot()
        spent_s = counted.compute_s + self._native.step.compute_ns / 1e9
        return replace(counted, compute_s=spent_s)

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        """Nothing: batches come without padding."""

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        apply_gate: Gate,
    ) -> torch.Tensor:
        """The routed experts' weighted sum for this rank's tokens; serves the peers' on the way.

        Args:
            layer: index among the MoE layers.
            x: [tokens, hidden]; tokens may be 0, the exchanges are walked all the same.
            expert_ids: [tokens, k] int, weights: [tokens, k] of any float dtype.
            apply_gate: transformers' gate of this layer, [rows, 2·inter] → [rows, inter].

        Returns:
            [tokens, hidden] in x's dtype.
        """
        state = self._staged.layers[layer]
        absent = self._staged.absent.get(layer)
        weights = weights.float()
        self._walked += 1
        if absent is not None and x.shape[0]:
            expert_ids, weights, lost = without(absent, expert_ids, weights)
            self._lost = lost if self._lost is None else self._lost | lost
        counter = self._counter
        if counter and x.shape[0]:
            counter.count(layer, expert_ids, holes=absent is not None)
        if state.split is not None and x.shape[0]:
            expert_ids = state.split[self._turns[: x.shape[0]], expert_ids]
        received = self.buffer.dispatch(x, expert_ids, weights, state.table)
        began = time.perf_counter()
        # where peers read it, if there are any
        out = self.buffer.combine_input(received) if len(self.buffer.active) > 1 else None
        y = state.experts.compute(received.x, received.offsets, apply_gate, out)
        if counter:
            counter.compute_s += time.perf_counter() - began
        return self.buffer.combine(y, received, reduce=self.reduce)
