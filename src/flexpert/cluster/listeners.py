"""Who listens to the cluster's events; one that falls too far behind is let go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from flexpert.cluster.views import ClusterEvent

# Events that wait for one listener. A change with its progress is some twenty.
MOST_WAITING = 1024


class Listeners:
    """Hands each event to everybody who listens."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[ClusterEvent | None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._queues)

    async def events(self) -> AsyncIterator[ClusterEvent]:
        """What is published from the first `anext` on.

        It ends at `close`, or, after an event of kind "overrun", if more than MOST_WAITING events
        wait for the listener, who asks for the whole view and listens anew.
        """
        # one place more than is ever waited for, so that the end can always be told
        queue: asyncio.Queue[ClusterEvent | None] = asyncio.Queue(MOST_WAITING + 1)
        self._queues.add(queue)
        try:
            while not self._closed and (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    def publish(self, event: ClusterEvent) -> None:
        """To everybody."""
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
