"""What shows the service live is sent: the whole once, then what is different (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView

NOT_TOLD = frozenset({"waited_for", "wire_bytes"})


class LiveFigures(msgspec.Struct, frozen=True, array_like=True):
    """Of one interval, as an array in this order.

    time: its end, in seconds since 1970. tokens_per_s: handed to clients. first_token_ms, gap_ms:
    (median, 95th percentile) of the times to a first token and between two tokens that clients
    saw; None: there were none. running, waiting: sequences. ranks: active ones.
    """

    time: float
    tokens_per_s: float
    first_token_ms: tuple[float, float] | None
    gap_ms: tuple[float, float] | None
    running: int
    waiting: int
    ranks: int


class LiveSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The first event of `GET /cluster/stream`, "snapshot".

    operations: the latest, oldest first. events: the latest that are kept, but for those of
    operations. history: of the latest intervals, oldest first.
    """

    cluster: ClusterView
    operations: list[OperationView]
    events: list[ClusterEvent]
    history: list[LiveFigures]
    interval_s: float


class LiveChange(msgspec.Struct, frozen=True, kw_only=True):
    """Each further event "change": what is different from the view before.

    figures: of the interval that has ended, if one has. cluster: fields of the view but its ranks.
    ranks: those with new values, each with its id and these only; a new one with all of them. What
    a rank says of every other one (NOT_TOLD) is not among them: it would be most of the message.
    left: ids of those that are not there any more.
    """

    figures: LiveFigures | None = None
    cluster: dict[str, Any] = {}
    ranks: list[dict[str, Any]] = []
    left: list[int] = []


def change(
    before: ClusterView, after: ClusterView, figures: LiveFigures | None = None
) -> LiveChange:
    """From one view to the next."""
    known = {rank.id: rank for rank in before.ranks}
    ranks = []
    for rank in after.ranks:
        old = known.pop(rank.id, None)
        if old is None:
            ranks.append(msgspec.structs.asdict(rank))
        elif different := _different(old, rank):
            ranks.append({"id": rank.id, **different})
    cluster = _different(before, after)
    cluster.pop("ranks", None)
    return LiveChange(figures=figures, cluster=cluster, ranks=ranks, left=sorted(known))


def _different(before: msgspec.Struct, after: msgspec.Struct) -> dict[str, Any]:
    found = {}
    for name in after.__struct_fields__:
        if name in NOT_TOLD:
            continue
        value = getattr(after, name)
        if getattr(before, name) != value:
            found[name] = value
    return found


def median_and_tail(values: Sequence[float]) -> tuple[float, float] | None:
    """(median, 95th percentile) of seconds, in milliseconds; None: there are none."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return _ms(ordered[last // 2]), _ms(ordered[round(last * 0.95)])


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
