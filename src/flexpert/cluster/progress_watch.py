"""Whether the service as a whole gets on with its work, or is wedged (pure)."""

from __future__ import annotations

from collections.abc import Callable


class ProgressWatch:
    """Tells a service with much to do from one that does nothing of what it has to do.

    Single ranks are watched elsewhere (`stall_detector.py`); this asks for the outcome, whatever is
    in the way: a step that is through, or no work.

    limit_s: work may lie there so long without a step. now: a clock in seconds.
    """

    def __init__(self, limit_s: float, now: Callable[[], float]) -> None:
        self._limit_s = limit_s
        self._now = now
        self._latest = now()

    def made(self) -> None:
        """A step is through, or work has come to a service that had none, or what is in the way
        now is known and has a limit of its own."""
        self._latest = self._now()

    def stuck_s(self, unfinished: int) -> float | None:
        """For how long nothing has been done, if that is too long. unfinished: requests."""
        since_s = self._now() - self._latest
        return since_s if unfinished and since_s > self._limit_s else None
