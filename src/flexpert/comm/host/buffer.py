"""HostBuffer: dispatch and combine between the ranks of one machine, over shared memory.

What an exchange costs in Python is six calls into kernels.c and a few small tensors; everything
a peer needs to know is written by the kernels, and all sleeping happens there, without the GIL, on
the futex in the own window.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from enum import Enum

import torch

from flexpert.comm.buffer import Buffer, BufferSpec, ExpertTable, Received, Reduce
from flexpert.comm.errors import CommError, Interrupted, RankTimeout, StaleEpoch
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.window import Address, PeerWindow, Window, decode, encode, open_peer
from flexpert.comm.layout import (
    DOORBELL_AT,
    DTYPES,
    MAX_CAPACITY,
    VOTE_BYTES,
    VOTE_SLOTS,
    VOTES_AT,
    WAITERS_AT,
    check_spec,
    layout,
)
from flexpert.comm.routing import check_dispatch, check_table

_FOREVER_NS = 2**62
_SEQUENCE_MASK = 0xFFFFFFFF
_MAX_EPOCH = 0xFFFFFFFF

# as in kernels.c
_OK, _TIMEOUT, _INTERRUPTED, _AGAIN, _RUNG = range(5)
_DISPATCH, _COMBINE, _VOTE = range(3)
_PHASES = ("dispatch", "combine", "vote")
_NO_SUCH_EXPERT, _WRONG_MODE = 1, 1
_SHORT_OF_MEMORY = -2


class State(Enum):
    """Where this rank stands between dispatch and combine.

    BETWEEN → (dispatch) → UNDER_WAY → RECEIVED → (combine) → UNDER_WAY → BETWEEN. Whatever stops
    an exchange, be it a timeout or Ctrl-C, leaves it UNDER_WAY; only `set_active` leads out.
    """

    BETWEEN = 0
    UNDER_WAY = 1
    RECEIVED = 2
    CLOSED = 3


class HostBuffer(Buffer):
    """The `Buffer` of ranks on one machine. See kernels.c for why its protocol is safe."""

    def __init__(self, rank: int, spec: BufferSpec, *, timeout_s: float = 30.0) -> None:
        check_spec(spec)
        if not 0 <= rank < spec.capacity:
            raise ValueError(f"rank is {rank}, must be 0 to {spec.capacity - 1}")
        _limit_ns(timeout_s)
        self.rank = rank
        self.spec = spec
        self.timeout_s = timeout_s
        self._window = Window(rank, spec)
        self._address = encode(self._window.address)
        self._peers: dict[int, PeerWindow] = {}
        self._active: tuple[int, ...] = (rank,)
        self._epoch = 0
        self._membership = threading.Lock()  # peers, active and the tables of pointers
        self._exchange = threading.Lock()  # held in every call that uses active windows
        self._signal = threading.Lock()  # ring and interrupt against close

        self._state = State.BETWEEN
        self._must_vote = False
        self._sequence = 0
        self._step = 1
        self._posted = False
        self._posts = 0

        self._b = b = ffi.new("fx_buffer *")
        _describe(b, rank, spec)
        b.control[rank] = self._window.control
        b.inbox[rank] = b.outbox[rank] = self._window.open_region(rank)
        if lib.fx_open(b) != 0:
            self.close()
            raise MemoryError("no memory for the plan of an exchange")
        self._use_active()

        # reused by every exchange
        self._missing = ffi.new("int32_t[]", MAX_CAPACITY)
        self._missing_count = ffi.new("int32_t *")
        self._bad = ffi.new("int64_t *")
        self._x = torch.empty((0, spec.hidden), dtype=spec.dtype)

    # ---- membership -------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        return self._address

    @property
    def connected(self) -> tuple[int, ...]:
        with self._membership:
            return tuple(sorted((self.rank, *self._peers)))

    @property
    def active(self) -> tuple[int, ...]:
        return self._active

    @property
    def epoch(self) -> int:
        return self._epoch

    def connect(self, peers: Mapping[int, bytes]) -> None:
        with self._membership:
            self._check_open()
            opened: dict[int, PeerWindow] = {}
            regions: dict[int, int] = {}
            try:
                for peer, address in self._new_peers(peers).items():
                    opened[peer] = open_peer(peer, address, self.rank, self.spec)
                    regions[peer] = self._window.open_region(peer)
            except (CommError, ValueError):
                for peer, window in opened.items():
                    window.close()
                    if peer in regions:
                        self._window.close_region(peer)
                raise
            for peer, window in opened.items():
                self._b.inbox[peer] = regions[peer]
                self._b.outbox[peer] = window.region
                self._b.control[peer] = window.control
                self._peers[peer] = window

    def _new_peers(self, peers: Mapping[int, bytes]) -> dict[int, Address]:
        new: dict[int, Address] = {}
        for peer, encoded in peers.items():
            if not 0 <= peer < self.spec.capacity:
                raise ValueError(f"rank {peer} is outside of the capacity {self.spec.capacity}")
            if peer == self.rank:
                continue
            address = decode(encoded)
            known = self._peers.get(peer)
            if known is None:
                new[peer] = address
            elif known.address != address:
                raise ValueError(
                    f"rank {peer} is connected to pid {known.address.pid} already; "
                    "disconnect it before its id is used again"
                )
        return new

    def disconnect(self, ids: Iterable[int]) -> None:
        with self._membership:
            gone = [peer for peer in sorted(set(ids)) if peer in self._peers]
            busy = [peer for peer in gone if peer in self._active]
            if busy:
                raise ValueError(f"rank {busy[0]} is active; it can be disconnected after an epoch")
            for peer in gone:
                self._b.inbox[peer] = self._b.outbox[peer] = self._b.control[peer] = 0
                self._window.close_region(peer)
                self._peers.pop(peer).close()

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        with self._exchange, self._membership:
            self._check_open()
            wanted = tuple(sorted(set(ids)))
            if self.rank not in wanted:
                raise ValueError(f"rank {self.rank} is not among the active ids {wanted}")
            for peer in wanted:
                if peer != self.rank and peer not in self._peers:
                    raise ValueError(f"rank {peer} is not connected")
            if not self._epoch < epoch <= _MAX_EPOCH:
                raise ValueError(f"epoch {epoch} does not follow epoch {self._epoch}")
            # a peer may still be reading what an unfinished exchange sent: see kernels.c
            self._must_vote |= self._state is not State.BETWEEN
            self._active = wanted
            self._epoch = epoch
            self._state = State.BETWEEN
            self._sequence = 0
            self._step = 1
            self._posted = False
            self._use_active()
            lib.fx_resume(self._b)

    def _use_active(self) -> None:
        b = self._b
        for rank in range(self.spec.capacity):
            b.is_active[rank] = 0
        for at, rank in enumerate(self._active):
            b.active[at] = rank
            b.is_active[rank] = 1
        b.active_count = len(self._active)

    # ---- the step barrier -------------------------------------------------------------------

    def post_vote(self, payload: bytes) -> None:
        if len(payload) > VOTE_BYTES:
            raise ValueError(f"a vote holds {VOTE_BYTES} bytes, not {len(payload)}")
        with self._exchange:
            self._check_whole()
            if self._state is not State.BETWEEN:
                raise CommError(f"vote between dispatch and combine (epoch {self._epoch})")
            if self._posted:
                raise CommError(f"second vote in one step (epoch {self._epoch})")
            self._posted = True
            self._posts += 1
            place = self._posts % VOTE_SLOTS
            lib.fx_post_vote(self._b, place, self._tag(self._step), payload, len(payload))

    def wait_for_vote(self, timeout_s: float | None) -> bool:
        limit_ns = _FOREVER_NS if timeout_s is None else _limit_ns(timeout_s)
        with self._exchange:
            self._check_whole()
            deadline_ns = time.monotonic_ns() + limit_ns
            while True:
                how = lib.fx_wait_any_vote(self._b, self._tag(self._step), deadline_ns)
                if how == _INTERRUPTED:
                    raise self._interrupted("vote")
                if how != _AGAIN:
                    return bool(how == _OK)

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        with self._exchange:
            self._check_whole()
            if not self._posted:
                raise CommError(f"the own vote is not posted yet (epoch {self._epoch})")
            self._wait(_VOTE, self._step, timeout_s)
            votes: dict[int, bytes] = {}
            for at, rank in enumerate(self._active):
                vote = bytes(ffi.buffer(self._b.votes[at], 64))
                length = int.from_bytes(vote[:4], "little")
                if length > VOTE_BYTES:
                    raise self._nonsense(rank, f"a vote of {length} bytes")
                votes[rank] = vote[16 : 16 + length]
            self._step += 1
            self._posted = False
            self._must_vote = False
            return votes

    def ring(self) -> None:
        with self._signal:
            if self._state is not State.CLOSED:
                lib.fx_ring(self._b)

    def interrupt(self) -> None:
        with self._signal:
            if self._state is not State.CLOSED:
                lib.fx_interrupt(self._b)

    # ---- the exchange -----------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        timeout_s: float | None = None,
    ) -> Received:
        check_dispatch(self.spec, x, expert_ids, weights)
        check_table(table)
        expert_ids = expert_ids.contiguous()
        weights = weights.contiguous()
        with self._exchange:
            self._check_whole()
            if self._state is not State.BETWEEN:
                raise CommError(f"dispatch before combine of the last (epoch {self._epoch})")
            if self._must_vote:
                raise CommError(
                    f"dispatch before the first vote of epoch {self._epoch}: the last exchange was "
                    "incomplete and a peer may still be reading it"
                )
            tokens, k = expert_ids.shape
            self._state = State.UNDER_WAY  # first: a signal may strike right after the call
            why = lib.fx_send_dispatch(
                self._b,
                x.data_ptr(),
                expert_ids.data_ptr(),
                expert_ids.dtype is torch.int64,
                weights.data_ptr(),
                tokens,
                k,
                table.rank.data_ptr(),
                table.slot.data_ptr(),
                table.rank.shape[0],
                self._tag(self._sequence + 1),
                self._bad,
            )
            if why:  # nothing was sent
                self._state = State.BETWEEN
                raise ValueError(self._describe_expert(why, table))
            self._sequence += 1
            self._wait(_DISPATCH, self._sequence, timeout_s)
            received = self._receive(x, table.slots)
            self._state = State.RECEIVED
            return received

    def _receive(self, x: torch.Tensor, slots: int) -> Received:
        offsets = torch.empty(slots + 1, dtype=torch.int32)
        rows: int = lib.fx_receive(self._b, slots, offsets.data_ptr(), self._bad)
        if rows < 0:
            if rows == _SHORT_OF_MEMORY:
                raise MemoryError("no memory for the plan of an exchange")
            raise self._nonsense(self._bad[0], "rows or slots that cannot be")
        if rows > self._x.shape[0]:
            self._x = torch.empty((rows + rows // 2, self.spec.hidden), dtype=self.spec.dtype)
        weights = torch.empty(rows, dtype=torch.float32)
        lib.fx_gather(self._b, x.data_ptr(), self._x.data_ptr(), weights.data_ptr())
        return Received(
            x=self._x[:rows],
            offsets=offsets,
            weights=weights,
            tokens_sent=x.shape[0],
            epoch=self._epoch,
            sequence=self._sequence,
            plan=self,
        )

    def combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        out: torch.Tensor | None = None,
        timeout_s: float | None = None,
    ) -> torch.Tensor:
        spec = self.spec
        _check_rows("y", y, received.x.shape[0], spec)
        if reduce not in ("home", "rank"):
            raise ValueError(f"reduce is {reduce!r}, must be 'home' or 'rank'")
        if out is None:
            out = torch.empty((received.tokens_sent, spec.hidden), dtype=spec.dtype)
        else:
            _check_rows("out", out, received.tokens_sent, spec)
        home = int(reduce == "home")
        with self._exchange:
            self._check_whole()
            if (
                received.plan is not self
                or received.epoch != self._epoch
                or received.sequence != self._sequence
                or self._state is not State.RECEIVED
            ):
                raise StaleEpoch(
                    f"combine for dispatch {received.sequence} of epoch {received.epoch}, but the "
                    f"last is {self._sequence} of epoch {self._epoch}, "
                    + ("combined already" if self._state is State.BETWEEN else "not combined")
                )
            self._state = State.UNDER_WAY
            lib.fx_send_combine(self._b, y.data_ptr(), home, self._tag(self._sequence))
            self._wait(_COMBINE, self._sequence, timeout_s)
            why = lib.fx_reduce(self._b, y.data_ptr(), out.data_ptr(), home, self._bad)
            if why:
                what = "another reduce mode" if why == _WRONG_MODE else "a wrong number of rows"
                raise self._nonsense(self._bad[0], what)
            self._state = State.BETWEEN
            return out

    def close(self) -> None:
        self.interrupt()  # a wait on another thread ends before its memory goes
        with self._exchange, self._membership, self._signal:
            if self._state is State.CLOSED:
                return
            self._state = State.CLOSED
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()
            self._window.close()
            lib.fx_close(self._b)

    # ---- helpers ----------------------------------------------------------------------------

    def _tag(self, sequence: int) -> int:
        return self._epoch << 32 | (sequence & _SEQUENCE_MASK)

    def _check_open(self) -> None:
        if self._state is State.CLOSED:
            raise CommError(f"the buffer of rank {self.rank} is closed")

    def _check_whole(self) -> None:
        """No exchange of this epoch was left incomplete."""
        self._check_open()
        if lib.fx_is_interrupted(self._b):
            raise self._interrupted("call")
        if self._state is State.UNDER_WAY:
            raise StaleEpoch(
                f"epoch {self._epoch} is over for rank {self.rank}: an exchange was incomplete; "
                "begin another with set_active"
            )

    def _wait(self, what: int, sequence: int, timeout_s: float | None) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_ns = time.monotonic_ns() + _limit_ns(limit_s)
        tag = self._tag(sequence)
        while True:  # comes back now and then, so that Python can act on signals
            how = lib.fx_wait(self._b, what, tag, deadline_ns, self._missing, self._missing_count)
            if how == _OK:
                return
            if how == _INTERRUPTED:
                raise self._interrupted(_PHASES[what])
            if how == _TIMEOUT:
                missing = tuple(self._missing[at] for at in range(self._missing_count[0]))
                raise RankTimeout(missing, _PHASES[what], self._epoch, limit_s)

    def _interrupted(self, phase: str) -> Interrupted:
        return Interrupted(f"rank {self.rank} was interrupted in {phase} (epoch {self._epoch})")

    def _nonsense(self, peer: int, what: str) -> CommError:
        return CommError(
            f"rank {peer} sent {what} (epoch {self._epoch}, exchange {self._sequence}); "
            "it should be removed"
        )

    def _describe_expert(self, why: int, table: ExpertTable) -> str:
        expert = self._bad[0]
        if why == _NO_SUCH_EXPERT:
            return f"expert {expert} does not exist: the table has {table.rank.shape[0]}"
        rank, slot = int(table.rank[expert]), int(table.slot[expert])
        if rank >= 0 and slot < 0:
            return f"expert {expert} has slot {slot} on rank {rank}"
        who = "nobody" if rank < 0 else f"rank {rank}, which is not active"
        return f"expert {expert} is owned by {who} (epoch {self._epoch})"


def _limit_ns(limit_s: float) -> int:
    if not limit_s >= 0 or math.isinf(limit_s):
        raise ValueError(f"a time limit must be a number of seconds, is {limit_s}")
    return min(int(limit_s * 1e9), _FOREVER_NS)


def _check_rows(name: str, tensor: torch.Tensor, rows: int, spec: BufferSpec) -> None:
    if (
        tensor.dtype is not spec.dtype
        or tensor.ndim != 2
        or tensor.shape[0] != rows
        or tensor.shape[1] != spec.hidden
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"{name} must be [{rows}, {spec.hidden}] {spec.dtype}, contiguous; "
            f"is {list(tensor.shape)} {tensor.dtype}"
        )


def _describe(b: object, rank: int, spec: BufferSpec) -> None:
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
        "row_stride": where.row_stride,
        "meta_stride": where.meta_stride,
        "doorbell_at": DOORBELL_AT,
        "waiters_at": WAITERS_AT,
        "votes_at": VOTES_AT,
        "dispatch_flags_at": where.dispatch_flags_at,
        "combine_flags_at": where.combine_flags_at,
        "rows_at": where.rows_at,
        "results_at": where.results_at,
    }
    for name, value in values.items():
        setattr(b, name, value)
