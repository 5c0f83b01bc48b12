"""What `flexpert bench elastic` did to its service, event by event (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from flexpert.bench.load_timeline import TimelinePoint
from flexpert.bench.timed_events import EventOutcome
from flexpert.cluster.views import OperationView

EventLabel = Literal["up", "down", "swap", "rebalance", "kill", "stop"]
LABELS: dict[EventLabel, str] = {
    "up": "ranks join",
    "down": "ranks leave",
    "swap": "a rank joins, another leaves",
    "rebalance": "experts move",
    "kill": "SIGKILL",
    "stop": "SIGSTOP",
}

_COMMIT, _AGREE = "commit", "recover"
_AFTER = ("release",)  # the change is in force by then


class ElasticEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. at_s: seconds from the begin of the measurement. None: there is no such part.

    detect_s: from a loss until the head knew. agree_s: from there until the survivors were in the
    next epoch. prepare_s: processes, weights, KV, beside serving. commit_s: the switch itself.
    full_s: from the begin until all ranks that were asked for served. moved_bytes: KV of requests.
    """

    label: EventLabel
    at_s: float
    ranks: int
    state: str
    full_s: float | None
    longest_gap_s: float
    detect_s: float | None = None
    agree_s: float | None = None
    prepare_s: float | None = None
    commit_s: float | None = None
    pause_ms: float | None = None
    moved_requests: int = 0
    moved_bytes: int = 0


class ElasticTimeline(msgspec.Struct, frozen=True, kw_only=True):
    """The load over time, from the begin of the measurement. undisturbed: (begin, end) of the parts
    without an event, which are the baseline."""

    step_s: float
    points: list[TimelinePoint]
    undisturbed: list[tuple[float, float]]
    events: list[ElasticEvent]


def change_event(
    label: EventLabel, at_s: float, full_s: float, longest_gap_s: float, done: OperationView
) -> ElasticEvent:
    """Of a change that was asked for."""
    return ElasticEvent(
        label=label,
        at_s=at_s,
        ranks=len(done.target),
        state=done.state,
        full_s=full_s if done.state == "done" else None,
        longest_gap_s=longest_gap_s,
        prepare_s=_prepare_s([done]),
        commit_s=done.phases.get(_COMMIT),
        pause_ms=done.pause_ms,
        moved_requests=done.moved_requests,
        moved_bytes=done.moved_kv_bytes,
    )


def loss_event(
    label: EventLabel, at_s: float, full_s: float, longest_gap_s: float, found: EventOutcome
) -> ElasticEvent:
    """Of a rank that was lost. found: what the service did about it, in seconds after the loss."""
    recoveries = [view for view in found.operations if view.purpose == "recovery"]
    restarts = [view for view in found.operations if view.purpose == "restart"]
    pauses = [view.pause_ms for view in found.operations if view.pause_ms is not None]
    agree = [view.phases.get(_AGREE, 0.0) for view in recoveries]
    commits = [view.phases[_COMMIT] for view in found.operations if _COMMIT in view.phases]
    return ElasticEvent(
        label=label,
        at_s=at_s,
        ranks=len(restarts[-1].target) if restarts else 0,
        state=found.state,
        full_s=full_s,
        longest_gap_s=longest_gap_s,
        detect_s=found.detected_s,
        agree_s=sum(agree) if agree else None,
        prepare_s=_prepare_s(restarts),
        commit_s=max(commits, default=None),
        pause_ms=max(pauses, default=None),
        moved_requests=sum(view.moved_requests for view in found.operations),
        moved_bytes=sum(view.moved_kv_bytes for view in found.operations),
    )


def _prepare_s(operations: Sequence[OperationView]) -> float | None:
    if not operations:
        return None
    return sum(
        seconds
        for view in operations
        for name, seconds in view.phases.items()
        if name not in (_COMMIT, _AGREE, *_AFTER)
    )
