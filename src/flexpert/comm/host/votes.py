"""The step barrier: each rank tells the others something, and waits until all have."""

from __future__ import annotations

import time

from flexpert.comm.errors import CommError
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.arguments import FOREVER_NS, limit_ns
from flexpert.comm.host.changes import Changes
from flexpert.comm.host.codes import AGAIN, INTERRUPTED, OK, VOTE
from flexpert.comm.host.core import Core
from flexpert.comm.host.members import Members
from flexpert.comm.host.remote import Remote
from flexpert.comm.host.waits import POLL_FIRST_NS, POLL_MOST_NS, SLICE_NS, Waiter
from flexpert.comm.window_layout import LINE, VOTE_BYTES


class Votes:
    """See `Buffer` for what they are, kernels.c for how they travel."""

    def __init__(
        self, core: Core, members: Members, changes: Changes, remote: Remote, waiter: Waiter
    ) -> None:
        self._core = core
        self._members = members
        self._changes = changes
        self._remote = remote
        self._waiter = waiter

    def post(self, payload: bytes) -> None:
        if len(payload) > VOTE_BYTES:
            raise ValueError(f"a vote holds {VOTE_BYTES} bytes, not {len(payload)}")
        core = self._core
        with core.exchanging:
            self._changes.begin("vote between dispatch and combine")
            if core.posted:
                raise CommError(f"second vote in one step (epoch {core.epoch})")
            core.posted = True
            lib.fx_post_vote(core.b, payload, len(payload))
            self._remote.flush()

    def wait(self, timeout_s: float | None) -> bool:
        """For any; see `Buffer.wait_for_vote`."""
        most_ns = FOREVER_NS if timeout_s is None else limit_ns(timeout_s)
        core = self._core
        with core.exchanging:
            self._changes.begin("vote between dispatch and combine")
            deadline_ns = time.monotonic_ns() + most_ns
            slice_ns = POLL_FIRST_NS
            while True:
                core.turns += 1
                polls = self._remote.flush()
                slice_ns = min(2 * slice_ns, POLL_MOST_NS) if polls else SLICE_NS
                how = lib.fx_wait_any_vote(core.b, deadline_ns, slice_ns)
                if how == INTERRUPTED:
                    raise core.interrupted("vote")
                if how != AGAIN:
                    return bool(how == OK)
                self._changes.apply_now()

    def collect(self, timeout_s: float) -> dict[int, bytes]:
        core = self._core
        with core.exchanging:
            core.check_whole()
            if not core.posted:
                raise CommError(f"the own vote is not posted yet (epoch {core.epoch})")
            self._waiter.wait(VOTE, timeout_s)
            votes: dict[int, bytes] = {}
            for rank in self._members.active:
                vote = bytes(ffi.buffer(core.b.votes[rank], LINE))
                length = int.from_bytes(vote[:4], "little")
                if length > VOTE_BYTES:
                    raise core.nonsense(rank, f"a vote of {length} bytes")
                votes[rank] = vote[16 : 16 + length]
            lib.fx_end_vote(core.b)
            core.posted = False
            core.must_vote = False
            self._members.parted.difference_update(votes)
            return votes
