"""HostBuffer: dispatch and combine between CPU ranks, over shared memory and NIXL.

The contract of `Buffer`, handed on to the parts that keep it (see the package's docstring).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch

from flexpert.comm.buffer import (
    Buffer,
    BufferSpec,
    Capabilities,
    Channel,
    ExpertTable,
    MissingResults,
    NativeExchange,
    OnTimeout,
    Pending,
    Point,
    Received,
    Reduce,
    Scales,
    Statistics,
)
from flexpert.comm.host.arguments import check_settings
from flexpert.comm.host.changes import Changes
from flexpert.comm.host.codes import BROKEN_LINK
from flexpert.comm.host.connecting import Connector
from flexpert.comm.host.core import Core, State
from flexpert.comm.host.gateways import group_of
from flexpert.comm.host.host_exchange import HostExchange
from flexpert.comm.host.links import Greeting, this_machine
from flexpert.comm.host.members import Members
from flexpert.comm.host.native import NativeExchanges
from flexpert.comm.host.remote import Remote
from flexpert.comm.host.votes import Votes
from flexpert.comm.host.waits import Waiter
from flexpert.comm.host.window import encode
from flexpert.comm.window_layout import VOTE_BYTES

if TYPE_CHECKING:
    from flexpert.comm.bounded import StoreKeys


class HostBuffer(Buffer):
    """The `Buffer` of CPU ranks. See kernels.c for why its protocol is safe."""

    capabilities = Capabilities(
        graph_capture=False,
        grow=True,
        nixl_channel=True,
        reductions=frozenset({"home", "rank"}),
        byte_rows=True,
        row_order=True,
        row_weights=True,
        call_timeouts=True,
        mask_at_vote=False,
        unmask_at_vote=False,
        epoch_needs_vote=False,
        owners_checked=True,
        raises_later=False,
        vote_bytes=VOTE_BYTES,
        traffic_counted=True,
    )

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        timeout_s: float = 30.0,
        on_timeout: OnTimeout = "raise",
        store: StoreKeys | None = None,
        channel: Channel = "auto",
        machine: str | None = None,
        two_level: bool = True,
        listener: Callable[[int, bool], None] | None = None,
    ) -> None:
        """listener: told, from any thread, that waiting for an id is in vain (True), or no more.
        The rest: see `make_buffer`."""
        check_settings(rank, spec, timeout_s, on_timeout, channel)
        self.rank = rank
        machine = machine or this_machine()
        shares = two_level and spec.topk > 1 and on_timeout == "raise" and channel == "auto"
        self._core = core = Core(
            rank,
            spec,
            timeout_s=timeout_s,
            lenient=on_timeout == "mask",
            listener=listener,
            group=group_of(machine) if shares else b"",
        )
        greeting = Greeting(machine, channel, core.window.address)
        self._address = encode(core.window.address)
        members = Members(core)
        remote = Remote(core, members.installed)
        waiter = Waiter(core, members, remote)
        self._changes = changes = Changes(core, members, remote)
        self._connector = Connector(core, changes, remote, greeting=greeting, store=store)
        self._votes = Votes(core, members, changes, remote, waiter)
        self._exchange = HostExchange(core, changes, members, remote, waiter)
        self._native = NativeExchanges(core, changes, members, waiter)

    @property
    def spec(self) -> BufferSpec:  # type: ignore[override]
        return self._core.spec

    @property
    def timeout_s(self) -> float:
        return self._core.timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._core.timeout_s = value

    @property
    def sequence(self) -> int:
        """Of the last dispatch in this epoch."""
        return self._core.sequence

    @property
    def turns(self) -> int:  # type: ignore[override]
        return self._core.turns + int(self._core.b.native_turns)

    # ---- membership -------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        return self._address

    @property
    def connected(self) -> tuple[int, ...]:
        return self._changes.connected()

    @property
    def active(self) -> tuple[int, ...]:
        return self._changes.active()

    @property
    def epoch(self) -> int:
        return self._core.epoch

    @property
    def lost(self) -> dict[int, str]:
        return self._changes.lost()

    def channel(self, peer: int) -> Literal["self", "shm", "nixl"]:
        if peer == self.rank:
            return "self"
        return "nixl" if self._changes.is_remote(peer) else "shm"

    def link(self, peer: int) -> int | None:
        """Number of the link to an active peer in this epoch, the same on both sides; None until
        both have unmasked each other. Raises: KeyError: not connected."""
        return 0 if peer == self.rank else self._changes.number(peer)

    def nonce(self, peer: int) -> bytes:
        """What tells a connected process from all others. Raises: KeyError: not connected."""
        return self._core.window.address.nonce if peer == self.rank else self._changes.nonce(peer)

    def connect(
        self,
        peers: Mapping[int, bytes] | Iterable[int],
        *,
        activate: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        ids = self._connector.connect(peers, timeout_s)
        if activate:
            self.unmask(ids)

    def disconnect(self, ids: Iterable[int]) -> None:
        self._changes.disconnect(ids)

    def grow(self, capacity: int) -> None:
        self._changes.grow(capacity)

    def shrink(self, capacity: int) -> None:
        self._changes.shrink(capacity)

    def mask(self, ids: Iterable[int]) -> None:
        self._changes.wish(ids, unmask=False)

    def unmask(self, ids: Iterable[int]) -> None:
        self._changes.wish(ids, unmask=True)

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        self._changes.set_active(ids, epoch)

    # ---- the step barrier -------------------------------------------------------------------

    def post_vote(self, payload: bytes, *, wait: bool = True) -> None:
        self._votes.post(payload)

    def wait_for_vote(self, timeout_s: float | None) -> bool:
        return self._votes.wait(timeout_s)

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        return self._votes.collect(timeout_s)

    def ring(self) -> None:
        self._core.ring()

    def break_link(self, peer: int) -> None:
        """Waiting for this peer is in vain: what else leads to it does not any more. From any
        thread; until the peer is disconnected."""
        self._core.set_gone(peer, BROKEN_LINK)

    def interrupt(self) -> None:
        self._core.interrupt()

    # ---- the exchange -----------------------------------------------------------------------

    def begin_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
    ) -> Pending[Received]:
        return self._exchange.begin_dispatch(x, expert_ids, weights, table, fp8)

    def begin_combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Pending[torch.Tensor]:
        return self._exchange.begin_combine(y, received, reduce, weights, out)

    def combine_input(self, received: Received) -> torch.Tensor:
        return self._exchange.combine_input(received)

    def native(
        self, tell: Callable[[Point], None] | None = None
    ) -> AbstractContextManager[NativeExchange | None]:
        return self._native.within(tell)

    def missing_results(self, received: Received) -> MissingResults | None:
        return self._exchange.missing_results(received)

    def statistics(self) -> Statistics:
        return self._exchange.statistics()

    def close(self) -> None:
        self.interrupt()  # a wait on another thread ends before its memory goes
        core = self._core
        with core.exchanging, core.changing:
            if core.state is State.CLOSED:
                return
            core.end()
            self._changes.close_links()
            core.free()
        self._changes.stop_watching()
