"""Dispatch and combine as nixl_ep's users call them, over exchanges that come in pairs.

Underneath, every dispatch is followed by exactly one combine, and is received before the next
exchange begins. nixl_ep allows more as long as all ranks do the same: two dispatches in a row, two
micro-batches that overlap, a second combine with one handle. So, before the next exchange begins,

    a hook that was not called yet    is called
    a dispatch that was not combined  is combined with whatever lies in the buffer, and the sums
                                      thrown away: the peers wait for a combine
    a combine of another dispatch     first repeats that with 16 bytes a token, so that there is a
                                      dispatch to be combined
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic

import torch

from flexpert.comm.buffer import Buffer, ExpertTable, Received, Scales
from flexpert.comm.errors import StaleEpoch
from flexpert.compat.nixl_ep.call_checks import check_bound
from flexpert.compat.nixl_ep.device_exchange import (
    A,
    Device,
    DeviceDispatched,
    DispatchSizes,
    Handle,
)
from flexpert.compat.nixl_ep.expert_major_tensors import widened
from flexpert.compat.nixl_ep.lifetime import Lifetime

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


class PairedExchange(Generic[A]):
    """What stands between the user's calls and `core`, in one thread at a time."""

    def __init__(
        self, core: Buffer, device: Device[A], experts_per_rank: int, lifetime: Lifetime
    ) -> None:
        self._core = core
        self.device = device
        self._experts = experts_per_rank
        self._lifetime = lifetime
        self._kept: deque[DeviceDispatched[A]] = deque(maxlen=_KEPT)
        self._outstanding: Receive | None = None
        self._uncombined: Received | None = None
        self._table = _table(core.spec.capacity, experts_per_rank, device.at)
        # weights for dispatches; those that count come with the combine
        most = core.spec.max_tokens * core.spec.topk
        self._ones = torch.ones(most, dtype=torch.float32, device=device.at)
        self._ones_of: dict[torch.Size, torch.Tensor] = {}
        self._rows: dict[tuple[object, ...], DispatchSizes] = {}
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
    ) -> tuple[DeviceDispatched[A], Receive | None]:
        """Send; receive too unless `later`: then the result does. Arguments are checked, but for
        what `core` checks."""
        with self._lifetime.call():
            self.settle()
            rows = self.rows_of(x.size(1), max_tokens, ranks, fp8)
            wire = widened(x, self._core.spec.hidden)
            if later and wire is x and fp8 is None and self.device.own_rows_wait:
                wire = x.clone()  # the user may write to x now
            self._route()
            routes = self.device.routes(experts)
            before = None if wait_stats is None else self.device.waited("dispatch")
            weights = self._weights(routes)
            if not later:  # both halves at once are faster on a GPU
                received = self._core.dispatch(wire, routes, weights, self._table, fp8=fp8)
                done = self._begun(routes, rows)
                self._receive(done, received, recv_stats, wait_stats, before)
                if wire is x:
                    self.device.remember(done, x)
                return done, None
            pending = self._core.begin_dispatch(wire, routes, weights, self._table, fp8=fp8)
            done = self._begun(routes, rows)

            def receive() -> None:
                self._receive(done, pending(), recv_stats, wait_stats, before)

            return done, self._finish(receive)

    def dispatch_directly(
        self, x: torch.Tensor, experts: torch.Tensor, rows: DispatchSizes
    ) -> DeviceDispatched[A] | None:
        """`dispatch` of what is known to be usual: not later, without statistics; None: something
        is not, and `dispatch` says what, or does it. rows: of `rows_of`."""
        if self._outstanding is not None or self._uncombined is not None:
            return None  # nothing may be settled before all arguments are known to fit
        with self._lifetime.call():
            weights = self._weights(experts)
            direct = self.device.dispatch_directly(x, experts, weights, rows)
            if direct is None:
                return None
            returned, received, came = direct
            done = DeviceDispatched(experts, self._table, rows, returned, came, received)
            self._uncombined = received
            self._kept.append(done)
            return done

    def combine_directly(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        handle: Handle,
        out: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Likewise `combine`, of the last dispatch."""
        received = self._uncombined
        if received is None or self._outstanding is not None:
            return None
        done = self._kept[-1]
        if done.received is not received or handle[0] is not done.returned.src_info:
            return None
        if done.rows.ranks < self._core.spec.capacity:
            check_bound(done.rows.ranks, self._core.active)
        with self._lifetime.call():
            came = _came(done)
            result = self.device.combine_directly(x, topk_idx, weights, came, received, out)
            if result is not None:
                self._uncombined = done.received = None
            return result

    def _begun(self, routes: torch.Tensor, rows: DispatchSizes) -> DeviceDispatched[A]:
        """Of a dispatch that was sent: only now are tensors taken from earlier ones."""
        done: DeviceDispatched[A]
        done = DeviceDispatched(routes, self._table, rows, self.device.returned(rows))
        self._kept.append(done)
        return done

    def _receive(
        self,
        done: DeviceDispatched[A],
        received: Received,
        recv_stats: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        before: torch.Tensor | None,
    ) -> None:
        """before: of `Device.waited`, if wait_stats are wanted."""
        self._uncombined = done.received = received
        done.came = self.device.fill(done, received)
        if recv_stats is not None:
            recv_stats.add_(done.returned.recv_count)
        if wait_stats is not None:
            _add_since(wait_stats, before, self.device.waited("dispatch"))

    def rows_of(
        self, hidden: int, max_tokens: int, ranks: int, fp8: Scales | None
    ) -> DispatchSizes:
        """The same object for equal arguments."""
        key = (hidden, max_tokens, ranks, fp8)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = DispatchSizes(self._experts, ranks, max_tokens, hidden, fp8)
        return rows

    def _weights(self, experts: torch.Tensor) -> torch.Tensor:
        """[tokens, k] float32, of a dispatch to these."""
        shape = experts.shape
        weights = self._ones_of.get(shape)
        if weights is None:
            weights = self._ones_of[shape] = self._ones[: experts.numel()].view(shape)
        return weights

    # ---- combine ----------------------------------------------------------------------------

    def find(self, handle: Handle) -> DeviceDispatched[A]:
        """Raises: StaleEpoch: not one of the last two dispatches."""
        for done in self._kept:
            if handle[0].data_ptr() == done.returned.src_info.data_ptr():
                return done
        raise StaleEpoch(
            f"the handle is not of one of the last {_KEPT} dispatches of rank {self._core.rank}; "
            "what they returned is used again by later ones"
        )

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        done: DeviceDispatched[A],
        *,
        out: torch.Tensor,
        later: bool,
        wait_stats: torch.Tensor | None,
    ) -> Receive | None:
        """Send x's rows home; receive too unless `later`: then the result does.

        x: [experts, limit, hidden]; topk_idx: [tokens, k]; weights: [tokens, k] float32;
        out: [tokens, hidden].

        Raises: ValueError: other experts than in dispatch; nothing was sent.
        """
        with self._lifetime.call():
            counting = self.device.counting(topk_idx, weights, done)
            self._receive_outstanding()
            received, came = done.received, _came(done)
            if received is None or received is not self._uncombined:
                received, came = self._again(done, came)
            whole = out.shape[1] == self._core.spec.hidden and out.is_contiguous()
            before = None if wait_stats is None else self.device.waited("combine")
            into = out if whole else None
            arguments = x, topk_idx, counting, came, received
            if not later:
                result = self.device.combine(*arguments, out=into)
                self._uncombined = done.received = None
                self._give(result, None if whole else out, wait_stats, before)
                return None
            pending = self.device.begin_combine(*arguments, out=into)
            self._uncombined = done.received = None

            def receive() -> None:
                self._give(pending(), None if whole else out, wait_stats, before)

            return self._finish(receive)

    def _give(
        self,
        result: torch.Tensor,
        out: torch.Tensor | None,
        wait_stats: torch.Tensor | None,
        before: torch.Tensor | None,
    ) -> None:
        """out: where the user wants the result, if that is elsewhere."""
        if out is not None:
            out.copy_(result[:, : out.shape[1]])
        if wait_stats is not None:
            _add_since(wait_stats, before, self.device.waited("combine"))

    def _again(self, done: DeviceDispatched[A], came: A) -> tuple[Received, A]:
        """A dispatch of as many tokens; returns it, and where its rows lie in the user's x."""
        self.settle()
        tokens = done.experts.shape[0]
        probe = torch.zeros((tokens, _PROBE_BYTES), dtype=torch.uint8, device=self.device.at)
        routes = self.device.repeated(done.experts)
        received = self._core.dispatch(probe, routes, self._weights(routes), done.table)
        self._uncombined = received
        return received, self.device.again(done, came, received)

    def stage(self, done: DeviceDispatched[A]) -> torch.Tensor:
        """[experts, limit, hidden] bf16 to write results into, for `combine(zero_copy=True)`."""
        self._staged = self.device.staged(done.rows.shape)
        return self._staged

    @property
    def staged(self) -> torch.Tensor | None:
        """What `stage` gave last."""
        return self._staged

    def _route(self) -> None:
        """Know the owners of experts of all ranks that there may be."""
        capacity = self._core.spec.capacity
        if self._table.rank.shape[0] != capacity * self._experts:
            self._table = _table(capacity, self._experts, self.device.at)

    # ---- the order of exchanges -------------------------------------------------------------

    def barrier(self, timeout_s: float) -> None:
        """Wait for the active ranks."""
        with self._lifetime.call():
            self.settle()
            self._core.barrier(timeout_s=timeout_s)

    def settle(self) -> None:
        """Receive what is outstanding, and combine what the user did not."""
        self._receive_outstanding()
        if self._uncombined is not None:
            self.device.discard(self._uncombined)
            self._uncombined = None

    def _receive_outstanding(self) -> None:
        if self._outstanding is not None:
            receive, self._outstanding = self._outstanding, None
            receive()

    def _finish(self, work: Callable[[], None]) -> Receive:
        """`work`, which is still to be done."""
        receive = Receive(self.device.on_stream(work), self._lifetime)
        self._outstanding = receive
        return receive


def _table(ranks: int, experts_per_rank: int, at: torch.device) -> ExpertTable:
    """Experts in blocks of `experts_per_rank`, by rank."""
    expert = torch.arange(ranks * experts_per_rank, dtype=torch.int32, device=at)
    owner = torch.div(expert, experts_per_rank, rounding_mode="floor")
    return ExpertTable(owner, expert - owner * experts_per_rank, experts_per_rank)


def _came(done: DeviceDispatched[A]) -> A:
    if done.came is None:
        raise StaleEpoch("combine of a dispatch that was not received: its exchange had failed")
    return done.came


def _add_since(stats: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor) -> None:
    """stats: [ranks] int64, a sum of nanoseconds for each rank. before, after: [capacity] int64."""
    assert before is not None
    ranks = stats.shape[0]
    stats.add_(after[:ranks] - before[:ranks])
