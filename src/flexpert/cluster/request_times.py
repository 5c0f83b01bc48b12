"""When a request came, was begun and had its tokens, and what that makes in seconds. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestTimes:
    """By the journal's clock. assigned: when a rank was first given it. waited: seconds until that
    rank had room for it; first: when its first token came."""

    opened: float
    assigned: float | None = None
    first: float | None = None
    waited: float = 0.0

    def begun(self, now: float, waited: float) -> None:
        """The first token has come."""
        if self.first is None:
            self.first, self.waited = now, waited


@dataclass(frozen=True, slots=True)
class Spans:
    """Seconds of a request that is complete; they add up: queue + prefill + decode = total."""

    queue: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        return self.queue + self.prefill + self.decode

    @property
    def inference(self) -> float:
        return self.prefill + self.decode


def spans(times: RequestTimes, ended: float) -> Spans:
    """Waits in the head and on the rank are the queue; what is left until the first token is
    prefill. Clocks of hosts may differ, so a rank tells a duration, which is cut where it cannot
    be."""
    first = ended if times.first is None else times.first
    until_first = max(0.0, first - times.opened)
    in_head = max(0.0, (times.opened if times.assigned is None else times.assigned) - times.opened)
    queue = min(until_first, in_head + max(0.0, times.waited))
    return Spans(queue, until_first - queue, max(0.0, ended - first))
