"""What became of the ranks in a time that was measured, from the events of their head (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksHistory:
    """What became of the ranks in a day.

    targets: sizes that were asked for, from the first on. decisions: the autoscaler's that led to a
    change. Times are seconds after midnight.
    """

    rank_seconds: float
    changes: int
    failed: int
    targets: list[int]
    sizes: list[tuple[float, int]]
    decisions: list[tuple[float, str]]


def ranks_history(
    before: ClusterView,
    history: Sequence[ClusterEvent],
    wall: float,
    seconds: float,
) -> RanksHistory:
    """From the events since `before`. wall: when the day began, in seconds since 1970."""
    end = wall + seconds
    active = sum(rank.state == "active" for rank in before.ranks)
    sizes, targets = [(0.0, active)], [active]
    decisions: list[tuple[float, str]] = []
    total, since = 0.0, wall
    changes = failed = 0
    for event in history:
        at = min(max(event.time, wall), end)
        if event.kind == "epoch":
            total += active * (at - since)
            active, since = len(event.data["ranks"]), at
            if event.time <= end:
                sizes.append((event.time - wall, active))
        elif event.kind == "autoscale" and event.data["begun"] and event.time <= end:
            said = f"{event.data['ranks']} → {event.data['target']}: {event.data['why']}"
            decisions.append((event.time - wall, said))
        elif event.kind == "operation":
            view = msgspec.convert(event.data, OperationView)
            if view.state in ("preparing", "committing") or view.created > end:
                continue
            # a rank that is asked for takes a process until it is active, or the change has failed
            total += len(view.add) * max(0.0, at - max(view.created, wall))
            if view.purpose == "request" and (view.add or view.remove):
                changes += view.state == "done"
                failed += view.state != "done"
                if view.state == "done":
                    targets.append(len(view.target))
    total += active * (end - since)
    return RanksHistory(
        rank_seconds=total,
        changes=changes,
        failed=failed,
        targets=targets,
        sizes=sizes,
        decisions=decisions,
    )
