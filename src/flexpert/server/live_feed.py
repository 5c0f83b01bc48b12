"""Looks at the service once a second, and tells all who watch it live what is different.

What is looked up and encoded is so once, however many watch. A watcher for whom more than a few
intervals wait to be read is let go: it connects again and begins with the whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.views import ClusterView
from flexpert.errors import FlexpertError, Overloaded
from flexpert.server import wire
from flexpert.server.http_metrics import ServerMetrics
from flexpert.server.live_view import LiveFigures, LiveSnapshot, change, median_and_tail
from flexpert.server.stream import event

if TYPE_CHECKING:
    from flexpert.cluster.head import Head

log = logging.getLogger("flexpert.server")

INTERVAL_S = 1.0
MOST_HISTORY = 900  # intervals: a quarter of an hour
MOST_WAITING = 256  # messages for one watcher
MOST_WATCHERS = 64
_MOST_SHOWN = 64  # operations, and events besides

OVERRUN = event(b'{"error":"too slow; connect again for the whole view"}', name="overrun")


class LiveFeed:
    """Of one head.

    LiveFigures are taken from `start` on, or from the first watcher on; everything else only while
    somebody watches.

    Args:
        closing: set when the server shuts down: all watching ends.
    """

    def __init__(self, head: Head, metrics: ServerMetrics, closing: asyncio.Event) -> None:
        self._head = head
        self._metrics = metrics
        self._closing = closing
        self._history: deque[LiveFigures] = deque(maxlen=MOST_HISTORY)
        self._watchers: set[asyncio.Queue[bytes | None]] = set()
        self._view: ClusterView | None = None
        self._looking: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    @property
    def watchers(self) -> int:
        """How many there are."""
        return len(self._watchers)

    def start(self) -> None:
        """Begin to keep figures; ends with the server."""
        if self._looking is None:
            self._metrics.take_window()
            self._looking = asyncio.create_task(self._look())

    def check_room(self) -> None:
        """Raises: Overloaded"""
        if len(self._watchers) >= MOST_WATCHERS:
            raise Overloaded(f"{MOST_WATCHERS} watch already, the most at once; close one of them")

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: "snapshot", then each "change", and the cluster's own events.

        Raises: FlexpertError: the service is not up yet.
        """
        self.start()
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MOST_WAITING + 2)
        self._advance(None)
        first = self._snapshot()
        self._watchers.add(queue)
        if self._listening is None:
            self._listening = asyncio.create_task(self._listen())
        try:
            yield first
            while (item := await queue.get()) is not None:
                yield item
        finally:
            self._watchers.discard(queue)
            if not self._watchers and self._listening:
                self._listening.cancel()
                self._listening = self._view = None

    # ---- looks ------------------------------------------------------------------------------

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        began = due = loop.time()
        closing = asyncio.ensure_future(self._closing.wait())
        while not closing.done():
            due = max(due + INTERVAL_S, loop.time())
            await asyncio.wait((closing,), timeout=due - loop.time())
            now = loop.time()
            try:
                figures = self._figures(now - began)
                self._history.append(figures)
                self._advance(figures)
            except (FlexpertError, ServiceHandedOver) as error:  # the service starts or stops
                log.debug("nothing to show live: %s", error)
            except Exception:
                log.exception("the service could not be looked at for who watches it")
            began = now
        for queue in self._watchers:
            self._end(queue, None)

    def _figures(self, seconds: float) -> LiveFigures:
        window = self._metrics.take_window()
        ranks = self._head.live_load()
        return LiveFigures(
            time=round(time.time(), 3),
            tokens_per_s=round(window.tokens / max(seconds, 1e-3), 2),
            first_token_ms=median_and_tail(window.first_tokens_s),
            gap_ms=median_and_tail(window.gaps_s),
            running=ranks.running,
            waiting=ranks.waiting,
            ranks=ranks.active,
        )

    def _snapshot(self) -> bytes:
        assert self._view is not None  # `_advance` has looked
        snapshot = LiveSnapshot(
            cluster=self._view,
            operations=self._head.operations()[-_MOST_SHOWN:],
            events=[one for one in self._head.recent_events() if one.kind != "operation"][
                -_MOST_SHOWN:
            ],
            history=list(self._history),
            interval_s=INTERVAL_S,
        )
        return event(wire.encode(snapshot), name="snapshot")

    def _advance(self, figures: LiveFigures | None) -> None:
        """To what is true now; those who watch are told what has become different."""
        if figures is not None and not self._watchers:
            return
        before, self._view = self._view, self._head.cluster()
        if self._watchers and before is not None:
            told = change(before, self._view, figures)
            self._tell(event(wire.encode(told), name="change"))

    async def _listen(self) -> None:
        """The cluster's events, as they come."""
        async for one in self._head.events():
            self._tell(event(wire.encode(one), name=one.kind))
        for queue in self._watchers:
            self._end(queue, None)

    def _tell(self, message: bytes) -> None:
        for queue in list(self._watchers):
            if queue.qsize() < MOST_WAITING:
                queue.put_nowait(message)
            else:
                self._watchers.discard(queue)
                self._end(queue, OVERRUN)

    def _end(self, queue: asyncio.Queue[bytes | None], last: bytes | None) -> None:
        while not queue.empty():  # after a gap they would say nothing that is sure
            queue.get_nowait()
        if last is not None:
            queue.put_nowait(last)
        queue.put_nowait(None)
