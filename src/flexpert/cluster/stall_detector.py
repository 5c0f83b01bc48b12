"""Which ranks have stalled: those that neither speak nor work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from flexpert.cluster.interfaces import HeadInterface, Timer, Work
from flexpert.cluster.rank_state import RankState

log = logging.getLogger("flexpert")

PART = "the watch for ranks that hang"  # of the service

# Of the stall timeout: a silent rank is terminated after STALLED of it; looked at WATCHES times.
STALLED = 0.9
STUCK = 0.7  # the same for a rank whose step loop hangs: it looks at it only ten times
WATCHES = 20
# Of a processor: who does less does nothing. Threads that wait for Python's lock, which a hung one
# holds, ask for it every 5 ms; that takes up to 0.02.
IDLE = 0.05


def worked(
    before: Work | None, after: Work | None, seconds: float, starved: frozenset[int]
) -> bool:
    """Whether a silent process did anything in these seconds, or could not: slow is not dead.

    starved: its threads that wanted a processor at each of several looks. One look says nothing
    on a busy machine: a thread that asks for Python's lock every 5 ms may well be waiting then.
    """
    if before is None or after is None:
        return before is not after
    return (
        bool(starved)
        or after.faults > before.faults
        or after.processor_s - before.processor_s > IDLE * seconds
    )


class Watch:
    """Terminates them; such an exit is an ordinary loss.

    ranks: the coordinator's records, as they are. warn: tells the people, and of
    which rank.
    """

    def __init__(
        self,
        ranks: dict[int, RankState],
        head: HeadInterface,
        stall_timeout_s: float,
        warn: Callable[[str, int], None],
    ) -> None:
        self._ranks = ranks
        self._head = head
        self._stall_s = stall_timeout_s
        self._warn = warn
        self._timer: Timer | None = None
        self._looked = 0.0
        self._held_up = float("-inf")  # until when the head itself was
        self._failed = ""  # why the latest look did

    def start(self) -> None:
        self._looked = self._head.now()
        self._look_again()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()

    def heard(self, rank_state: RankState) -> None:
        """A rank has said something."""
        rank_state.heard, rank_state.looked, rank_state.suspect = self._head.now(), None, False

    def stuck(self, rank: int, seconds: float) -> None:
        """A rank says that it lives, but that its step loop has done nothing for a while."""
        if seconds >= STUCK * self._stall_s:
            self.terminate([rank], f"does nothing for {seconds:.1f} s, its step loop hangs")

    def late(self, due: float) -> bool:
        """Whether the head itself was held up: reports may lie there unread, and nobody is to
        blame before they are read."""
        limit_s = self._stall_s / 4
        now = self._head.now()
        return now - due > limit_s or now - self._held_up < limit_s

    def terminate(self, ranks: Iterable[int], why: str) -> None:
        for rank in sorted(ranks):
            rank_state = self._ranks.get(rank)
            if rank_state and rank_state.ended:  # it is lost already, and does not come to its end
                self._head.kill(rank)
            elif rank_state and rank_state.state != "stalled":
                rank_state.state, rank_state.error = "stalled", why
                rank_state.found_lost(self._head.now())
                self._warn(f"rank {rank} {why} and is terminated", rank)
                self._head.kill(rank)

    def _look_again(self) -> None:
        """One look; whatever becomes of it, there is a next one."""
        try:
            self._look()
        except Exception as error:
            why = repr(error)
            if why != self._failed:  # once, not twenty times in a stall timeout
                log.exception("ranks could not be watched")
            self._failed = why
            self._head.impair(PART, why)
        else:
            if self._failed:
                self._failed = ""
                self._head.impair(PART, None)
        self._timer = self._head.call_later(self._stall_s / WATCHES, self._look_again)

    def _look(self) -> None:
        now = self._head.now()
        late = now - self._looked > self._stall_s / 4
        if late:
            self._held_up = now
        self._looked = now
        for rank, rank_state in list(self._ranks.items()):
            if rank_state.state == "starting":
                continue
            if late:
                self.heard(rank_state)
            silent_s = now - rank_state.heard
            if silent_s < self._stall_s / 2 or rank_state.state == "stalled":
                continue
            work = self._head.work(rank)
            runnable = work.runnable if work else frozenset()
            if rank_state.looked is None:
                rank_state.looked, rank_state.work, rank_state.starved = now, work, runnable
                continue
            rank_state.starved &= runnable
            if silent_s < (STALLED - 1 / WATCHES) * self._stall_s:
                continue
            if worked(rank_state.work, work, now - rank_state.looked, rank_state.starved):
                self.heard(rank_state)
            elif rank_state.suspect:
                self.terminate([rank], f"was silent for {silent_s:.1f} s")
            else:  # its last word may be on its way
                rank_state.suspect = True
