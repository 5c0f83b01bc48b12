"""Processes of ranks that are ready before anybody asks for them, and belong to no epoch.

A spare rank has everything but its share of the experts: the process, the dense weights, an open
window, and on a GPU its kernels and graphs. A change that adds its id takes the process over, and
begins with what it has reported. Spares are started one after the other, while nothing changes, for
the ids that a change would add next; what becomes of one concerns nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flexpert.cluster.views import SpareView
from flexpert.engine import rank_protocol as msg
from flexpert.errors import FlexpertError

log = logging.getLogger("flexpert")

_LOOK_S = 0.5
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0  # before another is started for one that ended


@dataclass(slots=True)
class _Spare:
    hello: msg.Hello | None = None  # None: it is starting
    used: msg.MemoryUse = field(default_factory=lambda: msg.MemoryUse(0))
    ends: bool = False
    dismissed: bool = False  # its id would not join next any more
    error: str = ""
    claimed: Callable[[], None] | None = None  # starts an ordinary rank when this one is gone
    withdrawn: bool = False  # the change that claimed it is over, and waits for its exit
    heard: float = 0.0


def next_ids(taken: Iterable[int], capacity: int, count: int) -> list[int]:
    """The ids that newcomers would take: the lowest that are free."""
    used = set(taken)
    return [rank for rank in range(capacity) if rank not in used][:count]


class SpareRanks:
    """Used on the head's event loop."""

    def __init__(
        self,
        count: int,
        capacity: int,
        *,
        taken: Callable[[], Iterable[int] | None],
        start: Callable[[int], None],
        stop: Callable[[int], None],
        start_timeout_s: float = 120.0,
        stall_timeout_s: float = 2.0,
    ) -> None:
        """
        Args:
            count: how many are kept.
            taken: ids that no spare may have; None: something changes, nothing is to be started.
            start: starts the process of a spare; raises FlexpertError if it would not fit.
            stop: tells one to end.
            start_timeout_s, stall_timeout_s: silence until one is replaced, before and after its
                first report.
        """
        self._count = count
        self._capacity = capacity
        self._taken = taken
        self._start = start
        self._stop = stop
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._spares: dict[int, _Spare] = {}
        self._task: asyncio.Task[None] | None = None
        self._wait_s = 0.0
        self._refused = ""

    def run(self) -> None:
        """From now on spares are kept."""
        if self._count:
            self._task = asyncio.get_running_loop().create_task(self._keep())

    def close(self) -> None:
        """No more are started; those that are there are told to end."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for rank, spare in self._spares.items():
            spare.claimed = None
            self._stop(rank)

    # ---- for a change -------------------------------------------------------------------------

    def take(self, rank: int, spawn: Callable[[], None]) -> tuple[bool, msg.Hello | None]:
        """A change adds this id: (whether a process for it is there already, its first report).

        The report is None while the process is starting; all it says goes to the coordinator from
        now on. One that is ending has to be gone first: `spawn` is called then.
        """
        spare = self._spares.get(rank)
        if spare is None:
            return False, None
        if spare.ends:
            spare.claimed = spawn
            return True, None
        del self._spares[rank]
        return True, spare.hello

    def withdraw(self, rank: int) -> None:
        """The change that claimed one that is ending does not want it any more."""
        self._spares[rank].claimed = None
        self._spares[rank].withdrawn = True

    @property
    def held(self) -> Mapping[int, msg.MemoryUse]:
        """Memory that spares have already; of a change that adds their ids it is not used by
        others."""
        return {rank: spare.used for rank, spare in self._spares.items()}

    def views(self) -> list[SpareView]:
        return [
            SpareView(id=rank, pid=spare.hello.pid if spare.hello else 0, ready=bool(spare.hello))
            for rank, spare in sorted(self._spares.items())
            if not spare.ends
        ]

    # ---- what they report ---------------------------------------------------------------------

    def __contains__(self, rank: int) -> bool:
        return rank in self._spares

    def on_report(self, rank: int, report: msg.Report) -> None:
        """Raises: Contradiction: a spare says nothing else."""
        spare = self._spares[rank]
        spare.heard = time.monotonic()
        match report:
            case msg.Hello() if spare.hello is None:
                spare.hello = report
                self._wait_s = 0.0
                log.info("spare rank %d (pid %d) is ready", rank, report.pid)
            case msg.Alive():
                spare.used = report.used
            case msg.Unable(error):
                spare.error = error
                self._end(rank)
            case _:
                raise msg.Contradiction(f"a spare rank says {type(report).__name__}")

    def on_cut_off(self, rank: int, why: str) -> None:
        self._spares[rank].error = f"it {why}"
        self._end(rank)

    def on_disconnected(self, rank: int) -> None:
        self._end(rank)

    def on_exit(self, rank: int, why: str) -> bool:
        """The process is certainly gone. Returns whether a change waits to hear that."""
        spare = self._spares.pop(rank)
        if self._task is not None and not spare.dismissed:
            self._wait_s = min(_LONGEST_WAIT_S, max(_SHORTEST_WAIT_S, 2 * self._wait_s))
            reason = f": {spare.error or why}" if spare.error or why else ""
            log.warning("spare rank %d exited%s", rank, reason)
        if spare.claimed is not None:
            spare.claimed()
        return spare.withdrawn

    def _end(self, rank: int) -> None:
        self._spares[rank].ends = True
        self._stop(rank)

    # ---- keeping them -------------------------------------------------------------------------

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._wait_s or _LOOK_S)
            self._replace_silent(time.monotonic())
            taken = self._taken()
            if taken is None or any(spare.hello is None for spare in self._spares.values()):
                continue
            free = next_ids(taken, self._capacity, self._count)
            missing = [rank for rank in free if rank not in self._spares]
            if missing and len(self._spares) < self._count:
                self._begin(missing[0])
            elif missing:  # others would join before one of those that wait
                self._dismiss(max(rank for rank in self._spares if rank not in free))

    def _replace_silent(self, now: float) -> None:
        for rank, spare in list(self._spares.items()):
            limit_s = self._stall_timeout_s if spare.hello else self._start_timeout_s
            if not spare.ends and now - spare.heard > limit_s + _LOOK_S:
                spare.error = f"nothing was heard of it for {now - spare.heard:.1f} s"
                self._end(rank)

    def _dismiss(self, rank: int) -> None:
        if not self._spares[rank].ends:
            self._spares[rank].dismissed = True
            self._end(rank)

    def _begin(self, rank: int) -> None:
        try:
            self._start(rank)
        except FlexpertError as error:
            if str(error) != self._refused:
                log.warning("no spare rank %d: %s", rank, error)
            self._refused, self._wait_s = str(error), _LONGEST_WAIT_S
            return
        self._refused = ""
        self._spares[rank] = _Spare(heard=time.monotonic())
