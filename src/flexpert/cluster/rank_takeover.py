"""Ranks of a head that has ended come to another: each gets a new connection, and says what it has.

What does not answer in time is ended, and so is what the records do not know. Until all have
answered nothing that ranks report is judged; it is kept in order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from flexpert.cluster.interfaces import Timer
from flexpert.engine import rank_protocol as msg

log = logging.getLogger("flexpert")


class RankTakeover:
    """attached: by rank. pending: what those have reported since.

    Args:
        attach: gives a rank its new connection and sends `Attach` on it.
        kill: ends one; its exit is told.
        call_later: a timer.
        done: called once: `attached` has those that are kept, and all others are gone.
    """

    def __init__(
        self,
        *,
        attach: Callable[[int], None],
        kill: Callable[[int], None],
        call_later: Callable[[float, Callable[[], None]], Timer],
        done: Callable[[], None],
    ) -> None:
        self._attach = attach
        self._kill = kill
        self._call_later = call_later
        self._done = done
        self.attached: dict[int, msg.Attached] = {}
        self.pending: list[tuple[int, msg.Report]] = []
        self._living: set[int] = set()
        self._over = False

    def begin(self, living: Iterable[int], wanted: frozenset[int], limit_s: float) -> None:
        """living: ranks whose processes are there. wanted: those that are to be kept. limit_s: for
        their answers."""
        self._living = set(living)
        for rank in sorted(self._living):
            if rank in wanted:
                self._attach(rank)
            else:
                self._kill(rank)
        self._call_later(limit_s, self._end_silent)
        self._look()

    def _end_silent(self) -> None:
        for rank in sorted(self._living - self.attached.keys()):
            if not self._over:
                log.warning(
                    "rank %d does not answer the new head and is ended", rank, extra={"rank": rank}
                )
                self._kill(rank)

    def _look(self) -> None:
        if not self._over and self._living <= self.attached.keys():
            self._over = True
            self._done()

    def on_report(self, rank: int, report: msg.Report) -> None:
        if isinstance(report, msg.Attached):
            self.attached[rank] = report
            self._look()
        elif rank in self.attached:
            self.pending.append((rank, report))

    def on_lost(self, rank: int) -> None:
        """Its connection has ended, or it cannot be understood."""
        self._kill(rank)

    def on_exit(self, rank: int) -> None:
        """Its process is gone."""
        self._living.discard(rank)
        self.attached.pop(rank, None)
        self.pending = [one for one in self.pending if one[0] != rank]
        self._look()
