"""Time and links of a simulated cluster: a clock that jumps from one event to the next.

Links lose nothing while both ends live and keep their order, as socket pairs do; a partition
holds a link up, and what was sent meanwhile arrives afterwards.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from flexpert.cluster.interfaces import Computed, T

COMPUTED_S = 0.4  # what a head's thread takes

Action = Callable[..., None]
Link = tuple[str, int]  # "up" to the head or "down" to a rank, and the number of the rank's life


class Timer:
    """A call of the coordinator's that is still to come."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None] | None) -> None:
        self.action = action

    def cancel(self) -> None:
        self.action = None

    def fire(self) -> None:
        if self.action:
            self.action()


class Network:
    """draw: all that is left to chance. deaf_until: the head is held up, nothing reaches it."""

    def __init__(self, seed: int, trace: bool) -> None:
        self.draw = random.Random(seed)
        self.trace = trace
        self.clock = 0.0  # seconds
        self.events: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self.number = 0
        self.links: dict[Link, float] = {}  # when the latest message on one arrives
        self.deaf_until = 0.0

    def now(self) -> float:
        return self.clock

    def note(self, *what: object) -> None:
        if self.trace:
            print(f"{self.clock:8.3f}", *what)

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def call(self, delay_s: float, action: Action, *args: object) -> None:
        self.number += 1
        heapq.heappush(self.events, (self.clock + delay_s, self.number, action, args))

    def put_off(self, action: Action, args: tuple[Any, ...]) -> None:
        """Until the head is back: timers first, then what lies in its sockets."""
        self.number += 1
        first = 10**9 if action.__func__ is Timer.fire else 0  # type: ignore[attr-defined]
        heapq.heappush(self.events, (self.deaf_until, self.number - first, action, args))

    def carry(self, link: Link, action: Action, *args: object) -> None:
        draw = self.draw.random()
        at = self.clock + (0.3 if draw < 0.03 else 0.02 * draw)
        before = self.links.get(link, 0.0)
        if before > at:
            at = before
        self.links[link] = at
        self.number += 1
        heapq.heappush(self.events, (at, self.number, action, args))

    def hold(self, link: Link, seconds: float) -> None:
        """What is sent meanwhile arrives afterwards, in order, as over TCP."""
        self.links[link] = max(self.links.get(link, 0.0), self.clock + seconds)

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        timer = Timer(action)
        self.call(delay_s, timer.fire)
        return timer

    def compute(self, work: Callable[[], T], then: Callable[[Computed[T]], None]) -> None:
        """It takes a while, in which anything may happen."""
        outcome: Future[T] = Future()
        outcome.set_result(work())
        self.call_later(COMPUTED_S, lambda: then(outcome))
