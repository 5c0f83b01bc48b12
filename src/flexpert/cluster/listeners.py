"""Who listens to the cluster's events, and the latest of them for who listens again; one that
falls too far behind is let go."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable

import msgspec

from flexpert.cluster.views import ClusterEvent
from flexpert.errors import CursorLost

# Events that wait for one listener. A change with its progress is some twenty.
MOST_WAITING = 1024
MOST_KEPT = 1024  # events for who says which one it has had


class Listeners:
    """Numbers events, and hands each to everybody who listens. latest: the number of the last."""

    def __init__(self) -> None:
        self.latest = 0
        self._kept: deque[ClusterEvent] = deque(maxlen=MOST_KEPT)
        self._queues: set[asyncio.Queue[ClusterEvent | None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queues)

    def resume(self, latest: int) -> None:
        """After another head, which had published so many, or a few more than it wrote down: what
        they were is not known here."""
        self.latest = latest + MOST_KEPT

    def continue_from(self, latest: int, events: Iterable[ClusterEvent]) -> None:
        """After a head that has told its latest events, and the number of the last."""
        self.latest = latest
        self._kept.extend(events)

    @property
    def kept(self) -> list[ClusterEvent]:
        """The latest events, for another head."""
        return list(self._kept)

    def check(self, since: int) -> None:
        """Raises: CursorLost: some of what came after that number is not known any more."""
        first = self._kept[0].number if self._kept else self.latest + 1
        if not first - 1 <= since <= self.latest:
            known = f"events {first} to {self.latest}" if self._kept else "no events"
            raise CursorLost(
                f"there are {known} here, and what followed event {since} is not known; begin "
                "anew with GET /cluster and its cursor"
            )

    def recent(self) -> list[ClusterEvent]:
        """The latest, oldest first."""
        return list(self._kept)

    async def events(self, since: int | None = None) -> AsyncIterator[ClusterEvent]:
        """What is published from the first `anext` on; before it, what came after the event of
        this number (see `check`).

        It ends at `close`, or, after an event of kind "overrun", if more than MOST_WAITING events
        wait for the listener, who asks for the whole view and listens anew.
        """
        # one place more than is ever waited for, so that the end can always be told
        queue: asyncio.Queue[ClusterEvent | None] = asyncio.Queue(MOST_WAITING + 1)
        if since is not None:
            self.check(since)
        missed = [event for event in self._kept if since is not None and event.number > since]
        self._queues.add(queue)
        try:
            for one in missed:
                yield one
            while not self._closed and (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    def publish(self, event: ClusterEvent) -> None:
        """To everybody, with the next number."""
        self.latest += 1
        event = msgspec.structs.replace(event, number=self.latest)
        self._kept.append(event)
        for queue in list(self._queues):
            if queue.qsize() < MOST_WAITING:
                queue.put_nowait(event)
            else:
                self._let_go(queue)

    def _let_go(self, queue: asyncio.Queue[ClusterEvent | None]) -> None:
        self._queues.discard(queue)
        while not queue.empty():  # after a gap they would say nothing that is sure
            queue.get_nowait()
        error = (
            f"more than {MOST_WAITING} events waited to be read; listen again for the whole view"
        )
        queue.put_nowait(ClusterEvent(kind="overrun", time=time.time(), data={"error": error}))
        queue.put_nowait(None)

    def close(self) -> None:
        """Everybody's events end."""
        if self._closed:
            return
        self._closed = True
        for queue in self._queues:
            queue.put_nowait(None)
