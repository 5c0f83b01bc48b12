"""Operations: what people ask for, and the record of every change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from flexpert.cluster.availability import Availability
from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.formatting import describe_change
from flexpert.cluster.membership import EventKind, MembershipEvent, Phase
from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.reconciliation import Activity, ActivityEvent, ActivityKind
from flexpert.cluster.saved_state import Purpose, SavedOperation
from flexpert.cluster.views import ChangePreview, OperationView
from flexpert.errors import OperationConflict, OperationRefused, UnknownOperation
from flexpert.moe.placement import Placement, loads

log = logging.getLogger("flexpert")

_KEPT_OPERATIONS = 256


class Operations:
    """The latest changes by id, and how one begins.

    What somebody asks for becomes an event of `reconciliation.ACTIVITY_RULES`.
    """

    def __init__(self, cluster: ClusterState) -> None:
        self._cluster = cluster
        self._operations: dict[str, Operation] = {}

    # ---- asked for --------------------------------------------------------------------------

    def begin(self, request: TargetRequest, operation_id: str | None = None) -> OperationView:
        """Start a change, or return the running one with the same target.

        One that the head began by itself makes way: it is withdrawn if it can be, and this one
        begins after it.

        operation_id: the caller's own. What has it already, running or over, is returned; if there
        is none, a change of this id begins, and none of another id is taken for it.

        Raises:
            OperationRefused: it can never be reached. OperationConflict: another one runs, or was
            asked for with this id.
        """
        cluster = self._cluster
        if operation_id is not None:
            found = self.repeated(operation_id, request)
            if found is not None:
                return found
        self._check_open()
        running = cluster.operation
        if running is None:
            target = self._resolve(request, cluster.members)
            return self._begin(target, request, operation_id).view()
        if cluster.queued is not None:
            running, queued = cluster.queued
            if queued == request and operation_id is None:
                return running.view()
        elif running.purpose is Purpose.REBALANCE:
            target = self._resolve(request, cluster.members)
            if target == cluster.members:  # nothing to wait for
                return self._begin(target, request, operation_id).view()
            return self._queue(request, operation_id).view()
        elif running.automatic:
            if operation_id is not None or not self._same_target(running, request):
                return self._queue(request, operation_id).view()
            cluster.memory_budget.check((), cluster.plan(running.after), cluster.placement)
            cluster.restart_policy.set_desired(running.after)
            cluster.save(urgent=True)
            return running.view()
        elif operation_id is None and self._same_target(running, request):
            return running.view()
        raise OperationConflict(
            f"operation {running.id} to ranks {sorted(running.after)} is running; "
            "wait for it or cancel it"
        )

    def rebalance(
        self, begin: Callable[[Operation], None], operation_id: str | None = None
    ) -> OperationView:
        """Move experts between the ranks that there are, as their load asks for; any other change
        goes before it.

        begin: what moves where; posts the event, or ends the operation.

        Raises:
            OperationRefused: there is no memory for it. OperationConflict: another change runs or
            is due, or was asked for with this id.
        """
        cluster, request = self._cluster, TargetRequest(None, 0, (), rebalance=True)
        if operation_id is not None and (found := self.repeated(operation_id, request)):
            return found
        self._check_open()
        if cluster.availability.down is not None:
            raise OperationRefused(f"no step is taken now: {cluster.availability.down}")
        if cluster.reconciliation.state is not Activity.IDLE or cluster.operation:
            running = cluster.operation
            if running and running.request == request and operation_id is None:
                return running.view()
            which = f"operation {running.id} is running" if running else "a restart is due"
            raise OperationConflict(f"{which}, and experts move only when nothing else does")
        members, epoch = cluster.members, cluster.membership.epoch
        operation = Operation(
            members,
            members,
            epoch,
            "asked for",
            Purpose.REBALANCE,
            request=request,
            operation_id=operation_id,
        )
        begin(operation)
        if operation.over.is_set():
            self.remember(operation)
        return operation.view()

    def repeated(self, operation_id: str, request: TargetRequest) -> OperationView | None:
        """What was asked for with this id before; None: nothing, as far as is known.

        Raises: OperationConflict: it was something else.
        """
        found = self._operations.get(operation_id)
        if found is None:
            return None
        if found.request != request:
            asked = f"asked for with another target ({found.request})"
            how = asked if found.request else "begun by the head itself"
            raise OperationConflict(
                f"operation {operation_id} was {how}, and is {found.state}; "
                "another change needs another operation_id"
            )
        return found.view()

    @property
    def latest_request(self) -> OperationView | None:
        """The latest change that somebody asked for."""
        asked = [found for found in self._operations.values() if not found.automatic]
        return asked[-1].view() if asked else None

    def newcomers(self, *, ranks: int | None, add: int, remove: Sequence[int]) -> frozenset[int]:
        """Who would join if this change began now. Raises: OperationRefused"""
        members = self._cluster.members
        return self._resolve(TargetRequest(ranks, add, tuple(remove)), members) - members

    def preview(self, request: TargetRequest) -> ChangePreview:
        """What a change would move if it began now.

        Raises: as `begin`.
        """
        cluster = self._cluster
        self._check_open()
        members = cluster.members
        target = self._resolve(request, members)
        self._check_free()
        if target == members:
            return ChangePreview(target=sorted(target), add=[], remove=[])
        return self._preview(target, self._planned(target))

    def preview_rebalance(self, after: Placement | None) -> ChangePreview:
        """What a rebalance to that placement would move; None: there is nothing to move.

        Raises: OperationRefused, OperationConflict
        """
        self._check_open()
        self._check_free()
        members = self._cluster.members
        if after is None:
            return ChangePreview(target=sorted(members), add=[], remove=[])
        return self._preview(members, after)

    def _check_free(self) -> None:
        running = self._cluster.operation
        if running is not None and not running.automatic:
            raise OperationConflict(
                f"operation {running.id} to ranks {sorted(running.after)} is running; what follows "
                "it can be said when it is over"
            )

    def _preview(self, target: frozenset[int], placement: Placement) -> ChangePreview:
        cluster, members = self._cluster, self._cluster.members
        leavers = sorted(members - target)
        found = {rank: cluster.ranks[rank].load for rank in leavers if rank in cluster.ranks}
        moves = loads(cluster.placement, placement)
        moved = sum(map(len, moves.values()))
        return ChangePreview(
            target=sorted(target),
            add=sorted(target - members),
            remove=leavers,
            moved_experts=moved,
            moved_bytes=moved * cluster.memory_budget.expert_bytes,
            experts_to_load={rank: len(which) for rank, which in moves.items() if which},
            moved_requests=sum(load.running + load.waiting for load in found.values()),
            kv_used={rank: round(load.kv_used, 4) for rank, load in found.items()},
        )

    @property
    def latest(self) -> list[OperationView]:
        """All that are kept, oldest first."""
        found = sorted(self._operations.values(), key=lambda operation: operation.created)
        return [operation.view() for operation in found]

    def begin_first(self, ranks: int) -> OperationView:
        """The change from nothing to the service's first ranks."""
        request = TargetRequest(ranks, 0, ())
        return self._begin(frozenset(range(ranks)), request, None).view()

    def cancel(self, operation_id: str) -> OperationView:
        """Withdraw a change that has not begun to commit.

        Raises:
            UnknownOperation, OperationConflict
        """
        cluster, operation = self._cluster, self.get(operation_id)
        if operation.over.is_set():
            raise OperationConflict(f"operation {operation.id} is over: {operation.state}")
        if cluster.queued and operation is cluster.queued[0]:
            purpose = cluster.operation.purpose if cluster.operation else None
            cluster.events.post(ActivityEvent(ActivityKind.CANCEL_QUEUED, purpose=purpose))
        elif cluster.membership.phase in (Phase.SPAWN, Phase.LOAD, Phase.MIGRATE):
            cluster.events.post(MembershipEvent(EventKind.CANCEL, reason="cancelled"))
        else:
            raise OperationConflict(
                f"operation {operation.id} is in phase {operation.phase} and cannot be withdrawn"
            )
        return operation.view()

    def get(self, operation_id: str) -> Operation:
        """Raises UnknownOperation."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise UnknownOperation(
                f"no operation {operation_id!r}; the last {_KEPT_OPERATIONS} that were asked for "
                "are kept"
            ) from None

    def unfinished(self) -> list[Operation]:
        """Those that are not over."""
        return [found for found in self._operations.values() if not found.over.is_set()]

    def _check_open(self) -> None:
        cluster = self._cluster
        down = cluster.availability.down
        restarts = down and cluster.availability.state is not Availability.WAITING
        if cluster.membership.phase is Phase.LOST or (restarts and not cluster.members):
            raise OperationRefused(f"all ranks are lost and start again: {down}")
        if cluster.reconciliation.state is Activity.CLOSED:
            raise OperationRefused("the service is stopping")

    def _begin(
        self, target: frozenset[int], request: TargetRequest, operation_id: str | None
    ) -> Operation:
        operation = self._requested(target, request, operation_id)
        placement = self.prepare(operation, target)
        if placement is not None:
            self._cluster.events.post(
                ActivityEvent(
                    ActivityKind.REQUEST,
                    operation=operation,
                    request=request,
                    placement=placement,
                )
            )
        return operation

    def _requested(
        self, target: frozenset[int], request: TargetRequest, operation_id: str | None
    ) -> Operation:
        members, epoch = self._cluster.members, self._cluster.membership.epoch
        return Operation(members, target, epoch, request=request, operation_id=operation_id)

    def _queue(self, request: TargetRequest, operation_id: str | None) -> Operation:
        cluster = self._cluster
        target = self._resolve(request, cluster.members)
        operation = self._requested(target, request, operation_id)
        operation.enter("waiting")
        self.remember(operation)
        cluster.events.post(
            ActivityEvent(
                ActivityKind.REQUEST,
                operation=operation,
                request=request,
                reason=f"operation {operation.id} was asked for",
            )
        )
        return operation

    def _resolve(self, request: TargetRequest, members: frozenset[int]) -> frozenset[int]:
        cluster = self._cluster
        capacity = cluster.config.cluster.max_ranks
        order = cluster.leave_order(members)
        return request.resolve(members, capacity, cluster.head.reserved, order)

    def _same_target(self, running: Operation, request: TargetRequest) -> bool:
        cluster = self._cluster
        capacity = cluster.config.cluster.max_ranks
        return request.led_to(running.before, running.after, capacity, cluster.head.reserved)

    # ---- how one begins ---------------------------------------------------------------------

    def start_queued(self) -> bool:
        """The change that was asked for meanwhile; False: nothing began, and it is over."""
        cluster = self._cluster
        assert cluster.queued is not None  # the rule that leads here says so
        (operation, request), cluster.queued = cluster.queued, None
        try:
            target = self._resolve(request, cluster.members)
            placement = self.prepare(operation, target)
        except OperationRefused as error:
            operation.end("failed", str(error))
            placement = None
        if placement is None:
            cluster.notices.operation(operation)
            return False
        self.launch(operation, placement)
        return True

    def prepare(self, operation: Operation, target: frozenset[int]) -> Placement | None:
        """The placement that a change leads to; None: there is nothing to change, it is done.

        Raises: OperationRefused: there is no memory for it.
        """
        cluster = self._cluster
        members = cluster.members
        operation.before, operation.after = members, target
        operation.epoch = cluster.membership.epoch
        if target != members:
            return self._planned(target)
        if not operation.automatic:  # they may be what a loss has left, and too few
            cluster.memory_budget.check((), cluster.plan(target), cluster.placement)
        operation.end("done")
        self.remember(operation)
        if not operation.automatic:
            cluster.restart_policy.set_desired(target)
            cluster.save(urgent=True)
        return None

    def _planned(self, target: frozenset[int]) -> Placement:
        """The placement on other ranks than those of now.

        Raises: OperationRefused: there is no memory for it.
        """
        cluster = self._cluster
        placement = cluster.plan(target)
        newcomers = target - cluster.members
        here = cluster.head.on_this_host(newcomers)
        told = newcomers & cluster.memory_budget.elsewhere().keys()  # by other hosts
        cluster.memory_budget.check(here | told, placement, cluster.placement)
        return placement

    def launch(self, operation: Operation, placement: Placement) -> None:
        """Begin a change in the table of `membership.py`, where none runs."""
        cluster = self._cluster
        cluster.planned = placement
        operation.begun = True
        operation.moved_experts = moved_experts(cluster.placement, placement)
        self.register(operation)
        cluster.events.post(MembershipEvent(EventKind.BEGIN, target=operation.after))

    def register(self, operation: Operation) -> None:
        """It is the one that runs."""
        self.remember(operation)
        self._cluster.operation = operation
        view = operation.view()
        because = f" ({view.reason})" if view.reason else ""
        about = {"operation": view.id, "epoch": view.epoch}
        log.info("%s: %s%s", view.id, describe_change(view), because, extra=about)

    def records(self) -> list[SavedOperation]:
        """Of all that are kept, for another head."""
        return [operation.record() for operation in self._operations.values()]

    def remember(self, operation: Operation) -> None:
        """As many as are kept that somebody asked for, and as many that the head began: losses do
        not make it forget what callers come back for."""
        self._operations[operation.id] = operation
        alike = [k for k, o in self._operations.items() if o.automatic == operation.automatic]
        for old in alike[:-_KEPT_OPERATIONS]:
            del self._operations[old]
            self._cluster.head.forget_operation(old)
        if self._cluster.head.saves:
            # whoever has asked for it is told, and may come back for it
            urgent = not (operation.automatic or operation.over.is_set())
            self._cluster.head.save_operation(operation.record(), urgent=urgent)


def moved_experts(before: Placement | None, after: Placement) -> int:
    """How many replicas ranks load for a placement."""
    return sum(map(len, loads(before, after).values()))
