"""Epochs are prepared in a thread in the background of the step loop, one after the other.

Whatever a preparation takes (connections, places of experts) is either the running epoch's in the
end or given back, and only once: by whoever comes second, the end of the work or its withdrawal.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from flexpert.comm import Buffer, CommError
from flexpert.engine import rank_protocol as msg
from flexpert.engine.epoch import Cancelled, PreparedEpoch, prepare_epoch
from flexpert.engine.head_store import HeadStore
from flexpert.engine.remote_peers import RemotePeers
from flexpert.errors import FlexpertError
from flexpert.kernels.device_stream import DeviceStream
from flexpert.models.source import ModelSource
from flexpert.moe.expert_cache import CachedExperts
from flexpert.moe.expert_store import ExpertFiles, Key, Store
from flexpert.moe.moe_layers import ElasticMoELayers

log = logging.getLogger("flexpert")

_LAST_S = 5.0  # for the thread when the rank ends


class Preparation(threading.Thread):
    """Prepares an epoch and hands the result over.

    Whoever comes second, the end of the work or `cancel`, undoes it; a later preparation begins
    only after this one, so it never meets half-open connections to the same ids.
    """

    def __init__(
        self,
        plan: msg.Prepare,
        *,
        work: Callable[[threading.Event], PreparedEpoch],
        undo: Callable[[PreparedEpoch | str], None],
        done: Callable[[PreparationEnded], None],
        after: threading.Thread | None,
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
            log.debug("the preparation of epoch %d failed", self.plan.epoch, exc_info=True)
            result = f"{type(error).__name__}: {error}"
        with self._lock:
            self._result = result
            if self._cancelled.is_set():
                self._undo(result)
                return
        self._done(PreparationEnded(self, result))


class _Drop(threading.Thread):
    """Gives back experts of an epoch that is over, which no step has to wait for."""

    def __init__(
        self, store: Store, experts: frozenset[Key], after: threading.Thread | None
    ) -> None:
        super().__init__(name="drop", daemon=True)
        self._store = store
        self._experts = experts
        self._after = after

    def run(self) -> None:
        if self._after:
            self._after.join()
            self._after = None
        self._store.drop(self._experts)


@dataclass(frozen=True, slots=True)
class PreparationEnded:
    """A preparation's thread has ended, and was not cancelled.

    result: or why it failed. error: why the rank cannot use it, for people.
    """

    preparation: Preparation
    result: PreparedEpoch | str
    error: str = ""


class EpochPreparer:
    """The preparation that counts, and what it has brought; used by the step loop's thread.

    experts: of the running epoch. prepared: complete, and not taken yet.
    """

    def __init__(
        self,
        buffer: Buffer,
        source: ModelSource,
        store: Store,
        moe: ElasticMoELayers,
        stream: DeviceStream,
        meeting: HeadStore,
        remote: RemotePeers,
        *,
        report: Callable[[msg.Report], None],
        done: Callable[[PreparationEnded], None],
    ) -> None:
        """
        Args:
            meeting: through which the buffer meets ranks of other machines.
            remote: their memory.
            report: hears of the progress, in the preparation's thread.
            done: hears of the end, there too.
        """
        self.experts: frozenset[Key] = frozenset()
        self.prepared: PreparedEpoch | None = None
        self._buffer = buffer
        self._source = source
        self._store = store
        self._moe = moe
        self._stream = stream
        self._meeting = meeting
        self._remote = remote
        self._report = report
        self._done = done
        self._cached: tuple[bytes, CachedExperts] | None = None  # by its address
        self._current: Preparation | None = None
        # uses the store, perhaps still; whoever comes next waits for it
        self._latest: threading.Thread | None = None

    def start(self, plan: msg.Prepare) -> None:
        """Begin; nothing else is under way or prepared (`withdraw`)."""
        self._current = self._latest = Preparation(
            plan,
            work=lambda cancelled: self._work(plan, cancelled),
            undo=lambda result: self.undo(plan, result),
            done=self._done,
            after=self._latest,
        )
        self._current.start()

    def ended(self, event: PreparationEnded) -> bool:
        """Whether it counts, which one that was withdrawn meanwhile does not."""
        if event.preparation is not self._current:
            return False
        self._current = None
        return True

    def withdraw(self) -> None:
        """Back to how it was before `start`."""
        if self._current:
            self._current.cancel()
            self._current = None
        if self.prepared:
            self.undo(self.prepared.plan, self.prepared)
            self.prepared = None

    def undo(self, plan: msg.Prepare, result: PreparedEpoch | str) -> None:
        """Part from new peers and give back the memory of experts that were loaded in vain.

        May run in the preparation's thread.
        """
        self._buffer.disconnect(set(plan.members) - set(self._buffer.active))
        self._remote.rest(self._buffer.active)
        if not isinstance(result, str):
            self._store.drop(result.experts - self.experts)

    def take(self) -> PreparedEpoch:
        """The epoch that is switched to now; its experts are put in force by `hold`."""
        prepared, self.prepared = self.prepared, None
        assert prepared is not None  # by the rules of `rank_states`
        return prepared

    def hold(self, experts: frozenset[Key]) -> None:
        """These are the running epoch's; others of the one before are given back, in the
        background. Its members have loaded all they need, so none reads this rank's memory."""
        self._remote.rest(self._buffer.active)
        gone, self.experts = self.experts - experts, experts
        if gone:
            self._latest = _Drop(self._store, gone, self._latest)
            self._latest.start()

    def close(self) -> None:
        """Withdraw, and wait for the thread as long as that may take."""
        self.withdraw()
        if self._latest:
            self._latest.join(timeout=_LAST_S)

    def _files(self, cache: bytes) -> ExpertFiles:
        """The checkpoint, behind the host's copy of the experts where that can be read."""
        if not cache:
            return self._source
        if self._cached is None or self._cached[0] != cache:
            shapes, experts = self._source.expert_shapes(), self._source.info.experts
            try:
                self._cached = cache, CachedExperts(cache, shapes, experts, self._source)
            except CommError:  # its process has just ended
                return self._source
        return self._cached[1]

    def _work(self, plan: msg.Prepare, cancelled: threading.Event) -> PreparedEpoch:
        with self._stream.aside(), self._meeting.until(cancelled):
            try:
                return prepare_epoch(
                    plan,
                    buffer=self._buffer,
                    files=self._files(plan.cache),
                    held=self.experts,
                    store=self._store,
                    moe=self._moe,
                    remote=self._remote,
                    cancelled=cancelled,
                    progress=lambda share: self._report(msg.Progress(plan.epoch, share)),
                )
            finally:
                self._stream.synchronize()
