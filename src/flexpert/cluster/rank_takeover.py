"""Ranks of a head that has ended come to another: each gets a new connection, and says what it has.

What does not answer in time is ended, and so is what the records do not know. Until all have
answered nothing that ranks report is judged; it is kept in order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.cluster.processes.transport import Transport
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import TokenEvent

log = logging.getLogger("flexpert")

_EXIT_S = 10.0  # for a process that was killed to be gone


class RankTakeover:
    """attached: by rank. pending: what those have reported since."""

    def __init__(self, launcher: LocalLauncher, transport: Transport) -> None:
        self._launcher = launcher
        self._transport = transport
        self.attached: dict[int, msg.Attached] = {}
        self.pending: list[tuple[int, msg.Report]] = []
        self._living: set[int] = set()
        self._changed = asyncio.Event()

    async def run(self, living: Iterable[int], wanted: frozenset[int], limit_s: float) -> None:
        """living: ranks whose processes are there. wanted: those that are to be kept.

        Afterwards `attached` has those that were kept, and the others are gone.
        """
        self._living = set(living)
        for rank in sorted(self._living - wanted):
            self._launcher.kill(rank)
        for rank in sorted(self._living & wanted):
            self._launcher.attach(rank, self._transport.open(rank))
            self._transport.send(rank, msg.Attach())
        await self._until(lambda: self._living <= self.attached.keys(), limit_s)
        for rank in sorted(self._living - self.attached.keys()):
            log.warning("rank %d does not answer the new head and is ended", rank)
            self._launcher.kill(rank)
        await self._until(lambda: self._living <= self.attached.keys(), _EXIT_S)

    async def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass

    def published(self) -> list[TokenEvent]:
        """What ranks have said that the head before may not have written down, of each sequence in
        order: it may have been on several of them."""
        told = self.attached.values()
        events = [event for one in told for part in one.published for event in part.events]
        return sorted(events, key=lambda event: (event.id, event.position))

    def on_report(self, rank: int, report: msg.Report) -> None:
        if isinstance(report, msg.Attached):
            self.attached[rank] = report
            self._changed.set()
        elif rank in self.attached:
            self.pending.append((rank, report))

    def on_lost(self, rank: int) -> None:
        """Its connection has ended, or it cannot be understood."""
        self._launcher.kill(rank)

    def on_exit(self, rank: int) -> None:
        """Its process is gone."""
        self._living.discard(rank)
        self.attached.pop(rank, None)
        self.pending = [one for one in self.pending if one[0] != rank]
        self._changed.set()
