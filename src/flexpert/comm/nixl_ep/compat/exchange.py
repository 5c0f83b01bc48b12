"""Dispatch and combine as nixl_ep's users call them, over exchanges that come in pairs.

Underneath, every dispatch is followed by exactly one combine, and is received before the next
exchange begins. nixl_ep allows more as long as all ranks do the same: two dispatches in a row, two
micro-batches that overlap, a second combine with one handle. So, before the next exchange begins,

    a hook that was not called yet    is called
    a dispatch that was not combined  is combined with whatever lies in the buffer, and the sums
                                      thrown away: the peers wait for a combine
    a combine of another dispatch     first sends 16 bytes a token along its routes again, so that
                                      there is a dispatch to be combined
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import pad

from flexpert.comm.buffer import Buffer, ExpertTable, Received, Scales
from flexpert.comm.errors import CommError, StaleEpoch
from flexpert.comm.host._kernels import lib
from flexpert.comm.nixl_ep.compat.expert_major import Arrival, collect, spread
from flexpert.comm.nixl_ep.compat.lifetime import Lifetime
from flexpert.comm.nixl_ep.compat.memory import Memory

Handle = tuple[torch.Tensor, torch.Tensor, int, int]

_PROBE_BYTES = 16
_KEPT = 2  # dispatches that can be combined


class Receive:
    """The receiving half of an exchange, as a hook and as an event. Works once."""

    def __init__(self, work: Callable[[], None], lifetime: Lifetime) -> None:
        self._work: Callable[[], None] | None = work
        self._lifetime = lifetime

    def __call__(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            with self._lifetime.call():
                work()

    def current_stream_wait(self) -> None:
        self()


@dataclass(slots=True, eq=False)
class Dispatched:
    """A dispatch of the user's: what was sent, the tensors that show what came, how to combine it.

    experts: [tokens, k], a copy: users mark experts of lost ranks in theirs.
    recv_x … layout_range: see `Buffer.dispatch`; filled by `Exchange.receive`.
    arrival: which rows came.
    received: while these rows can be combined without sending anything again.
    """

    experts: torch.Tensor
    table: ExpertTable
    ranks: int
    max_tokens: int
    recv_x: torch.Tensor
    scales: torch.Tensor | None
    recv_count: torch.Tensor
    src_info: torch.Tensor
    layout_range: torch.Tensor
    arrival: Arrival | None = None
    received: Received | None = None

    @property
    def limit(self) -> int:
        """Rows that an expert has room for."""
        return self.ranks * self.max_tokens

    @property
    def handle(self) -> Handle:
        return self.src_info, self.layout_range, self.max_tokens, self.recv_x.shape[2]


class Exchange:
    """What stands between the user's calls and `core`, in one thread at a time."""

    def __init__(self, core: Buffer, experts_per_rank: int, lifetime: Lifetime) -> None:
        self._core = core
        self._experts = experts_per_rank
        self._lifetime = lifetime
        self._memory = Memory()
        self._kept: deque[Dispatched] = deque(maxlen=_KEPT)
        self._outstanding: Receive | None = None
        self._uncombined: Received | None = None
        self._table = _table(core.spec.capacity, experts_per_rank)
        self._staged: torch.Tensor | None = None

    # ---- dispatch ---------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        max_tokens: int,
        ranks: int,
        fp8: Scales | None,
        *,
        later: bool,
        recv_stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
    ) -> tuple[Dispatched, Receive]:
        """Send; receive too unless `later`. Arguments are checked but for what `core` checks."""
        with self._lifetime.call():
            self.settle()
            hidden = x.shape[1]
            missing = self._core.spec.hidden - hidden
            wire = pad(x, (0, missing)) if missing else x.contiguous()
            if later and wire is x and fp8 is None:
                wire = x.clone()  # the user may write to x now; own rows are read when received
            self._route()
            experts = experts.clone()
            pending = self._core.begin_dispatch(wire, experts, _ones(experts), self._table, fp8=fp8)
            done = self._prepare(experts, max_tokens, ranks, hidden, fp8)
            self._kept.append(done)

            def receive() -> None:
                before = self._core.statistics().dispatch_wait_ns if wait_stats is not None else {}
                self._uncombined = received = pending()
                self._fill(done, received)
                if recv_stats is not None:
                    recv_stats.add_(done.recv_count)
                if wait_stats is not None:
                    _add_differences(wait_stats, before, self._core.statistics().dispatch_wait_ns)

            return done, self._finish(receive, later)

    def _prepare(
        self,
        experts: torch.Tensor,
        max_tokens: int,
        ranks: int,
        hidden: int,
        fp8: Scales | None,
    ) -> Dispatched:
        local, limit = self._experts, ranks * max_tokens
        packed = fp8 == "ue8m0"
        recv_x, scales = self._memory.next_dispatch(
            (local, limit, hidden),
            torch.bfloat16 if fp8 is None else torch.float8_e4m3fn,
            0 if fp8 is None else hidden // (512 if packed else 128),
            torch.int32 if packed else torch.float32,
        )
        return Dispatched(
            experts=experts,
            table=self._table,
            ranks=ranks,
            max_tokens=max_tokens,
            recv_x=recv_x,
            scales=scales,
            recv_count=torch.empty(local, dtype=torch.int32),
            src_info=torch.empty((local, limit), dtype=torch.int32),
            layout_range=torch.empty((local, ranks), dtype=torch.int64),
        )

    def _fill(self, done: Dispatched, received: Received) -> None:
        arrival = Arrival.of(received.offsets, received.source, done.ranks, done.limit)
        done.recv_count.copy_(arrival.per_expert)
        done.src_info.view(-1)[arrival.places] = received.token
        done.layout_range.copy_(arrival.layout_range())
        # one copy, from where the rows arrived to where they are wanted
        addresses, offsets = received.rows, received.offsets.tolist()
        row_bytes = done.recv_x.shape[2] * done.recv_x.itemsize
        for expert, (begin, end) in enumerate(pairwise(offsets)):
            at = addresses.data_ptr() + begin * addresses.itemsize
            lib.fx_gather(at, end - begin, 0, row_bytes, done.recv_x[expert].data_ptr())
        if done.scales is not None and received.scales is not None:
            spread(received.scales[:, : done.scales.shape[2]], arrival.places, done.scales)
        done.arrival = arrival
        done.received = received

    # ---- combine ----------------------------------------------------------------------------

    def find(self, handle: Handle) -> Dispatched:
        """Raises: StaleEpoch: not one of the last two dispatches."""
        for done in self._kept:
            if handle[0].data_ptr() == done.src_info.data_ptr():
                return done
        raise StaleEpoch(
            f"the handle is not of one of the last {_KEPT} dispatches of rank {self._core.rank}; "
            "what they returned is used again by later ones"
        )

    def combine(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        done: Dispatched,
        *,
        out: torch.Tensor,
        later: bool,
        wait_stats: torch.Tensor | None,
    ) -> Receive:
        """Send x's rows home; receive too unless `later`.

        x: [experts, limit, hidden]; weights: [tokens, k] float32; out: [tokens, hidden].
        """
        with self._lifetime.call():
            self._receive_outstanding()
            if done.received is not None and done.received is self._uncombined:
                received = done.received
                places = _arrival(done).places
            else:
                received, places = self._again(done)
            y = self._core.combine_input(received)
            collect(x.detach(), places, y)
            whole = out.shape[1] == y.shape[1] and out.is_contiguous()
            pending = self._core.begin_combine(
                y, received, reduce="home", weights=weights, out=out if whole else None
            )
            self._uncombined = done.received = None

            def receive() -> None:
                before = self._core.statistics().combine_wait_ns if wait_stats is not None else {}
                result = pending()
                if not whole:
                    out.copy_(result[:, : out.shape[1]])
                if wait_stats is not None:
                    _add_differences(wait_stats, before, self._core.statistics().combine_wait_ns)

            return self._finish(receive, later)

    def _again(self, done: Dispatched) -> tuple[Received, torch.Tensor]:
        """A dispatch along the same routes; returns it, and where its rows lie in the user's x.

        Ranks that were masked since then bring no rows.
        """
        self.settle()
        probe = torch.zeros((done.experts.shape[0], _PROBE_BYTES), dtype=torch.uint8)
        received = self._core.dispatch(probe, done.experts, _ones(done.experts), done.table)
        self._uncombined = received
        old = _arrival(done)
        new = Arrival.of(received.offsets, received.source, done.ranks, done.limit)
        here = new.counts.sum(0) > 0
        if not torch.equal(old.counts * here, new.counts):
            raise CommError(
                f"ranks combine different dispatches (rank {self._core.rank} has one of "
                f"{old.places.shape[0]} rows): all must call dispatch and combine in one order"
            )
        return received, old.places_from(here)

    def stage(self, done: Dispatched) -> torch.Tensor:
        """[experts, limit, hidden] bf16 to write results into, for `combine(zero_copy=True)`."""
        self._staged = self._memory.combine.take(tuple(done.recv_x.shape), torch.bfloat16)
        return self._staged

    @property
    def staged(self) -> torch.Tensor | None:
        """What `stage` gave last."""
        return self._staged

    def _route(self) -> None:
        """Know the owners of experts of all ranks that there may be."""
        capacity = self._core.spec.capacity
        if self._table.rank.shape[0] != capacity * self._experts:
            self._table = _table(capacity, self._experts)

    # ---- the order of exchanges -------------------------------------------------------------

    def barrier(self, timeout_s: float) -> None:
        """Wait for the active ranks."""
        with self._lifetime.call():
            self.settle()
            self._core.barrier(timeout_s=timeout_s)

    def settle(self) -> None:
        """Receive what is outstanding, and combine what the user did not."""
        self._receive_outstanding()
        received, self._uncombined = self._uncombined, None
        if received is not None:
            self._core.combine(self._core.combine_input(received), received, reduce="rank")

    def _receive_outstanding(self) -> None:
        receive, self._outstanding = self._outstanding, None
        if receive is not None:
            receive()

    def _finish(self, work: Callable[[], None], later: bool) -> Receive:
        receive = Receive(work, self._lifetime)
        self._outstanding = receive
        if not later:
            self._receive_outstanding()
        return receive


def _table(ranks: int, experts_per_rank: int) -> ExpertTable:
    """Experts in blocks of `experts_per_rank`, by rank."""
    expert = torch.arange(ranks * experts_per_rank, dtype=torch.int32)
    owner = torch.div(expert, experts_per_rank, rounding_mode="floor")
    return ExpertTable(owner, expert - owner * experts_per_rank, experts_per_rank)


def _ones(experts: torch.Tensor) -> torch.Tensor:
    """Weights for a dispatch; those that count come with the combine."""
    return torch.ones(experts.shape, dtype=torch.float32)


def _arrival(done: Dispatched) -> Arrival:
    if done.arrival is None:
        raise StaleEpoch("combine of a dispatch that was not received: its exchange had failed")
    return done.arrival


def _add_differences(stats: torch.Tensor, before: dict[int, int], after: dict[int, int]) -> None:
    """stats: [ranks] int64, a sum of nanoseconds for each rank."""
    ranks = range(stats.shape[0])
    stats.add_(torch.tensor([after.get(rank, 0) - before.get(rank, 0) for rank in ranks]))
