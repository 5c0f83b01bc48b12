"""Which rank holds the others up: they wait for it, though it has no more to do than they. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

WINDOW_S = 5.0  # that is looked at
WINDOWS = 2  # one after the other, before it is said or taken back
SLOW = 0.25  # of a window: waited for one rank, beyond what is waited for the next


@dataclass(frozen=True, slots=True)
class WaitedFor:
    """A rank's figures. waited_s: peer → waited for it since the process began; running:
    sequences."""

    instance: str
    waited_s: Mapping[int, float]
    running: int


@dataclass(frozen=True, slots=True)
class SlowRank:
    """A rank is slow, or is no longer. share: of the time, that the others waited for it."""

    rank: int
    slow: bool
    share: float

    @property
    def text(self) -> str:
        if not self.slow:
            return f"rank {self.rank} is no longer slow"
        return (
            f"rank {self.rank} is slow: the others waited for it {self.share:.0%} of the last "
            f"{WINDOW_S * WINDOWS:.0f} s, and it has no more requests than they: look at what else "
            "runs on its host, or scale it away"
        )


def waited_shares(
    before: Mapping[int, WaitedFor], after: Mapping[int, WaitedFor], seconds: float
) -> dict[int, float]:
    """rank → share of the time that the others waited for it, on average over them.

    Only of processes that were there before and after.
    """
    same = [
        rank
        for rank, seen in after.items()
        if rank in before and before[rank].instance == seen.instance
    ]
    shares = {}
    for rank in same:
        waits = [
            max(0.0, after[o].waited_s.get(rank, 0.0) - before[o].waited_s.get(rank, 0.0))
            for o in same
            if o != rank
        ]
        if waits:
            shares[rank] = sum(waits) / len(waits) / seconds
    return shares


def slowest(shares: Mapping[int, float], running: Mapping[int, float]) -> int | None:
    """The rank that is waited for clearly longer than any other, unless it has more to do.

    Of two ranks the other's share is what is waited for it.
    """
    if len(shares) < 2:
        return None
    first, second = sorted(shares, key=lambda rank: shares[rank], reverse=True)[:2]
    busier = running[first] > median(running.values())
    return first if shares[first] - shares[second] > SLOW and not busier else None


class SlowRanks:
    """Looked at now and then; a change is told once."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._before: dict[int, WaitedFor] = {}
        self._suspect: int | None = None
        self._times = 0  # windows one after the other in which it was the same
        self._said: int | None = None

    def look(self, now: float, ranks: Mapping[int, WaitedFor]) -> list[SlowRank]:
        """Once a window is over: what has changed."""
        if self._since is None:
            self._since, self._before = now, dict(ranks)
        seconds = now - self._since
        if seconds < WINDOW_S:
            return []
        shares = waited_shares(self._before, ranks, seconds)
        running = {rank: (self._before[rank].running + ranks[rank].running) / 2 for rank in shares}
        found = slowest(shares, running)
        self._since, self._before = now, dict(ranks)
        self._times = self._times + 1 if found == self._suspect else 1
        self._suspect = found
        if self._times < WINDOWS or found == self._said:
            return []
        changes = []
        if self._said is not None:
            changes.append(SlowRank(self._said, slow=False, share=shares.get(self._said, 0.0)))
        if found is not None:
            changes.append(SlowRank(found, slow=True, share=shares[found]))
        self._said = found
        return changes
