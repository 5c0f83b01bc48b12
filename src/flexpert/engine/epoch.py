"""A prepared epoch: everything a rank does while serving, before it may vote for a membership."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flexpert.comm import Buffer, CommError, ExpertTable
from flexpert.engine.rank_protocol import Prepare
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import ExpertWeights
from flexpert.models.source import ModelSource
from flexpert.moe.expert_store import Key, PeerExperts, Store
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.runtime import expert_tables

Weights = dict[Key, ExpertWeights]


class Cancelled(Exception):  # noqa: N818 - a signal between two functions, never seen by users
    """The preparation was withdrawn."""


@dataclass(frozen=True, slots=True)
class PreparedEpoch:
    """Ready to switch to.

    weights: what this rank will hold. copied: how many of them are new and came from a peer's
    memory. layers is empty on a rank that leaves.
    """

    plan: Prepare
    weights: Weights
    layers: list[LayerState]
    copied: int = 0


def prepare_epoch(
    plan: Prepare,
    *,
    buffer: Buffer,
    source: ModelSource,
    held: Weights,
    store: Store,
    deterministic: bool,
    cancelled: threading.Event,
    progress: Callable[[float], None],
) -> PreparedEpoch:
    """Connect the members and load the experts this rank does not hold yet.

    Changes nothing that the running epoch uses: peers are connected but masked, and experts that
    are held stay where they are. Others come from the memory of a peer that has them, else from the
    checkpoint. Runs in its own thread; what it loads in vain it drops again.

    Raises:
        Cancelled: the event was set meanwhile.
        FlexpertError, CommError, OSError: it cannot be done.
    """
    rank = buffer.rank
    if rank not in plan.members:
        return PreparedEpoch(plan, {}, [])
    buffer.connect(plan.members)
    weights: Weights = {}
    layers: list[LayerState] = []
    loaded: list[Key] = []
    copied = 0
    desired = plan.placement.held_by(rank)
    tables: list[ExpertTable] = expert_tables(plan.placement, rank)
    exporters = _Exporters(rank, plan.exporters, store)
    try:
        for layer, experts in enumerate(desired):
            if cancelled.is_set():
                raise Cancelled
            new = [(layer, expert) for expert in experts if (layer, expert) not in held]
            loaded += new
            rest = [key for key in new if not exporters.copy(key)]
            copied += len(new) - len(rest)
            place = functools.partial(_place, store, layer)
            source.load_experts(layer, [expert for _, expert in rest], place)
            for key in rest:
                store.filled(key)
            of_layer = [held.get((layer, e)) or store.weights((layer, e)) for e in experts]
            weights.update(((layer, e), w) for e, w in zip(experts, of_layer, strict=True))
            layers.append(
                LayerState(tables[layer], LayerExperts(of_layer, deterministic=deterministic))
            )
            progress((layer + 1) / len(desired))
    except BaseException:
        store.drop(loaded)
        raise
    return PreparedEpoch(plan, weights, layers, copied)


def _place(store: Store, layer: int, expert: int) -> ExpertWeights:
    return store.weights((layer, expert))


class _Exporters:
    """The peers whose memory has experts; each is opened when it is first needed."""

    def __init__(self, rank: int, addresses: Mapping[int, bytes], store: Store) -> None:
        self._store = store
        self._addresses: Sequence[bytes] = [addresses[r] for r in sorted(addresses) if r != rank]
        self._first = rank  # several newcomers begin with different peers
        self._open: dict[bytes, PeerExperts | None] = {}

    def copy(self, key: Key) -> bool:
        """Fill the own place of an expert; False if no peer has it."""
        count = len(self._addresses)
        for step in range(count):
            peer = self._peer(self._addresses[(self._first + key[1] + step) % count])
            if peer is not None and self._store.copy(key, peer):
                return True
        return False

    def _peer(self, address: bytes) -> PeerExperts | None:
        if address not in self._open:
            try:
                self._open[address] = self._store.import_memory(address)
            except CommError:  # it ended, or it is on another machine: the checkpoint has it, too
                self._open[address] = None
        return self._open[address]
