"""A clock that stands still between events, and the queue of these (pure)."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class VirtualTime:
    """now: seconds from 0 on. Actions of one instant run in the order in which they were added."""

    def __init__(self) -> None:
        self.now = 0.0
        self._number = count()
        self._queue: list[tuple[float, int, Action]] = []

    def after(self, delay_s: float, action: Action) -> None:
        """Raises: ValueError: time would run backwards."""
        if not delay_s >= 0:
            raise ValueError(f"{delay_s} seconds from now are in the past")
        heapq.heappush(self._queue, (self.now + delay_s, next(self._number), action))

    def at(self, when: float, action: Action) -> None:
        """At a time; at once if that has passed."""
        self.after(max(0.0, when - self.now), action)

    def run(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Until there is nothing left to do, or it is enough."""
        while self._queue and not enough():
            self.now, _, action = heapq.heappop(self._queue)
            action()
