"""A prepared epoch: everything a rank does while serving, before it may vote for a membership."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from flexpert.comm import Buffer
from flexpert.engine.rank_protocol import Prepare
from flexpert.engine.remote_peers import RemotePeers
from flexpert.engine.stopwatch import Stopwatch
from flexpert.moe.expert_store import ExpertFiles, ExpertLoad, Key, Pacer, Store
from flexpert.moe.moe_layers import ElasticMoELayers, LayerState
from flexpert.moe.runtime import Route, expert_tables, replica_routes


class Cancelled(Exception):  # noqa: N818 - a signal between two functions, never seen by users
    """The preparation was withdrawn."""


@dataclass(frozen=True, slots=True)
class PreparedEpoch:
    """Ready to switch to.

    experts: what this rank will hold. layers: as the store has them, empty on a rank that leaves.
    staged: the same for `ElasticMoELayers.install`. copied: how many of the experts are new and
    came from a peer's memory. watch: how long the parts took.
    """

    plan: Prepare
    experts: frozenset[Key]
    layers: list[LayerState[Any]]
    staged: Any
    copied: int = 0
    watch: Stopwatch = field(default_factory=Stopwatch)


def neighbours(plan: Prepare, rank: int) -> tuple[dict[int, bytes], list[int]]:
    """(members on this rank's machine and their addresses, the others)."""
    own = plan.machines.get(rank, "")
    far = [other for other in sorted(plan.members) if plan.machines.get(other, own) != own]
    return {r: address for r, address in plan.members.items() if r not in far}, far


def prepare_epoch(
    plan: Prepare,
    *,
    buffer: Buffer,
    files: ExpertFiles,
    held: Collection[Key],
    store: Store,
    moe: ElasticMoELayers,
    remote: RemotePeers,
    cancelled: threading.Event,
    progress: Callable[[float], None],
) -> PreparedEpoch:
    """Connect the members and load the experts this rank does not hold yet.

    Changes nothing that the running epoch uses: peers are connected but masked, and experts that
    are held stay where they are. Others come from the memory of a peer that has them, else from
    `files`. A rank that leaves only meets those that will read its memory over NIXL. Runs in its
    own thread; what it loads in vain it drops again. What it launches on the calling thread's
    stream must be waited for.

    Raises:
        Cancelled: the event was set meanwhile.
        FlexpertError, CommError, OSError: it cannot be done.
    """
    rank = buffer.rank
    if rank not in plan.members:
        remote.meet(plan, cancelled)
        return PreparedEpoch(plan, frozenset(), [], moe.stage([]))
    watch = Stopwatch()
    near, far = neighbours(plan, rank)
    buffer.connect(near)
    if far:
        buffer.connect(far)  # they do the same; each pair meets
    remote.meet(plan, cancelled)
    watch.lap("connect")
    progress(0.0)
    desired = plan.placement.held_by(rank)
    keys = [(layer, expert) for layer, experts in enumerate(desired) for expert in experts]
    new = [key for key in keys if key not in held]

    def check() -> None:
        if cancelled.is_set():
            raise Cancelled

    try:
        check()
        distant = remote.experts(plan, cancelled.is_set)
        exporters = {r: a for r, a in plan.exporters.items() if not remote.is_far(r)}
        pace = Pacer(plan.bandwidth, cancelled) if plan.bandwidth else None
        load = ExpertLoad(new, exporters, files, check, progress, distant, pace)
        copied = store.load(load) if new else 0
        watch.lap("experts")
        if pace:
            watch.laps["held back"] = pace.held_s
        if moe.splits:
            routes = replica_routes(plan.placement, rank, plan.machines)
        else:
            routes = [Route(t) for t in expert_tables(plan.placement, rank, plan.machines)]
        layers = [
            LayerState(routes[layer].table, store.layer(layer, experts), routes[layer].split)
            for layer, experts in enumerate(desired)
        ]
        staged = moe.stage(layers)
        watch.lap("stage")
        progress(1.0)
    except BaseException:
        store.drop(new)
        raise
    return PreparedEpoch(plan, frozenset(keys), layers, staged, copied, watch)
