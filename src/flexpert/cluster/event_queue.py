"""Events one after the other: what an event causes is handled behind it, never inside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Event = TypeVar("Event")


class EventQueue(Generic[Event]):
    """handle: takes one event, and may post more."""

    def __init__(self, handle: Callable[[Event], None]) -> None:
        self._handle = handle
        self._events: deque[Event] = deque()
        self._handling = False

    def post(self, event: Event) -> None:
        """From outside: returns when it is handled, and all that it has caused. From within
        `handle`: returns at once; the event comes behind those that are there."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._handling = False
