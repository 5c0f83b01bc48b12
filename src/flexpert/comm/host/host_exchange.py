"""Dispatch and combine: what is sent, what is received, and in which order they may be called.

What an exchange costs in Python is six calls into kernels.c and a few small tensors; everything
a peer needs to know is written by the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from flexpert.comm.buffer import (
    ExpertTable,
    MissingResults,
    Pending,
    Received,
    Reduce,
    Scales,
    Statistics,
)
from flexpert.comm.errors import CommError, StaleEpoch
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.arguments import check_rows, check_weights
from flexpert.comm.host.changes import Changes
from flexpert.comm.host.codes import (
    COMBINE,
    DISPATCH,
    NO_SUCH_EXPERT,
    PHASES,
    WRITTEN_OVER,
)
from flexpert.comm.host.core import Core, State
from flexpert.comm.host.host_received import HostReceived, Payload, Workspaces, payload_of
from flexpert.comm.host.members import Members
from flexpert.comm.host.remote import Remote
from flexpert.comm.host.waits import Waiter
from flexpert.comm.routing import check_dispatch, check_table
from flexpert.comm.window_layout import DTYPES, LINE, MAX_CAPACITY, align

T = TypeVar("T")


class _Hook(Pending[T], Generic[T]):
    def __init__(self, receive: Callable[[float | None], T]) -> None:
        self._receive = receive

    def __call__(self, timeout_s: float | None = None) -> T:
        return self._receive(timeout_s)


class HostExchange:
    """The methods of `Buffer` with the same names; see there for arguments and errors."""

    def __init__(
        self, core: Core, changes: Changes, members: Members, remote: Remote, waiter: Waiter
    ) -> None:
        self._core = core
        self._changes = changes
        self._members = members
        self._remote = remote
        self._waiter = waiter
        self._shares = False  # what `combine_input` gave last
        self._exchanges = 0
        # reused by every exchange
        self._bad = ffi.new("int64_t *")
        self._rooms = Workspaces()

    # ---- dispatch -----------------------------------------------------------------------------

    def begin_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        fp8: Scales | None,
    ) -> Pending[Received]:
        core = self._core
        check_dispatch(core.spec, x, expert_ids, weights)
        check_table(table)
        payload = payload_of(core.spec, x, fp8)
        expert_ids = expert_ids.contiguous()
        weights = weights.contiguous()
        tokens, k = expert_ids.shape
        with core.exchanging:
            self._changes.begin("dispatch before combine of the last")
            if core.must_vote:
                raise CommError(
                    f"dispatch before the first vote of epoch {core.epoch}: the last exchange was "
                    "incomplete and a peer may still be reading it"
                )
            wire = x if fp8 is None else self._quantise(x, payload)
            core.state = State.BROKEN  # first: a signal may strike right after the call
            why = lib.fx_send_dispatch(
                core.b,
                wire.data_ptr(),
                wire.stride(0) * wire.itemsize,
                payload.bytes,
                payload.kind,
                expert_ids.data_ptr(),
                expert_ids.dtype is torch.int64,
                weights.data_ptr(),
                tokens,
                k,
                table.rank.data_ptr(),
                table.slot.data_ptr(),
                table.rank.shape[0],
                self._bad,
            )
            if why:  # nothing was sent
                core.state = State.BETWEEN
                raise ValueError(self._describe_expert(why, table))
            core.sequence += 1
            self._exchanges += 1
            self._remote.flush()
            core.state = State.DISPATCHED
        sequence = core.sequence

        def receive(timeout_s: float | None) -> Received:
            return self._receive(wire, payload, table.slots, k, sequence, timeout_s)

        return _Hook(receive)

    def _quantise(self, x: torch.Tensor, payload: Payload) -> torch.Tensor:
        rows, size = x.shape[0], align(payload.bytes, LINE)
        if lib.fx_room_for_tokens(self._core.b):
            wire = self._core.window.shared[: rows * size].view(rows, size)
        else:
            wire = self._rooms.room(rows, size, "wire")
        lib.fx_quantise(
            x.data_ptr(),
            DTYPES[x.dtype],
            *x.shape,
            payload.kind - 1,
            wire.data_ptr(),
            wire.shape[1],
        )
        return wire

    def _receive(
        self,
        wire: torch.Tensor,
        payload: Payload,
        slots: int,
        k: int,
        sequence: int,
        timeout_s: float | None,
    ) -> Received:
        core = self._core
        with core.exchanging:
            core.check_whole()
            if core.state is not State.DISPATCHED or sequence != core.sequence:
                raise StaleEpoch(
                    f"dispatch {sequence} cannot be received now (epoch {core.epoch}); "
                    "call what begin_dispatch returned once, before anything else"
                )
            core.state = State.BROKEN
            masked = self._waiter.wait(DISPATCH, timeout_s)
            self._members.relays.open()
            offsets = torch.empty(slots + 1, dtype=torch.int32, device="cpu")
            pairs: int = lib.fx_receive(core.b, slots, offsets.data_ptr(), self._bad)
            if pairs < 0:
                raise core.bad_rows(pairs, self._bad[0])
            received = HostReceived(core, self._rooms, payload, offsets, pairs, wire, k, masked)
            core.received = received
            core.state = State.RECEIVED
            return received

    # ---- combine ------------------------------------------------------------------------------

    def combine_input(self, received: Received) -> torch.Tensor:
        core = self._core
        spec, where = core.spec, core.window.layout
        rows = received.weights.shape[0]
        with core.exchanging:
            if core.holds(received):  # else peers may be reading what was shared
                self._shares = lib.fx_room_for_results(core.b, rows) != 0
        if self._shares:
            raw = core.window.shared[where.shared_results_at :][: rows * where.row_bytes]
            return raw.view(spec.dtype).view(rows, spec.hidden)
        return self._rooms.room(rows, where.row_bytes, "y").view(spec.dtype)

    def begin_combine(
        self,
        y: torch.Tensor,
        received: Received,
        reduce: Reduce,
        weights: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> Pending[torch.Tensor]:
        core = self._core
        spec = core.spec
        check_rows("y", y, received.weights.shape[0], spec)
        if reduce not in ("home", "rank"):
            raise ValueError(f"reduce is {reduce!r}, must be 'home' or 'rank'")
        if out is None:
            out = torch.empty((received.tokens_sent, spec.hidden), dtype=spec.dtype, device="cpu")
        else:
            check_rows("out", out, received.tokens_sent, spec)
        home = reduce == "home"
        with core.exchanging:
            core.check_whole()
            if received is not core.received or core.state is not State.RECEIVED:
                raise StaleEpoch(
                    f"combine for dispatch {received.sequence} of epoch {received.epoch}, but the "
                    f"last is {core.sequence} of epoch {core.epoch}, "
                    + ("combined already" if core.state is State.BETWEEN else "not combined")
                )
            if weights is not None:
                assert isinstance(received, HostReceived)
                k = received.choices
                check_weights(weights, (received.tokens_sent, k), home=home)
                lib.fx_set_weights(core.b, weights.contiguous().data_ptr(), k)
            core.state = State.BROKEN
            lib.fx_send_combine(core.b, y.data_ptr(), home)
            self._remote.flush()
            core.state = State.COMBINED
        sequence = core.sequence

        def receive(timeout_s: float | None) -> torch.Tensor:
            return self._reduce(y, out, home, sequence, timeout_s)

        return _Hook(receive)

    def _reduce(
        self, y: torch.Tensor, out: torch.Tensor, home: bool, sequence: int, timeout_s: float | None
    ) -> torch.Tensor:
        core = self._core
        with core.exchanging:
            core.check_whole()
            if core.state is not State.COMBINED or sequence != core.sequence:
                raise StaleEpoch(
                    f"combine {sequence} cannot be received now (epoch {core.epoch}); "
                    "call what begin_combine returned once, before anything else"
                )
            core.state = State.BROKEN
            self._waiter.wait(COMBINE, timeout_s)
            while why := lib.fx_reduce(core.b, y.data_ptr(), out.data_ptr(), home, self._bad):
                if why != WRITTEN_OVER or not core.lenient:
                    raise core.bad_results(why, self._bad[0])
                self._members.drop([self._bad[0]])
            core.state = State.BETWEEN
            return out

    # ---- afterwards ---------------------------------------------------------------------------

    def missing_results(self, received: Received) -> MissingResults | None:
        core = self._core
        with core.exchanging:
            if received is not core.received or core.state is not State.BETWEEN:
                raise StaleEpoch(
                    f"missing_results of dispatch {received.sequence} of epoch {received.epoch}: "
                    "ask after its combine and before the next dispatch"
                )
            if not core.b.lost_pairs:
                return None
            assert isinstance(received, HostReceived)
            weight = torch.empty(received.tokens_sent, dtype=torch.float32, device="cpu")
            choices = torch.empty(
                (received.tokens_sent, received.choices), dtype=torch.bool, device="cpu"
            )
            ranks = torch.empty(MAX_CAPACITY, dtype=torch.uint8, device="cpu")
            lib.fx_loss(
                core.b,
                received.choices,
                weight.data_ptr(),
                choices.data_ptr(),
                ranks.data_ptr(),
            )
            return MissingResults(tuple(ranks.nonzero().flatten().tolist()), weight, choices)

    def statistics(self) -> Statistics:
        b = self._core.b
        ids = range(self._core.spec.capacity)
        return Statistics(
            exchanges=self._exchanges + int(b.native_exchanges),
            bytes_sent={rank: b.bytes_sent[rank] for rank in ids},
            dispatch_wait_ns={rank: b.wait_ns[DISPATCH][rank] for rank in ids},
            combine_wait_ns={rank: b.wait_ns[COMBINE][rank] for rank in ids},
            wire_bytes=self._remote.bytes_written(),
            waited_ns={PHASES[what]: int(b.waited_ns[what]) for what in (DISPATCH, COMBINE)},
        )

    # ---- what was wrong -----------------------------------------------------------------------

    def _describe_expert(self, why: int, table: ExpertTable) -> str:
        expert = self._bad[0]
        if why == NO_SUCH_EXPERT:
            return f"expert {expert} does not exist: the table has {table.rank.shape[0]}"
        rank, slot = int(table.rank[expert]), int(table.slot[expert])
        if rank >= 0 and not 0 <= slot < 2**15:
            return f"expert {expert} has slot {slot} on rank {rank}"
        who = "nobody" if rank < 0 else f"rank {rank}, which is not active"
        return f"expert {expert} is owned by {who} (epoch {self._core.epoch})"
