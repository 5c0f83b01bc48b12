"""Waiting for what all active ranks write: with a limit, and for none that will not come.

All sleeping happens in kernels.c, without the GIL, on the futex in the own window.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from flexpert.comm.errors import CommError, RankLost, RankTimeout
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.arguments import FOREVER_NS, limit_ns
from flexpert.comm.host.codes import INTERRUPTED, LOST, OK, PHASES, TIMEOUT, VOTE, WHY
from flexpert.comm.host.core import Core
from flexpert.comm.host.members import Members
from flexpert.comm.host.remote import Remote
from flexpert.comm.window_layout import MAX_CAPACITY

SLICE_NS = 100_000_000  # back to Python this often, so that it can act on signals
POLL_FIRST_NS, POLL_MOST_NS = 50_000, 1_000_000  # while a peer behind NIXL is waited for
_LATE = 8  # a share of the time limit that may go into sending on
_BEATS = 8  # of a waiting rank, in the time limit
_FRESH = 2.5  # beats: so old may one be


def _period_ns(limit_ns: int) -> int:
    """Between the beats of a rank that waits for so long at most."""
    return max(limit_ns // _BEATS, POLL_MOST_NS)


@functools.lru_cache(maxsize=4)
def _slice_ns(limit_s: float) -> int:
    """Until Python looks, of a wait with this limit."""
    return min(_period_ns(limit_ns(limit_s)), SLICE_NS)


class _Waiting:
    """Who else waits, during one wait of this rank.

    A rank that was stopped halfway through its sends leaves one peer waiting for its dispatch, and
    another, a phase further, for what the first will send then: both run out of time together. So
    ranks that wait for long beat (kernels.c), and only those that do not are taken for stopped.
    """

    def __init__(self, b: Any, what: int, limit_ns: int, begun_ns: int) -> None:
        self._b = b
        self._what = what
        self.period_ns = _period_ns(limit_ns)
        self._next_ns = begun_ns + self.period_ns
        self._beats: dict[int, tuple[int, int]] = {}  # peer → its last beat, seen when

    def listen(self, now_ns: int) -> None:
        """Beat, and look for the beats of others, once a period."""
        if now_ns < self._next_ns:
            return
        self._next_ns = now_ns + self.period_ns
        lib.fx_beat(self._b)
        for at in range(self._b.active_count):
            peer = self._b.active[at]
            beat = lib.fx_beat_of(self._b, peer)
            last = self._beats.get(peer)
            if last is None:
                self._beats[peer] = (beat, -FOREVER_NS)  # of an earlier wait, perhaps
            elif beat != last[0]:
                self._beats[peer] = (beat, now_ns)

    def is_stopped(self, peer: int, now_ns: int) -> bool:
        """Whether a missing peer is to blame. One whose word comes through a gateway is not while
        the gateway itself is silent: it may have said all, and gone on."""
        gateway = lib.fx_gateway_of(self._b, peer, self._what)
        return not self._waits(peer, now_ns) and (gateway < 0 or self._waits(gateway, now_ns))

    def _waits(self, peer: int, now_ns: int) -> bool:
        """Whether a peer has beaten lately."""
        _, seen_ns = self._beats.get(peer, (0, -FOREVER_NS))
        return now_ns - seen_ns < _FRESH * self.period_ns


class Waiter:
    """The waits of votes and exchanges; called under `Core.exchanging`."""

    def __init__(self, core: Core, members: Members, remote: Remote) -> None:
        self._core = core
        self._members = members
        self._remote = remote
        # reused by every wait
        self._missing = ffi.new("int32_t[]", MAX_CAPACITY)
        self._missing_count = ffi.new("int32_t *")

    def first_slice_ns(self) -> int:
        """After so long a wait of `native.c` goes on here."""
        return _slice_ns(self._core.timeout_s)

    def wait(
        self, what: int, timeout_s: float | None, begun_ns: int | None = None
    ) -> tuple[int, ...]:
        """Until all active ranks have written; returns those that were masked instead.

        what: DISPATCH, COMBINE or VOTE. begun_ns: since when this is waited for; None: now.
        """
        core, remote = self._core, self._remote
        limit_s = core.timeout_s if timeout_s is None else timeout_s
        begun_ns = time.monotonic_ns() if begun_ns is None else begun_ns
        most_ns = limit_ns(limit_s)
        deadline_ns = begun_ns + most_ns
        others = _Waiting(core.b, what, min(most_ns, limit_ns(core.timeout_s)), begun_ns)
        masked: list[int] = []
        poll_ns = POLL_FIRST_NS
        while True:
            core.turns += 1
            polls = remote.flush()
            poll_ns = POLL_FIRST_NS if remote.moved else min(2 * poll_ns, POLL_MOST_NS)
            how = lib.fx_wait(
                core.b,
                what,
                begun_ns,
                deadline_ns,
                poll_ns if polls else min(others.period_ns, SLICE_NS),
                self._missing,
                self._missing_count,
            )
            if core.b.to_open:
                self._members.open_places()
            if how == OK:
                if what != VOTE:
                    core.b.waited_ns[what] += time.monotonic_ns() - begun_ns
                if polls:
                    patience_s = min(limit_s, core.timeout_s) / _LATE
                    until_ns = time.monotonic_ns() + limit_ns(patience_s)
                    remote.send_on(self._members.active, until_ns)
                return tuple(sorted(masked))
            if how == INTERRUPTED:
                raise core.interrupted(PHASES[what])
            now_ns = time.monotonic_ns()
            others.listen(now_ns)
            if how not in (TIMEOUT, LOST):
                continue
            missing = sorted(self._missing[at] for at in range(self._missing_count[0]))
            if how == TIMEOUT and now_ns < begun_ns + 2 * most_ns:
                silent = [rank for rank in missing if others.is_stopped(rank, now_ns)]
                if len(silent) < len(missing):
                    missing = silent
                    deadline_ns = now_ns + others.period_ns
            if not missing:
                continue
            if not core.lenient:
                raise self._failed(tuple(missing), what, limit_s, lost=how == LOST)
            self._members.drop(missing)
            masked += missing

    def _failed(
        self, missing: tuple[int, ...], what: int, limit_s: float, *, lost: bool
    ) -> CommError:
        core = self._core
        if not lost:
            return RankTimeout(missing, PHASES[what], core.epoch, limit_s)
        why = {rank: WHY[core.gone(rank)] for rank in missing}
        return RankLost(missing, PHASES[what], core.epoch, why)
