"""Which lost ranks are started again, and when (pure).

An id that was lost is desired back. The first time it starts at once; if it exits again before it
was healthy for a while, each further start waits twice as long, and after so many short lives in a
row it is left out until somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Policy = Literal["always", "on-failure", "never"]

HEALTHY_S = 2.0  # a rank that was active for so long has come up well


class RestartPolicy:
    """desired: the ids that the last change that was asked for left active, now or again.

    Times are of one clock, in seconds.
    """

    def __init__(
        self, policy: Policy, *, limit: int, backoff_s: float, longest_backoff_s: float
    ) -> None:
        self.policy = policy
        self.desired: frozenset[int] = frozenset()
        self._limit = limit
        self._backoff_s = backoff_s
        self._longest_s = longest_backoff_s
        self._since: dict[int, float] = {}  # when it became active
        self._short: dict[int, int] = {}  # lives in a row that were too short
        self._not_before: dict[int, float] = {}
        self._of_hosts: set[int] = set()  # lost ids whose processes were other hosts'

    def leave_to_host(self, rank: int) -> None:
        """An id that is lost, and comes back only if its host does."""
        self._of_hosts.add(rank)
        self.desired -= {rank}

    def set_desired(self, ranks: Iterable[int]) -> None:
        """A change that was asked for is done: these shall be active. Old failures are forgiven."""
        self.desired = frozenset(ranks) - self._of_hosts
        for rank in self.desired:
            if rank in self.left_out:
                del self._short[rank]

    def active(self, rank: int, now: float) -> None:
        self._since.setdefault(rank, now)
        self._of_hosts.discard(rank)

    def exited(self, rank: int, status: int, now: float) -> None:
        """A process is gone that nobody asked to leave. status: of its exit; < 0: a signal."""
        since = self._since.pop(rank, None)
        if rank not in self.desired:
            return
        if self.policy == "never" or (self.policy == "on-failure" and status == 0):
            self.desired -= {rank}
            return
        healthy = since is not None and now - since >= HEALTHY_S
        short = self._short[rank] = 1 if healthy else self._short.get(rank, 0) + 1
        wait_s = 0.0 if short < 2 else min(self._longest_s, self._backoff_s * 2 ** (short - 2))
        self._not_before[rank] = now + wait_s

    def left(self, rank: int) -> None:
        """A process is gone that was asked to."""
        self._since.pop(rank, None)

    @property
    def left_out(self) -> frozenset[int]:
        """Wanted ids that are not started again."""
        return frozenset(r for r in self.desired if self._short.get(r, 0) >= self._limit)

    def missing(self, members: Iterable[int]) -> frozenset[int]:
        """The ids that are started again, now or later."""
        return self.desired - set(members) - self.left_out

    def due(self, members: Iterable[int], now: float) -> frozenset[int]:
        """The ids to start now."""
        return frozenset(
            rank for rank in self.missing(members) if self._not_before.get(rank, 0.0) <= now
        )

    def next_s(self, members: Iterable[int], now: float) -> float | None:
        """Seconds until some id is due; None if none will be."""
        times = [self._not_before.get(rank, 0.0) for rank in self.missing(members)]
        return max(0.0, min(times) - now) if times else None

    def all_s(self, members: Iterable[int], now: float) -> float:
        """Seconds until all that are missing are due."""
        times = [self._not_before.get(rank, 0.0) for rank in self.missing(members)]
        return max(0.0, max(times, default=now) - now)
