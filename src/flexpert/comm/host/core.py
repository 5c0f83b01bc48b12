"""What the parts of a HostBuffer share: the kernels' struct, the locks, where this rank stands.

`exchanging` is held by every call that uses the links, `changing` by every call that changes what
they are, `signalling` by what any thread tells the kernels, so that it does not meet `close`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import Any

from flexpert.comm.buffer import BufferSpec, Received
from flexpert.comm.errors import CommError, Interrupted, RankLost, StaleEpoch
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.codes import (
    COMBINE,
    NO_MEMORY,
    PHASES,
    WRITTEN_OVER,
    WRONG_MODE,
    WRONG_PAYLOAD,
)
from flexpert.comm.host.window import HostWindow
from flexpert.comm.window_layout import (
    COMBINE_FLAG_AT,
    DISPATCH_FLAG_AT,
    DOORBELL_AT,
    DTYPES,
    HELLO_AT,
    LEASES_AT,
    RELAYED_FLAGS_AT,
    ROWS_AT,
    SHARED_VERSION_AT,
    VOTES_AT,
    WAITERS_AT,
    check_spec,
    layout,
)


class State(Enum):
    """Where this rank stands between dispatch and combine.

    BETWEEN → begin_dispatch → DISPATCHED → receive → RECEIVED → begin_combine → COMBINED
    → receive → BETWEEN. Whatever stops one of these, be it a timeout or Ctrl-C, leaves it BROKEN;
    only `set_active` leads out.
    """

    BETWEEN = 0
    DISPATCHED = 1
    RECEIVED = 2
    COMBINED = 3
    BROKEN = 4
    CLOSED = 5


class Core:
    """Owner of the window and of the struct that kernels.c works on.

    b: the struct, `fx_buffer *`.
    lenient: who does not answer is masked.
    state, epoch, sequence, posted, must_vote, received: changed under `exchanging`.
    posted: the own vote of this step is out, and the others' are not collected yet.
    must_vote: a dispatch has to wait for a vote first, since a peer may be reading what the last
        one sent.
    received: what the last dispatch brought.
    turns: see `Buffer`; of waits in Python.
    """

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        timeout_s: float,
        lenient: bool,
        listener: Callable[[int, bool], None] | None,
        group: bytes = b"",
    ) -> None:
        """listener: see `HostBuffer`; group: see `WindowAddress`."""
        self.rank = rank
        self.spec = spec
        self.timeout_s = timeout_s
        self.lenient = lenient
        self._listener = listener
        self.window = HostWindow(rank, spec, group)

        self.exchanging = threading.RLock()
        self.changing = threading.RLock()
        self.signalling = threading.RLock()

        self.state = State.BETWEEN
        self.epoch = 0
        self.sequence = 0
        self.posted = False
        self.must_vote = False
        self.received: Received | None = None
        self.turns = 0

        self.b = b = ffi.new("fx_buffer *")
        _describe(b, rank, spec, self.window.address.nonce)
        b.lenient = lenient
        b.ballot_bytes = -1
        b.control[rank] = self.window.control
        b.inbox[rank] = b.outbox[rank] = self.window.export_memory().at
        b.shared[rank] = self.window.shared.data_ptr()
        if not self.window.shares_results:
            b.shared_results = 0
        if lib.fx_open(b) != 0:
            self.interrupt()
            self.end()
            self.free()
            raise MemoryError("no memory for the plan of an exchange")

    def resize(self, capacity: int) -> None:
        """Under `changing`. Raises: ValueError: too many."""
        spec = replace(self.spec, capacity=capacity)
        check_spec(spec)
        self.spec = spec
        self.b.capacity = capacity

    def end(self) -> None:
        """From now on other threads tell the kernels nothing."""
        with self.signalling:
            self.state = State.CLOSED

    def free(self) -> None:
        """The window and the kernels' memory; once, after `end`."""
        self.window.close()
        lib.fx_close(self.b)

    # ---- where this rank stands ---------------------------------------------------------------

    def check_open(self) -> None:
        if self.state is State.CLOSED:
            raise CommError(f"the buffer of rank {self.rank} is closed")

    def check_whole(self) -> None:
        """No exchange of this epoch was left incomplete."""
        self.check_open()
        if lib.fx_is_interrupted(self.b):
            raise self.interrupted("call")
        if self.state is State.BROKEN:
            raise StaleEpoch(
                f"epoch {self.epoch} is over for rank {self.rank}: an exchange was incomplete; "
                "begin another with set_active"
            )

    def holds(self, received: Received) -> bool:
        """Whether the rows of a dispatch still lie where they arrived."""
        return received is self.received and self.state is State.RECEIVED

    def interrupted(self, phase: str) -> Interrupted:
        return Interrupted(f"rank {self.rank} was interrupted in {phase} (epoch {self.epoch})")

    def nonsense(self, peer: int, what: str) -> CommError:
        return CommError(
            f"rank {peer} sent {what} (epoch {self.epoch}, exchange {self.sequence}); "
            "it should be removed"
        )

    def bad_rows(self, why: int, peer: int) -> Exception:
        """What a dispatch brought is wrong, or there is no room for it."""
        if why == NO_MEMORY:
            return MemoryError("no memory for an exchange")
        what = "another kind of rows" if why == WRONG_PAYLOAD else "rows or slots that cannot be"
        return self.nonsense(peer, what)

    def bad_results(self, why: int, peer: int) -> CommError:
        """What a combine brought is wrong, or is not there any more."""
        if why == WRITTEN_OVER:
            gone_on = {peer: "went on without this rank"}
            return RankLost((peer,), PHASES[COMBINE], self.epoch, gone_on)
        what = "another reduce mode" if why == WRONG_MODE else "a wrong number of rows"
        return self.nonsense(peer, what)

    # ---- what any thread may tell the kernels -------------------------------------------------

    def gone(self, peer: int) -> int:
        """Why waiting for a peer is in vain; 0: it is not."""
        return int(lib.fx_gone(self.b, peer))

    def set_gone(self, peer: int, why: int) -> None:
        with self.signalling:
            if self.state is not State.CLOSED:
                lib.fx_set_gone(self.b, peer, why)
                if self._listener is not None:
                    self._listener(peer, why != 0)

    def ring(self) -> None:
        with self.signalling:
            if self.state is not State.CLOSED:
                lib.fx_ring(self.b)

    def interrupt(self) -> None:
        with self.signalling:
            if self.state is not State.CLOSED:
                lib.fx_interrupt(self.b)


def _describe(b: Any, rank: int, spec: BufferSpec, nonce: bytes) -> None:
    """Tell the kernels who they work for and where everything lies."""
    where = layout(spec)
    values = {
        "rank": rank,
        "capacity": spec.capacity,
        "max_tokens": spec.max_tokens,
        "hidden": spec.hidden,
        "topk": spec.topk,
        "dtype": DTYPES[spec.dtype],
        "row_bytes": where.row_bytes,
        "result_stride": where.result_stride,
        "meta_bytes": where.meta_bytes,
        "doorbell_at": DOORBELL_AT,
        "waiters_at": WAITERS_AT,
        "leases_at": LEASES_AT,
        "hello_at": HELLO_AT,
        "votes_at": VOTES_AT,
        "dispatch_flag_at": DISPATCH_FLAG_AT,
        "combine_flag_at": COMBINE_FLAG_AT,
        "relayed_flags_at": RELAYED_FLAGS_AT,
        "rows_at": ROWS_AT,
        "results_at": where.results_at,
        "shared_version_at": SHARED_VERSION_AT,
        "shared_results_at": where.shared_results_at,
        "shared_results": where.shared_results,
        "partials_at": where.partials_at,
        "partial_stride": where.partial_stride,
    }
    for name, value in values.items():
        setattr(b, name, value)
    ffi.memmove(b.nonce, nonce, len(nonce))
