"""A prepared epoch: everything a rank does beside serving before it may vote for a membership."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flexpert.comm import Buffer, ExpertTable
from flexpert.models.source import ModelSource
from flexpert.moe.experts import ExpertWeights, LayerExperts
from flexpert.moe.placement import Placement
from flexpert.moe.runtime import LayerState, expert_tables

Weights = dict[tuple[int, int], ExpertWeights]


class Cancelled(Exception):  # noqa: N818 - a signal between two functions, never seen by users
    """The preparation was withdrawn."""


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """What the coordinator wants next. members: rank id → address of its window."""

    epoch: int
    members: Mapping[int, bytes]
    placement: Placement


@dataclass(frozen=True, slots=True)
class PreparedEpoch:
    """Ready to switch to. weights: what this rank will hold; loaded: how many of them are new.

    layers is empty on a rank that leaves.
    """

    plan: EpochPlan
    weights: Weights
    layers: list[LayerState]
    loaded: int

    @property
    def expert_bytes(self) -> int:
        return sum(weights.nbytes for weights in self.weights.values())


def prepare_epoch(
    plan: EpochPlan,
    *,
    buffer: Buffer,
    source: ModelSource,
    held: Weights,
    deterministic: bool,
    cancelled: threading.Event,
    progress: Callable[[float], None],
) -> PreparedEpoch:
    """Connect the members and load the experts this rank does not hold yet.

    Changes nothing that the running epoch uses: peers are connected but masked, and experts that
    are held stay where they are. Runs in its own thread.

    Raises:
        Cancelled: the event was set meanwhile.
        FlexpertError, CommError, OSError: it cannot be done.
    """
    rank = buffer.rank
    if rank not in plan.members:
        return PreparedEpoch(plan, {}, [], 0)
    buffer.connect(plan.members)
    weights: Weights = {}
    layers: list[LayerState] = []
    loaded = 0
    wanted = plan.placement.held_by(rank)
    tables: list[ExpertTable] = expert_tables(plan.placement, rank)
    for layer, experts in enumerate(wanted):
        if cancelled.is_set():
            raise Cancelled
        new = [expert for expert in experts if (layer, expert) not in held]
        fresh = source.load_experts(layer, new) if new else {}
        loaded += len(new)
        of_layer = [held.get((layer, e)) or fresh[e] for e in experts]
        weights.update(((layer, e), w) for e, w in zip(experts, of_layer, strict=True))
        layers.append(
            LayerState(tables[layer], LayerExperts(of_layer, deterministic=deterministic))
        )
        progress((layer + 1) / len(wanted))
    return PreparedEpoch(plan, weights, layers, loaded)
