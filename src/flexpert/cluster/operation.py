"""One change of the cluster as the control API shows it, and what a target means (pure)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexpert.cluster.saved_state import Purpose, SavedOperation, SavedTarget
from flexpert.cluster.views import OperationState, OperationView
from flexpert.errors import OperationRefused

# share of the whole operation that is done when a phase begins
_PROGRESS = {
    "spawn": 0.0,
    "load": 0.3,
    "migrate": 0.85,
    "commit": 0.9,
    "release": 0.95,
    "undo": 0.0,
}


# of an operation's view, what adds up while it runs
_COUNTED = (
    "moved_experts",
    "copied_experts",
    "moved_requests",
    "moved_with_kv",
    "moved_kv_bytes",
    "moved_cached_bytes",
    "recomputed_tokens",
    "pause_ms",
)


def resolve_target(
    members: Iterable[int],
    capacity: int,
    *,
    ranks: int | None = None,
    add: int = 0,
    remove: Sequence[int] = (),
    join: Sequence[int] = (),
    reserved: Iterable[int] = (),
    leave_order: Sequence[int] | None = None,
) -> frozenset[int]:
    """The rank ids after a change: newcomers take the lowest free ids.

    join: ids that join besides. reserved: free ids that newcomers do not take. leave_order: all
    members, who leaves first for a smaller number of ranks first; default: the highest.

    Raises:
        OperationRefused: a contradiction, an unknown id, or more than there is room for.
    """
    before = set(members)
    if join:
        there = sorted(before & set(join))
        if there or max(join) >= capacity:
            what = f"rank {there[0]} is there already" if there else "see --max-ranks"
            raise OperationRefused(f"ranks {sorted(join)} cannot join: {what}")
        return frozenset(before | set(join))
    if (ranks is None) == (add == 0 and not remove):
        raise OperationRefused("name either the number of ranks, or what to add and remove")
    if add < 0:
        raise OperationRefused("add must not be negative")
    unknown = sorted(set(remove) - before)
    if unknown:
        raise OperationRefused(f"cannot remove rank {unknown[0]}: active are {sorted(before)}")
    leave = set(remove)
    if ranks is not None:
        if ranks < 1:
            raise OperationRefused("a service needs at least one rank")
        add = max(0, ranks - len(before))
        order = sorted(before, reverse=True) if leave_order is None else leave_order
        leave = set(order[: max(0, len(before) - ranks)])
    after = len(before) + add - len(leave)
    if after < 1:
        raise OperationRefused("a service needs at least one rank")
    taken = before | set(reserved)
    free = [rank for rank in range(capacity) if rank not in taken]
    if after > capacity:
        raise OperationRefused(
            f"{after} ranks exceed the capacity of {capacity}; start with a larger --max-ranks"
        )
    if add > len(free):
        raise OperationRefused(
            f"{add} newcomers need {add} free ids but only {len(free)} of {capacity} are free "
            "until the leavers are gone; remove first, or start with a larger --max-ranks"
        )
    return frozenset(before - leave | set(free[:add]))


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """What somebody asked for: a number of ranks, or how many join and which leave; or that a host
    has joined, whose rank has this id.

    exactly: what that came to with the head before, which has begun it. rebalance: the same ranks,
    with their experts elsewhere.
    """

    ranks: int | None
    add: int
    remove: tuple[int, ...]
    join: tuple[int, ...] = ()
    exactly: frozenset[int] = frozenset()
    rebalance: bool = False

    def __str__(self) -> str:
        if self.rebalance:
            return "a rebalance"
        if self.join:
            return f"ranks {list(self.join)} join"
        if self.ranks is not None:
            return f"{self.ranks} ranks"
        return f"{self.add} more, without {list(self.remove)}"

    def resolve(
        self,
        members: Iterable[int],
        capacity: int,
        reserved: Iterable[int] = (),
        leave_order: Sequence[int] | None = None,
    ) -> frozenset[int]:
        """See `resolve_target`."""
        if self.exactly:
            return self.exactly
        return resolve_target(
            members,
            capacity,
            ranks=self.ranks,
            add=self.add,
            remove=self.remove,
            join=self.join,
            reserved=reserved,
            leave_order=leave_order,
        )

    def led_to(
        self, before: frozenset[int], after: frozenset[int], capacity: int, reserved: Iterable[int]
    ) -> bool:
        """Whether a change from `before` to `after` is what this asks for. Of a smaller number only
        how many stay is asked for: who they are was decided by what was known then."""
        if self.ranks is not None and self.ranks <= len(before):
            return len(after) == self.ranks and after <= before
        try:
            return self.resolve(before, capacity, reserved) == after
        except OperationRefused:
            return False


class Operation:
    """A change under way or over; `view` is its JSON.

    reason: why the head began it by itself. operation_id: the caller's own id of it; None: it gets
    one. request: what was asked for, of a change that somebody asked for. entered: phases with when
    they began by the monotonic clock, one after the other; at the end "" when it was over.
    """

    def __init__(
        self,
        before: frozenset[int],
        after: frozenset[int],
        epoch: int,
        reason: str | None = None,
        purpose: Purpose = Purpose.REQUEST,
        *,
        request: TargetRequest | None = None,
        operation_id: str | None = None,
    ) -> None:
        self.id = operation_id or f"op-{secrets.token_hex(4)}"
        self.own_id = operation_id is not None
        self.request = request
        self.begun = False
        self.before = before
        self.after = after
        self.epoch = epoch
        self.state: OperationState = "preparing"
        self.phase = ""
        self.phases: dict[str, float] = {}
        self.shares: dict[int, float] = {}
        self.moved_experts = 0
        self.copied_experts = 0
        self.moved_requests = 0
        self.moved_with_kv = 0
        self.moved_kv_bytes = 0
        self.moved_cached_bytes = 0
        self.recomputed_tokens = 0
        self.pause_ms: float | None = None
        self.error: str | None = None
        self.reason = reason
        self.purpose = purpose
        self.created = time.time()
        self.over = asyncio.Event()
        self.entered: list[tuple[str, float]] = []
        self._phase_began = time.monotonic()

    @classmethod
    def restored(cls, record: SavedOperation) -> Operation:
        """As another head has left it."""
        view, asked = record.view, record.request
        request = (
            None
            if asked is None
            else TargetRequest(
                asked.ranks,
                asked.add,
                tuple(asked.remove),
                tuple(asked.join),
                rebalance=asked.rebalance,
            )
        )
        operation = cls(
            record.before,
            frozenset(view.target),
            view.epoch,
            view.reason,
            record.purpose,
            request=request,
            operation_id=view.id,
        )
        operation.own_id, operation.created = view.own_id, view.created
        operation.begun, operation.state = record.begun, view.state
        operation.phases = dict(view.phases)
        for name in _COUNTED:
            setattr(operation, name, getattr(view, name))
        if view.state in ("done", "failed", "cancelled"):
            operation.end(view.state, view.error)
        return operation

    def record(self) -> SavedOperation:
        """For another head."""
        asked, request = self.request, None
        if asked is not None:
            request = SavedTarget(asked.ranks, asked.add, asked.remove, asked.join, asked.rebalance)
        return SavedOperation(self.view(), self.before, self.purpose, request, self.begun)

    @property
    def automatic(self) -> bool:
        """The head began it by itself; or it makes way like one that it did."""
        return self.purpose is not Purpose.REQUEST

    def enter(self, phase: str) -> None:
        """The clock of a phase starts, that of the one before stops."""
        now = time.monotonic()
        if self.phase:
            spent = self.phases.get(self.phase, 0.0) + now - self._phase_began
            self.phases[self.phase] = spent
        if phase != self.phase:
            self.entered.append((phase, now))
        self.phase, self._phase_began = phase, now

    def end(self, state: OperationState, error: str | None = None) -> None:
        self.enter("")
        self.state, self.error = state, error
        self.over.set()

    @property
    def progress(self) -> float:
        if self.over.is_set():
            return 1.0
        share = 0.0
        if self.phase == "load" and self.shares:
            share = 0.55 * sum(self.shares.values()) / len(self.after | self.before)
        return round(_PROGRESS.get(self.phase, 0.0) + share, 3)

    def view(self) -> OperationView:
        phases = dict(self.phases)
        if self.phase:
            phases[self.phase] = phases.get(self.phase, 0.0) + time.monotonic() - self._phase_began
        return OperationView(
            id=self.id,
            state=self.state,
            target=sorted(self.after),
            add=sorted(self.after - self.before),
            remove=sorted(self.before - self.after),
            phase=self.phase or self.state,
            progress=self.progress,
            phases={name: round(seconds, 4) for name, seconds in phases.items()},
            epoch=self.epoch,
            moved_experts=self.moved_experts,
            copied_experts=self.copied_experts,
            moved_requests=self.moved_requests,
            moved_with_kv=self.moved_with_kv,
            moved_kv_bytes=self.moved_kv_bytes,
            moved_cached_bytes=self.moved_cached_bytes,
            recomputed_tokens=self.recomputed_tokens,
            pause_ms=None if self.pause_ms is None else round(self.pause_ms, 3),
            error=self.error,
            reason=self.reason,
            created=self.created,
            own_id=self.own_id,
            purpose=self.purpose.value,
        )
