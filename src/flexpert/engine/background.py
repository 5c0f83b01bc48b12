"""What a rank does in threads beside its step loop: preparing an epoch, fetching KV blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from flexpert.comm import CommError
from flexpert.engine.arrivals import Arrivals
from flexpert.engine.epoch import Cancelled, PreparedEpoch
from flexpert.engine.rank_protocol import Prepare
from flexpert.errors import FlexpertError
from flexpert.models.kv_cache import KVCache

_FETCH_BLOCKS = 64  # copied at once


class Preparation(threading.Thread):
    """Prepares an epoch and hands the result over.

    Whoever comes second, the end of the work or `cancel`, undoes it; a later preparation begins
    only after this one, so it never meets half-open connections to the same ids.
    """

    def __init__(
        self,
        plan: Prepare,
        *,
        work: Callable[[threading.Event], PreparedEpoch],
        undo: Callable[[PreparedEpoch | str], None],
        done: Callable[[PreparationEnded], None],
        after: Preparation | None,
    ) -> None:
        """
        Args:
            work: told by the event that it is cancelled; see `prepare_epoch`.
            undo: of what work has returned, or of why it failed.
            done: called in the thread, unless it is cancelled.
            after: the one before, perhaps still at work.
        """
        super().__init__(name=f"prepare-{plan.epoch}", daemon=True)
        self.plan = plan
        self._work = work
        self._undo = undo
        self._done = done
        self._after = after
        self._cancelled = threading.Event()
        self._result: PreparedEpoch | str | None = None  # None: it is not over
        self._lock = threading.Lock()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled.set()
            if self._result is not None:
                self._undo(self._result)

    def run(self) -> None:
        if self._after:
            self._after.join()
            self._after = None
        result: PreparedEpoch | str
        try:
            result = self._work(self._cancelled)
        except Cancelled:
            result = "cancelled"
        except (FlexpertError, CommError, OSError, ValueError, RuntimeError) as error:
            result = f"{type(error).__name__}: {error}"
        with self._lock:
            self._result = result
            if self._cancelled.is_set():
                self._undo(result)
                return
        self._done(PreparationEnded(self, result))


class KVFetch(threading.Thread):
    """Copies KV blocks of a rank that leaves.

    theirs: that rank's cache, once all is copied. over: the thread is through, and so is who was
    told; set by that one.
    """

    def __init__(
        self,
        epoch: int,
        source: int,
        arrivals: Arrivals,
        pairs: list[tuple[int, int]],
        *,
        own: KVCache,
        theirs: Callable[[], KVCache],
        done: Callable[[FetchEnded], None],
    ) -> None:
        """
        Args:
            pairs: (block there, block here).
            theirs: opens the cache. Raises: CommError, ValueError
            done: called in the thread.
        """
        super().__init__(name=f"fetch-{source}", daemon=True)
        self.epoch = epoch
        self.source = source
        self.arrivals = arrivals
        self.theirs: KVCache | None = None
        self.over = False
        self.dropped = False
        self._pairs = pairs
        self._own = own
        self._open = theirs
        self._done = done

    def drop(self) -> None:
        """Nobody takes what is left; called in the step loop's thread. Blocks that the thread may
        still write to stay taken until it is through."""
        self.dropped = True
        if self.over:
            self.arrivals.drop()

    def run(self) -> None:
        self._done(FetchEnded(self, self._copy()))

    def _copy(self) -> int | None:
        try:
            theirs = self._open()
        except (CommError, ValueError):  # it is gone or its address is none: nothing to copy
            return None
        copied = 0
        for at in range(0, len(self._pairs), _FETCH_BLOCKS):
            if self.dropped:
                return None
            copied += self._own.copy_from(theirs, self._pairs[at : at + _FETCH_BLOCKS])
        self.theirs = theirs
        return copied


@dataclass(frozen=True, slots=True)
class PreparationEnded:
    """A preparation's thread is through, and was not cancelled. result: or why it failed."""

    preparation: Preparation
    result: PreparedEpoch | str


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """A fetch's thread is through. copied: bytes, or None if it could not be done in full."""

    fetch: KVFetch
    copied: int | None


BackgroundEvent: TypeAlias = PreparationEnded | FetchEnded
