"""How what the coordinator knows becomes a record for another head, and how that goes on from it.

A head that takes ranks over does not know what they were told last, nor what they have reported
since. So it believes the records only in what they say of memberships, and what the ranks say of
themselves; and lets the survivors enter an epoch of their own, as after a loss: whatever change was
under way is over with that, and one that somebody had asked for begins again under its own id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from flexpert.cluster.cluster_state import ClusterState
from flexpert.cluster.journal import Entry, Journal
from flexpert.cluster.membership import Change, EventKind, MembershipEvent, Phase
from flexpert.cluster.operation import Operation, TargetRequest
from flexpert.cluster.operations import Operations
from flexpert.cluster.rank_state import RankState
from flexpert.cluster.reconciliation import Activity, ActivityEvent, ActivityKind
from flexpert.cluster.saved_state import SavedCluster, SavedOperation, SavedRequest
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
    begun = unfinished if unfinished and unfinished.begun else None
    if begun and (begun.state == "committing" or record.members == begun.after):
        # ranks have switched to it, or may have
        cluster.restart_policy.set_desired(begun.after)
    goes_on = cluster.membership.restore(
        record.epoch, record.epochs, record.members, record.phase, change, gone
    )
    for rank, hello in living.items():
        found = RankState(rank, state="active", heard=now)
        found.instance = record.ranks.get(rank, found.instance)
        found.introduce(hello)
        cluster.ranks[rank] = found
        cluster.restart_policy.active(rank, now)
    if not goes_on:
        _begin_again(cluster, unfinished)
        return
    cluster.placement = record.placement
    if unfinished is not None:
        _queue(cluster, unfinished)
    cluster.events.post(MembershipEvent(EventKind.RESUMED, reason=_REASON))


def _queue(cluster: ClusterState, unfinished: Operation) -> None:
    """It begins when what runs is over, and ends at once if that has led where it leads."""
    unfinished.enter("waiting")
    request = unfinished.request
    if unfinished.begun or request is None:
        request = TargetRequest(None, 0, (), exactly=unfinished.after)
    cluster.queued = unfinished, request
    cluster.reconciliation.state = Activity.YIELDING


def _begin_again(cluster: ClusterState, unfinished: Operation | None) -> None:
    """Nobody can go on: as when all are lost. Who is left is ended; then what was asked for begins,
    and what is desired is started."""
    policy = cluster.restart_policy
    if not policy.desired:  # it had not come up
        policy.set_desired(unfinished.after if unfinished else range(cluster.config.cluster.ranks))
    reason = f"{_REASON}, and none could go on"
    cluster.membership.lose(bool(cluster.ranks))
    cluster.events.post(ActivityEvent(ActivityKind.ALL_LOST, reason=reason))
    if unfinished is not None:
        _queue(cluster, unfinished)
    if not cluster.ranks:  # else it comes with the last exit
        cluster.events.post(ActivityEvent(ActivityKind.OVER))


def restore_requests(
    journal: Journal,
    requests: Iterable[SavedRequest],
    attached: Mapping[int, msg.Attached],
    on_cancel: Callable[[str], None],
) -> tuple[list[Entry], dict[int, list[str]]]:
    """The journal as it was, with what ranks have published since.

    Returns: (all entries that there were, those that are finished by now too; rank → ids of the
        sequences that it must not run: nobody knows them, they are finished, or another does).
    """
    log, journal.log = journal.log, None  # it has them already
    entries = [journal.restore(one.sequence, one.events, on_cancel) for one in requests]
    journal.log = log
    published = (part for told in attached.values() for part in told.published)
    events = [event for part in published for event in part.events]
    # a sequence may have been on several ranks, one after the other
    for event in sorted(events, key=lambda event: (event.id, event.position)):
        journal.catch_up(event)
    foreign = {}
    for rank, told in attached.items():
        refused = [name for name in told.sequences if not journal.place(name, rank)]
        if refused:
            foreign[rank] = refused
    return entries, foreign


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
