"""The coordinator: the only one who decides an epoch. Everything runs on the head's event loop.

How a change goes: somebody asks (`operations.py`), or a rank reports or exits (`rank_reports.py`),
or a deadline passes (`phase_clock.py`). Each is an event. Here one event after the other is looked
up in its table (`reconciliation.py`: what begins next; `membership.py`: the change under way), and
what the table says is carried out (`reconciler.py`, `change_actions.py`): messages to ranks,
processes started and killed. Events that this causes come behind those that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flexpert.cluster.availability import Availability
from flexpert.cluster.balancer import Balancer
from flexpert.cluster.change_actions import ChangeActions
from flexpert.cluster.cluster_state import ClusterState, CoordinatorEvent
from flexpert.cluster.event_queue import EventQueue
from flexpert.cluster.interfaces import HeadInterface
from flexpert.cluster.membership import EventKind, Phase
from flexpert.cluster.memory_budget import MemoryBudget
from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.operations import Operations
from flexpert.cluster.phase_clock import PhaseClock
from flexpert.cluster.rank_reports import RankReports
from flexpert.cluster.reconciler import Reconciler
from flexpert.cluster.reconciliation import ActivityEvent, ActivityKind
from flexpert.cluster.resumption import restore
from flexpert.cluster.saved_state import SavedCluster, SavedOperation
from flexpert.cluster.sequence_trace import TracedChange
from flexpert.cluster.served_model import ServedModel
from flexpert.cluster.views import (
    BalanceView,
    ChangePreview,
    GoneRank,
    LayerPlacement,
    LiveLoad,
    OperationView,
    PlacementView,
    RankView,
    RebalanceView,
)
from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.errors import RequestError
from flexpert.moe.placement import Placement


class Coordinator:
    """Its parts put together, and what others may know of the cluster."""

    def __init__(
        self,
        config: Config,
        model: ServedModel,
        head: HeadInterface,
        memory_budget: MemoryBudget | None = None,
    ) -> None:
        self._model = model
        budget = memory_budget or MemoryBudget(config, model)
        cluster = ClusterState(config, model, head, budget, EventQueue(self._handle))
        self._cluster = cluster
        self._clock = PhaseClock(cluster)
        self._operations = Operations(cluster)
        self._reports = RankReports(cluster)
        self._reconciler = Reconciler(cluster, self._operations, self._clock)
        self._balancer = Balancer(cluster)
        self._actions = ChangeActions(cluster, self._operations, self._clock, self._reconciler)
        self._placement_view: tuple[Placement | None, int, PlacementView] | None = None

    def _handle(self, event: CoordinatorEvent) -> None:
        """Look the rule up and carry it out."""
        if isinstance(event, ActivityEvent):
            self._reconciler.carry_out(self._cluster.reconciliation.handle(event), event)
            return
        membership = self._cluster.membership
        begins = event.kind is EventKind.BEGIN
        actions = membership.begin(event.target) if begins else membership.handle(event)
        if actions:
            self._cluster.save(urgent=True)
        self._actions.carry_out(actions, event)
        if actions:
            self._cluster.save()

    # ---- what happens -----------------------------------------------------------------------

    def on_report(self, rank: int, report: msg.Report) -> None:
        """Raises: Contradiction: it cannot be true."""
        self._reports.on_report(rank, report)

    def on_disconnected(self, rank: int) -> None:
        """A rank's connection has ended by itself, unasked or not."""
        self._reports.on_disconnected(rank)

    def on_exit(self, rank: int, status: int, why: str = "") -> None:
        """A rank's process is certainly gone. why: what is known beyond the status."""
        self._reports.on_exit(rank, status, why)

    def expel(self, rank: int, why: str) -> None:
        """A rank cannot be understood: it is terminated, an ordinary loss. why: a predicate."""
        self._cluster.watch.terminate([rank], why)

    def close(self) -> None:
        """Nothing begins by itself any more."""
        self._cluster.events.post(ActivityEvent(ActivityKind.CLOSE))
        self._cluster.watch.close()
        self._balancer.close()
        self._clock.stop()
        self._reconciler.close()

    # ---- operations -------------------------------------------------------------------------

    def begin_first(self, ranks: int) -> OperationView | None:
        """The change from nothing to the service's first ranks; None: there are none, and requests
        wait for hosts that join."""
        self._cluster.watch.start()
        self._balancer.start()
        if ranks == 0:
            self._reconciler.wait_for_hosts()
            return None
        return self._operations.begin_first(ranks)

    def restore(
        self,
        record: SavedCluster,
        operations: Iterable[SavedOperation],
        living: Mapping[int, msg.Hello],
    ) -> None:
        """See `resumption.restore`."""
        self._cluster.watch.start()
        self._balancer.start()
        restore(self._cluster, self._operations, record, operations, living)

    def save_all(self) -> list[SavedOperation]:
        """Write the membership down, and return the operations for that."""
        self._cluster.save(urgent=True)
        return self._operations.records()

    def begin(
        self,
        *,
        ranks: int | None = None,
        add: int = 0,
        remove: Sequence[int] = (),
        join: Sequence[int] = (),
        operation_id: str | None = None,
    ) -> OperationView:
        """See `Operations.begin`. Raises: OperationRefused, OperationConflict"""
        request = TargetRequest(ranks, add, tuple(sorted(remove)), tuple(join))
        return self._operations.begin(request, operation_id)

    def rebalance(self, operation_id: str | None = None) -> OperationView:
        """See `Operations.rebalance`. Raises: OperationRefused, OperationConflict"""
        return self._operations.rebalance(self._balancer.request, operation_id)

    def newcomers(self, *, ranks: int | None, add: int, remove: Sequence[int]) -> frozenset[int]:
        """Who would join if this change began now. Raises: OperationRefused"""
        return self._operations.newcomers(ranks=ranks, add=add, remove=remove)

    def leave_to_host(self, rank: int) -> None:
        """The rank's process is another host's: if it is lost, it is not started again here."""
        self._cluster.restart_policy.leave_to_host(rank)

    @property
    def idle(self) -> bool:
        """Whether a change could begin now."""
        cluster = self._cluster
        able = not self.down or cluster.availability.state is Availability.WAITING
        return able and cluster.operation is None and cluster.queued is None

    def repeated(self, operation_id: str, request: TargetRequest) -> OperationView | None:
        """See `Operations.repeated`. Raises: OperationConflict"""
        return self._operations.repeated(operation_id, request)

    @property
    def latest_request(self) -> OperationView | None:
        """The latest change that somebody asked for."""
        return self._operations.latest_request

    def cancel(self, operation_id: str) -> OperationView:
        """See `Operations.cancel`. Raises: UnknownOperation, OperationConflict"""
        return self._operations.cancel(operation_id)

    def operation(self, operation_id: str) -> Operation:
        """Raises UnknownOperation."""
        return self._operations.get(operation_id)

    def unfinished(self) -> list[Operation]:
        """Operations that are not over."""
        return self._operations.unfinished()

    # ---- what it knows ----------------------------------------------------------------------

    def balance(self) -> BalanceView:
        """How even the load of experts is."""
        return self._balancer.view()

    def proposed_rebalance(self) -> RebalanceView:
        """What a rebalance would do."""
        balancer = self._balancer
        plan, loads = balancer.proposal(), balancer.loads()
        totals = np.maximum(loads.sum(axis=1, keepdims=True), 1e-9)
        shares = [[round(one, 6) for one in layer] for layer in (loads / totals).tolist()]
        if plan is None:
            return RebalanceView(balance=balancer.view(), expert_loads=shares)
        return RebalanceView(
            balance=balancer.view(),
            moves=plan.moves,
            before=round(plan.recent.before, 6),
            after=round(plan.recent.after, 6),
            cost_s=round(plan.cost_s, 6),
            expert_loads=shares,
        )

    def preview(self, *, ranks: int | None, add: int, remove: Sequence[int]) -> ChangePreview:
        """See `Operations.preview`. Raises: OperationRefused, OperationConflict"""
        return self._operations.preview(TargetRequest(ranks, add, tuple(sorted(remove))))

    def preview_rebalance(self) -> ChangePreview:
        """What a rebalance would move. Raises: OperationConflict"""
        plan = self._balancer.proposal()
        return self._operations.preview_rebalance(plan.after if plan else None)

    @property
    def operations(self) -> list[OperationView]:
        """The latest, oldest first."""
        return self._operations.latest

    def live_load(self) -> LiveLoad:
        """What the ranks have to do."""
        found = self._cluster.ranks.values()
        return LiveLoad(
            sum(rank.load.running for rank in found),
            sum(rank.load.waiting for rank in found),
            sum(rank.state == "active" for rank in found),
        )

    def layer_placement(self, layer: int) -> LayerPlacement:
        """Raises: RequestError: there is no such layer."""
        layers, placement = self._model.moe_layers, self._cluster.placement
        if not 0 <= layer < layers:
            raise RequestError(f"layer {layer}: there are MoE layers 0 to {layers - 1}")
        held = placement.layers[layer] if placement else {}
        return LayerPlacement(
            epoch=self.epoch,
            layer=layer,
            layers=layers,
            experts=self._model.experts,
            held={rank: held[rank] for rank in sorted(held)},
            loads=self._loads_of(layer),
        )

    def _loads_of(self, layer: int) -> list[float] | None:
        choices = self._balancer.loads()[layer]
        total = float(choices.sum())
        return [round(one, 6) for one in (choices / total).tolist()] if total else None

    @property
    def epoch(self) -> int:
        return self._cluster.membership.epoch

    @property
    def members(self) -> frozenset[int]:
        return self._cluster.members

    @property
    def verdicts(self) -> bytes:
        """What the first rank that came up found of the model's modules; b"": none did yet."""
        return self._cluster.verdicts

    @property
    def admitting(self) -> frozenset[int]:
        """Ids that may be given new sequences: members that are not on their way out."""
        return self._cluster.admitting

    @property
    def running(self) -> OperationView | None:
        operation = self._cluster.operation
        return operation.view() if operation else None

    def running_change(self) -> TracedChange | None:
        """As little of it as traces have."""
        operation = self._cluster.operation
        return TracedChange(operation.id, operation.purpose.value) if operation else None

    @property
    def desired(self) -> frozenset[int]:
        """The ids that the last change that was asked for left active."""
        return self._cluster.restart_policy.desired

    @property
    def left_out(self) -> frozenset[int]:
        """Desired ids that kept exiting and are not started again."""
        return self._cluster.restart_policy.left_out

    @property
    def down(self) -> str | None:
        """Why nothing is computed now and requests wait, or None."""
        return self._cluster.availability.down

    def ranks(self) -> list[RankView]:
        cluster = self._cluster
        safe = cluster.dispensable
        return [
            cluster.ranks[rank].view(cluster.placement, safe_to_delete=rank in safe)
            for rank in sorted(cluster.ranks)
        ]

    def gone(self) -> list[GoneRank]:
        """The latest ranks that have ended, oldest first."""
        return list(self._cluster.gone)

    @property
    def recovering(self) -> bool:
        """Whether no step is taken because an epoch without lost ranks is entered."""
        return self._cluster.membership.phase in (Phase.RECOVER, Phase.LOST)

    def memory(self, rank: int) -> tuple[msg.Memory | None, msg.Memory | None]:
        """What a rank plans to use, in parts: (of the host, of the GPU)."""
        found = self._cluster.ranks.get(rank)
        return (found.memory, found.device_memory) if found else (None, None)

    def placement(self) -> PlacementView:
        """Counted once for each placement: who watches looks every second, and 60 layers of 256
        experts take 3 ms."""
        placement, asked_for = self._cluster.placement, len(self.desired | self.members)
        known = self._placement_view
        if known is None or known[0] is not placement or known[1] != asked_for:
            known = (placement, asked_for, self._counted(placement, asked_for))
            self._placement_view = known
        return known[2]

    def _counted(self, placement: Placement | None, asked_for: int) -> PlacementView:
        model, recovery = self._model, self._cluster.expert_recovery
        counts = {str(rank): placement.count(rank) for rank in placement.ranks} if placement else {}
        return PlacementView(
            layers=model.moe_layers,
            experts=model.experts,
            replicas=sum(counts.values()),
            experts_per_rank=counts,
            missing_experts=len(placement.missing()) if placement else 0,
            under_replicated_experts=(
                recovery.under_replicated(placement, asked_for) if placement else 0
            ),
        )
