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
        `handle`: returns at once; the event comes behind those that are there.

        Raises: the first that `handle` raised; the events behind it are handled all the same.
        """
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        first: Exception | None = None
        while self._events:
            try:
                self._handle(self._events.popleft())
            except Exception as error:  # noqa: BLE001 - raised below
                first = first or error
        self._handling = False
        if first is not None:
            raise first
