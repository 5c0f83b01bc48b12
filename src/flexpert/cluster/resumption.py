"""How what the coordinator knows becomes a record for another head, and how that goes on from it.

A head that takes ranks over does not know what they were told last, nor what they have reported
since. So it believes the records only in what they say of memberships, and what the ranks say of
themselves; and lets the survivors enter an epoch of their own, as after a loss: whatever change was
under way is over with that, and one that somebody had asked for begins again under its own id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.membership import Change, EventKind, MembershipEvent, Phase
from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.operations import Operations
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.reconciliation import Activity
from flexpert.cluster.saved_state import SavedCluster, SavedOperation
from flexpert.engine import rank_protocol as msg

_REASON = "another head has taken the ranks over"
_KEPT = (Phase.COMMIT, Phase.RELEASE, Phase.RECOVER)


def worth_keeping(record: SavedCluster) -> frozenset[int]:
    """The ranks that may have a part in what follows; any other that lives is to be ended."""
    change = record.change
    if change is None or record.phase not in _KEPT:
        return record.members
    return record.members | change.before | change.after


def everybody(record: SavedCluster) -> frozenset[int]:
    """All ids of which a process may live."""
    change = record.change
    of_change = change.before | change.after | change.doomed if change else frozenset()
    return record.members | of_change | record.ranks.keys()


def restore(
    cluster: ClusterState,
    operations: Operations,
    record: SavedCluster,
    saved_operations: Iterable[SavedOperation],
    living: Mapping[int, msg.Hello],
) -> None:
    """Begin where the head before has ended. living: the ranks that were taken over, of those that
    are worth keeping; of all others the processes are gone."""
    now = cluster.head.now()
    cluster.verdicts = record.verdicts
    cluster.restart_policy.set_desired(record.desired)
    unfinished = _restore_operations(operations, saved_operations)
    saved = record.change
    change = (
        Change(saved.epoch, saved.before, saved.after, saved.doomed, saved.kept, 0, saved.cause)
        if saved is not None
        else None
    )
    gone = everybody(record) - living.keys()
    goes_on = cluster.membership.restore(
        record.epoch, record.epochs, record.members, record.phase, change, gone
    )
    if not goes_on:
        operations.begin_again(unfinished, record.desired)
        return
    cluster.placement = record.placement
    for rank, hello in living.items():
        found = RankState(rank, state="active", heard=now)
        found.instance = record.ranks.get(rank, found.instance)
        found.introduce(hello)
        cluster.ranks[rank] = found
        cluster.restart_policy.active(rank, now)
    if unfinished is not None:
        unfinished.enter("waiting")
        exactly = TargetRequest(None, 0, (), exactly=unfinished.after)
        cluster.queued = unfinished, exactly
        cluster.reconciliation.state = Activity.YIELDING
    cluster.events.post(MembershipEvent(EventKind.RESUMED, reason=_REASON))


def _restore_operations(
    operations: Operations, records: Iterable[SavedOperation]
) -> Operation | None:
    """All of them; returns the one that somebody has asked for and that is not over."""
    unfinished: Operation | None = None
    for record in records:
        operation = Operation.restored(record)
        operations.remember(operation)
        if operation.over.is_set():
            continue
        if operation.automatic or unfinished is not None:
            operation.end("failed", _REASON)
        else:
            unfinished = operation
    return unfinished
