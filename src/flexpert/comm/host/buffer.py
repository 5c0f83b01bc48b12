"""HostBuffer: dispatch and combine between CPU ranks, over shared memory and NIXL.

What an exchange costs in Python is six calls into kernels.c and a few small tensors; everything
a peer needs to know is written by the kernels, and all sleeping happens there, without the GIL, on
the futex in the own window.

Threads: `_exchange` is held by every call that uses the links, `_changes` by every call that
changes what they are. Changes are noted, and take effect when no exchange is under way: at once
if that is now, else at the beginning of the next one. So nothing is unmapped under a reader.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import msgspec
import torch

from flexpert.comm import rendezvous
from flexpert.comm.buffer import (
    Buffer,
    BufferSpec,
    Channel,
    ExpertTable,
    Loss,
    OnTimeout,
    Pending,
    Received,
    Reduce,
    Scales,
    Statistics,
)
from flexpert.comm.errors import (
    CommError,
    Interrupted,
    PeerUnreachable,
    RankLost,
    RankTimeout,
    StaleEpoch,
)
from flexpert.comm.host._kernels import ffi, lib
from flexpert.comm.host.links import (
    Greeting,
    Link,
    NixlLink,
    ShmLink,
    choose_channel,
    this_machine,
)
from flexpert.comm.host.received import HostReceived, Payload, payload_of
from flexpert.comm.host.watch import Watcher
from flexpert.comm.host.window import Address, Window, decode, encode
from flexpert.comm.layout import (
    COMBINE_FLAG_AT,
    DISPATCH_FLAG_AT,
    DOORBELL_AT,
    DTYPES,
    HELLO_AT,
    LEASES_AT,
    LINE,
    MAX_CAPACITY,
    ROWS_AT,
    VOTE_BYTES,
    VOTES_AT,
    WAITERS_AT,
    align,
    check_spec,
    layout,
)
from flexpert.comm.routing import check_dispatch, check_table

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from flexpert.comm.host import nixl

T = TypeVar("T")

_FOREVER_NS = 2**62
_MAX_EPOCH = 0xFFFFFFFF
_SLICE_NS = 100_000_000  # back to Python this often, so that it can act on signals
_POLL_FIRST_NS, _POLL_MOST_NS = 50_000, 1_000_000  # while a peer behind NIXL is waited for
_PROBE_S = 0.01
_NAP_S = 0.00005
_LATE = 8  # a share of the time limit that may go into sending on
_BEATS = 8  # of a waiting rank, in the time limit
_FRESH = 2.5  # beats: so old may one be

# as in kernels.c
_LINK_SHIFT, _MOST_LINK = 20, 0xFFF  # of a session
_OK, _TIMEOUT, _INTERRUPTED, _AGAIN, _RUNG, _LOST = range(6)
_DISPATCH, _COMBINE, _VOTE = range(3)
_PHASES = ("dispatch", "combine", "vote")
_NO_SUCH_EXPERT, _WRONG_MODE = 1, 1
_NO_MEMORY, _WRONG_PAYLOAD = -2, -3

_ENDED, _BROKEN_LINK, _MASKED, _RESTARTED = 1, 2, 3, 4
_WHY = {
    _ENDED: "process ended",
    _BROKEN_LINK: "link broken",
    _MASKED: "masked",
    _RESTARTED: "started afresh",
}


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


class _Waiting:
    """Who else waits, during one wait of this rank.

    A rank that was stopped halfway through its sends leaves one peer waiting for its dispatch, and
    another, a phase further, for what the first will send then: both run out of time together. So
    ranks that wait for long beat (kernels.c), and only those that do not are taken for stopped.
    """

    def __init__(self, b: Any, limit_ns: int, begun_ns: int) -> None:
        self._b = b
        self.period_ns = max(limit_ns // _BEATS, _POLL_MOST_NS)
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
                self._beats[peer] = (beat, -_FOREVER_NS)  # of an earlier wait, perhaps
            elif beat != last[0]:
                self._beats[peer] = (beat, now_ns)

    def waits(self, peer: int, now_ns: int) -> bool:
        """Whether a peer has beaten lately."""
        _, seen_ns = self._beats.get(peer, (0, -_FOREVER_NS))
        return now_ns - seen_ns < _FRESH * self.period_ns


class _Hook(Pending[T], Generic[T]):
    def __init__(self, receive: Callable[[float | None], T]) -> None:
        self._receive = receive

    def __call__(self, timeout_s: float | None = None) -> T:
        return self._receive(timeout_s)


class HostBuffer(Buffer):
    """The `Buffer` of CPU ranks. See kernels.c for why its protocol is safe."""

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        timeout_s: float = 30.0,
        on_timeout: OnTimeout = "raise",
        store: Store | None = None,
        channel: Channel = "auto",
        machine: str | None = None,
        listener: Callable[[int, bool], None] | None = None,
    ) -> None:
        """listener: told, from any thread, that waiting for an id is in vain (True), or no more.
        The rest: see `make_buffer`."""
        check_spec(spec)
        if not 0 <= rank < spec.capacity:
            raise ValueError(f"rank is {rank}, must be 0 to {spec.capacity - 1}")
        for name, value, allowed in (
            ("on_timeout", on_timeout, ("raise", "mask")),
            ("channel", channel, ("auto", "shm", "nixl")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}, must be one of {', '.join(allowed)}")
        _limit_ns(timeout_s)
        self.rank = rank
        self.spec = spec
        self.timeout_s = timeout_s
        self.sequence = 0
        self._lenient = on_timeout == "mask"
        self._listener = listener
        self._store = store
        self._window = Window(rank, spec)
        self._greeting = Greeting(machine or this_machine(), channel, self._window.address)
        self._address = encode(self._window.address)

        self._exchange = threading.RLock()
        self._changes = threading.RLock()
        self._signal = threading.RLock()  # what other threads tell the kernels, against close
        self._connecting = threading.Lock()  # one meeting at a time

        self._active: tuple[int, ...] = (rank,)
        self._epoch = 0
        self._links: dict[int, Link] = {}  # connected
        self._installed: dict[int, Link] = {}  # known to the kernels
        self._departed: list[Link] = []  # no longer connected, perhaps still installed
        self._wishes: dict[int, bool] = {}  # unmask (True) or mask
        self._changed = False
        self._watcher = Watcher(rank, lambda peer: self._set_gone(peer, _ENDED))
        self._endpoint: nixl.Endpoint | None = None
        self._probed = 0.0

        self._state = State.BETWEEN
        self._parted: set[int] = set()  # masked, and perhaps still reading what it was sent
        self._must_vote = False
        self._posted = False
        self._received: HostReceived | None = None
        self._exchanges = 0

        self._b = b = ffi.new("fx_buffer *")
        _describe(b, rank, spec, self._window.address.nonce)
        b.lenient = self._lenient
        b.ballot_bytes = -1
        b.control[rank] = self._window.control
        b.inbox[rank] = b.outbox[rank] = self._window.lend().at
        if lib.fx_open(b) != 0:
            self.close()
            raise MemoryError("no memory for the plan of an exchange")
        self._use_active()
        lib.fx_begin_epoch(b, 0)

        # reused by every exchange
        self._missing = ffi.new("int32_t[]", MAX_CAPACITY)
        self._missing_count = ffi.new("int32_t *")
        self._bad = ffi.new("int64_t *")
        self._rooms: dict[str, torch.Tensor] = {}

    # ---- membership -------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        return self._address

    @property
    def connected(self) -> tuple[int, ...]:
        with self._changes:
            return tuple(sorted((self.rank, *self._links)))

    @property
    def active(self) -> tuple[int, ...]:
        with self._changes:
            active = set(self._active)
            for peer, unmask in self._wishes.items():
                (active.add if unmask else active.discard)(peer)
            return tuple(sorted(active))

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def lost(self) -> dict[int, str]:
        with self._changes:
            gone = {peer: self._gone(peer) for peer in sorted(self._links)}
        return {peer: _WHY[why] for peer, why in gone.items() if why in (_ENDED, _BROKEN_LINK)}

    def channel(self, peer: int) -> Literal["self", "shm", "nixl"]:
        if peer == self.rank:
            return "self"
        with self._changes:
            return "nixl" if self._links[peer].remote else "shm"

    def link(self, peer: int) -> int | None:
        """Number of the link to an active peer in this epoch, the same on both sides; None until
        both have unmasked each other. Raises: KeyError: not connected."""
        if peer == self.rank:
            return 0
        with self._changes:
            if self._links[peer] is not self._installed.get(peer) or not self._b.up[peer]:
                return None
            return (int(self._b.session[peer]) >> _LINK_SHIFT) & _MOST_LINK

    def nonce(self, peer: int) -> bytes:
        """What tells a connected process from all others. Raises: KeyError: not connected."""
        if peer == self.rank:
            return self._window.address.nonce
        with self._changes:
            return self._links[peer].address.nonce

    def connect(
        self,
        peers: Mapping[int, bytes] | Iterable[int],
        *,
        activate: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        _limit_ns(limit_s)
        self._check_open()
        ids = sorted(set(peers))
        for peer in ids:
            if not 0 <= peer < self.spec.capacity:
                raise ValueError(f"rank {peer} is outside of the capacity {self.spec.capacity}")
        with self._connecting:
            if isinstance(peers, Mapping):
                self._connect_addresses(peers)
            else:
                self._meet([peer for peer in ids if peer not in self.connected], limit_s)
        if activate:
            self.unmask(ids)

    def _connect_addresses(self, peers: Mapping[int, bytes]) -> None:
        with self._changes:
            opened: list[Link] = []
            try:
                for peer, address in self._new_peers(peers).items():
                    opened.append(ShmLink(peer, address, self._window, self.spec))
            except (CommError, ValueError, OSError):
                for link in opened:
                    link.close()
                raise
            for at, link in enumerate(opened):
                try:
                    self._add(link)
                except PeerUnreachable:
                    self.disconnect(done.peer for done in opened[:at])
                    for rest in opened[at:]:
                        rest.close()
                    raise

    def _new_peers(self, peers: Mapping[int, bytes]) -> dict[int, Address]:
        new: dict[int, Address] = {}
        for peer, encoded in peers.items():
            if peer == self.rank:
                continue
            address = decode(encoded)
            known = self._links.get(peer)
            if known is None:
                new[peer] = address
            elif known.address != address:
                raise ValueError(
                    f"rank {peer} is connected to pid {known.address.pid} already; "
                    "disconnect it before its id is used again"
                )
        return new

    def _meet(self, ids: list[int], limit_s: float) -> None:
        if self._store is None:
            raise ValueError(
                "ids are met through a store: give make_buffer(store=...), or connect addresses"
            )
        if ids:
            rendezvous.meet(
                self._store,
                self.rank,
                ids,
                _Host(self),
                timeout_s=limit_s,
                epoch=self._epoch,
                cancelled=lambda: self._state is State.CLOSED,
            )

    def _add(self, link: Link) -> None:
        """A new link; masked. Raises: PeerUnreachable: the process has ended meanwhile."""
        with self._changes:
            self._check_open()
            self._set_gone(link.peer, 0)
            if isinstance(link, ShmLink):
                self._watcher.add(link.peer, link.address.pid, link.address.started)
            self._links[link.peer] = link
            self._wishes.pop(link.peer, None)
            if link.peer in self._active:  # its predecessor left, but an exchange goes on
                self._wishes[link.peer] = False
            self._changed = True
            if isinstance(link, ShmLink):
                nonce = link.address.nonce
                lib.fx_lend(self._b, link.peer, link.inbox.number, nonce)
        self._apply_now()
        with self._signal, self._changes:
            if self._installed.get(link.peer) is link:
                lib.fx_ring_peer(self._b, link.peer)

    def disconnect(self, ids: Iterable[int]) -> None:
        with self._changes:
            for peer in sorted(set(ids)):
                link = self._links.pop(peer, None)
                if link is None:
                    continue
                self._watcher.remove(peer)
                if isinstance(link, ShmLink):
                    lib.fx_lend(self._b, peer, -1, ffi.NULL)
                self._departed.append(link)
                self._wishes[peer] = False
                self._changed = True
                self._set_gone(peer, _MASKED)
        self._apply_now()

    def grow(self, capacity: int) -> None:
        with self._changes:
            self._check_open()
            if capacity < self.spec.capacity:
                raise ValueError(
                    f"capacity is {self.spec.capacity}; it cannot shrink to {capacity}"
                )
            self._set_capacity(capacity)

    def shrink(self, capacity: int) -> None:
        with self._changes:
            self._check_open()
            if not self.rank < capacity <= self.spec.capacity:
                raise ValueError(
                    f"capacity is {self.spec.capacity} and rank {self.rank} must stay below it; "
                    f"it cannot shrink to {capacity}"
                )
            self._set_capacity(capacity)
            self.disconnect([peer for peer in self._links if peer >= capacity])

    def _set_capacity(self, capacity: int) -> None:
        spec = replace(self.spec, capacity=capacity)
        check_spec(spec)
        self.spec = spec
        self._b.capacity = capacity

    def mask(self, ids: Iterable[int]) -> None:
        self._wish(ids, unmask=False)

    def unmask(self, ids: Iterable[int]) -> None:
        self._wish(ids, unmask=True)

    def _wish(self, ids: Iterable[int], *, unmask: bool) -> None:
        with self._changes:
            self._check_open()
            wanted = sorted(set(ids))
            for peer in wanted:
                if unmask and peer != self.rank and peer not in self._links:
                    raise ValueError(f"rank {peer} is not connected")
                if not unmask and peer == self.rank:
                    raise ValueError(f"rank {peer} is this rank; it cannot mask itself")
            now = self.active
            for peer in wanted:
                if peer == self.rank or (peer in now) == unmask or peer not in self._links:
                    continue
                self._wishes[peer] = unmask
                self._changed = True
                if unmask and self._gone(peer) in (_MASKED, _RESTARTED):
                    self._set_gone(peer, 0)
                elif not unmask and not self._gone(peer):
                    self._set_gone(peer, _MASKED)
        self._apply_now()

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        with self._exchange, self._changes:
            self._check_open()
            wanted = tuple(sorted(set(ids)))
            if self.rank not in wanted:
                raise ValueError(f"rank {self.rank} is not among the active ids {wanted}")
            for peer in wanted:
                if peer != self.rank and peer not in self._links:
                    raise ValueError(f"rank {peer} is not connected")
            if not self._epoch < epoch <= _MAX_EPOCH:
                raise ValueError(f"epoch {epoch} does not follow epoch {self._epoch}")
            # a peer may still be reading what an unfinished exchange sent: see kernels.c
            self._must_vote |= self._state is not State.BETWEEN
            self._must_vote |= not self._parted.isdisjoint(wanted)
            self._state = State.BETWEEN
            self._received = None
            self._posted = False
            self._b.ballot_bytes = -1
            self._wishes.clear()
            self._apply()
            for peer in wanted:
                if self._gone(peer) in (_MASKED, _RESTARTED):
                    self._set_gone(peer, 0)
            self._active = wanted
            self._epoch = epoch
            self.sequence = 0
            self._use_active()
            lib.fx_begin_epoch(self._b, epoch)
            lib.fx_resume(self._b)

    # ---- changes of links and masks ---------------------------------------------------------

    def _apply_now(self) -> None:
        """Apply changes if no exchange and no vote is under way; else the next one will."""
        if self._exchange.acquire(blocking=False):
            try:
                if self._state in (State.BETWEEN, State.BROKEN) and not self._posted:
                    with self._changes:
                        self._apply()
            finally:
                self._exchange.release()

    def _apply(self) -> None:
        """Make the kernels know what was changed. Nobody's rows are being read."""
        b = self._b
        self._changed = False
        for link in self._departed:
            if self._installed.get(link.peer) is link:
                del self._installed[link.peer]
                b.inbox[link.peer] = b.outbox[link.peer] = b.control[link.peer] = 0
                b.up[link.peer] = b.remote[link.peer] = b.due[link.peer] = 0
                self._drop([link.peer])
            link.close()
        if self._departed:
            self._received = None
            self._departed.clear()
            self._close_unused_endpoint()
        for peer, link in self._links.items():
            if self._installed.get(peer) is not link:
                self._installed[peer] = link
                self._parted.discard(peer)
                b.inbox[peer] = link.inbox.at
                b.control[peer] = link.control
                b.outbox[peer] = link.outbox
                b.remote[peer] = link.remote
                b.own_gen[peer] = b.peer_gen[peer] = b.up[peer] = b.due[peer] = 0
        self._open_places(again=True)
        wishes, self._wishes = self._wishes, {}
        self._drop([peer for peer, unmask in wishes.items() if not unmask])
        for peer, unmask in wishes.items():
            if unmask and peer not in self._active:
                self._active = tuple(sorted((*self._active, peer)))
                lib.fx_unmask(b, peer)
        self._use_active()
        self._flush()

    def _drop(self, ranks: Iterable[int]) -> None:
        """Mask ranks now."""
        dropped = set(ranks)
        self._parted |= dropped
        for peer in dropped:
            self._b.up[peer] = 0
            if self._gone(peer) in (_MASKED, _RESTARTED):
                self._set_gone(peer, 0)
        self._active = tuple(rank for rank in self._active if rank not in dropped)
        self._use_active()

    def _open_places(self, *, again: bool = False) -> None:
        """Map the places that peers have lent since they connected, too.

        again: and those of peers that have disconnected this rank and connected it anew, while
            this rank stayed connected: they read nothing in the place they had lent before.
        """
        b = self._b
        b.to_open = 0
        for peer, link in self._installed.items():
            if isinstance(link, NixlLink) or (link.outbox and not again):
                continue
            place = lib.fx_lent(b, peer)
            if place < 0 or place == link.place:
                continue
            try:
                link.open_place(place)
            except (CommError, OSError):
                self._set_gone(peer, _BROKEN_LINK)
                continue
            b.outbox[peer] = link.outbox
            if b.own_gen[peer]:
                lib.fx_hello(b, peer)

    def _use_active(self) -> None:
        b = self._b
        ffi.memmove(b.is_active, bytes(MAX_CAPACITY), MAX_CAPACITY)
        for at, rank in enumerate(self._active):
            b.active[at] = rank
            b.is_active[rank] = 1
        b.active_count = len(self._active)

    def _gone(self, peer: int) -> int:
        return int(lib.fx_gone(self._b, peer))

    def _set_gone(self, peer: int, why: int) -> None:
        with self._signal:
            if self._state is not State.CLOSED:
                lib.fx_set_gone(self._b, peer, why)
                if self._listener is not None:
                    self._listener(peer, why != 0)

    # ---- peers behind NIXL ------------------------------------------------------------------

    def endpoint(self) -> nixl.Endpoint:
        """The agent of this buffer, from the first such peer to the last."""
        with self._changes:
            if self._endpoint is None:
                from flexpert.comm.host import nixl

                nonce = self._window.address.nonce.hex()
                self._endpoint = nixl.Endpoint(f"flexpert-{self.rank}-{nonce}")
            return self._endpoint

    def _close_unused_endpoint(self) -> None:
        links = [*self._links.values(), *self._departed]
        if self._endpoint and not any(link.remote for link in links):
            self._endpoint.close()
            self._endpoint = None

    def _flush(self) -> bool:
        """Send what is due over NIXL, and take what has come; whether there are such peers."""
        links = [link for link in self._installed.values() if isinstance(link, NixlLink)]
        if not links or self._endpoint is None:
            return False
        now = time.monotonic()
        probe = now - self._probed >= _PROBE_S
        if probe:
            self._probed = now
        for link in links:
            if self._gone(link.peer) in (_ENDED, _BROKEN_LINK):
                continue
            try:
                link.flush(self._b)
                link.check()
                if probe:
                    link.probe()
            except CommError:
                self._set_gone(link.peer, _BROKEN_LINK)
        by_agent = {link.agent: link for link in links}
        for agent, message in self._endpoint.poll():
            if agent in by_agent:
                by_agent[agent].store(message)
        return True

    # ---- the step barrier -------------------------------------------------------------------

    def post_vote(self, payload: bytes) -> None:
        if len(payload) > VOTE_BYTES:
            raise ValueError(f"a vote holds {VOTE_BYTES} bytes, not {len(payload)}")
        with self._exchange:
            self._begin("vote between dispatch and combine")
            if self._posted:
                raise CommError(f"second vote in one step (epoch {self._epoch})")
            self._posted = True
            lib.fx_post_vote(self._b, payload, len(payload))
            self._flush()

    def wait_for_vote(self, timeout_s: float | None) -> bool:
        limit_ns = _FOREVER_NS if timeout_s is None else _limit_ns(timeout_s)
        with self._exchange:
            self._begin("vote between dispatch and combine")
            deadline_ns = time.monotonic_ns() + limit_ns
            slice_ns = _POLL_FIRST_NS
            while True:
                self.turns += 1
                remote = self._flush()
                slice_ns = min(2 * slice_ns, _POLL_MOST_NS) if remote else _SLICE_NS
                how = lib.fx_wait_any_vote(self._b, deadline_ns, slice_ns)
                if how == _INTERRUPTED:
                    raise self._interrupted("vote")
                if how != _AGAIN:
                    return bool(how == _OK)
                self._apply_now()

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        with self._exchange:
            self._check_whole()
            if not self._posted:
                raise CommError(f"the own vote is not posted yet (epoch {self._epoch})")
            self._wait(_VOTE, timeout_s)
            votes: dict[int, bytes] = {}
            for rank in self._active:
                vote = bytes(ffi.buffer(self._b.votes[rank], LINE))
                length = int.from_bytes(vote[:4], "little")
                if length > VOTE_BYTES:
                    raise self._nonsense(rank, f"a vote of {length} bytes")
                votes[rank] = vote[16 : 16 + length]
            lib.fx_end_vote(self._b)
            self._posted = False
            self._must_vote = False
            self._parted.difference_update(votes)
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

    def begin_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
    ) -> Pending[Received]:
        check_dispatch(self.spec, x, expert_ids, weights)
        check_table(table)
        payload = payload_of(self.spec, x, fp8)
        expert_ids = expert_ids.contiguous()
        weights = weights.contiguous()
        tokens, k = expert_ids.shape
        with self._exchange:
            self._begin("dispatch before combine of the last")
            if self._must_vote:
                raise CommError(
                    f"dispatch before the first vote of epoch {self._epoch}: the last exchange was "
                    "incomplete and a peer may still be reading it"
                )
            wire = x if fp8 is None else self._quantise(x, payload)
            self._state = State.BROKEN  # first: a signal may strike right after the call
            why = lib.fx_send_dispatch(
                self._b,
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
                self._state = State.BETWEEN
                raise ValueError(self._describe_expert(why, table))
            self.sequence += 1
            self._exchanges += 1
            self._flush()
            self._state = State.DISPATCHED
        sequence = self.sequence

        def receive(timeout_s: float | None) -> Received:
            return self._receive(wire, payload, table.slots, k, sequence, timeout_s)

        return _Hook(receive)

    def _receive(
        self,
        wire: torch.Tensor,
        payload: Payload,
        slots: int,
        k: int,
        sequence: int,
        timeout_s: float | None,
    ) -> Received:
        with self._exchange:
            self._check_whole()
            if self._state is not State.DISPATCHED or sequence != self.sequence:
                raise StaleEpoch(
                    f"dispatch {sequence} cannot be received now (epoch {self._epoch}); "
                    "call what begin_dispatch returned once, before anything else"
                )
            self._state = State.BROKEN
            masked = self._wait(_DISPATCH, timeout_s)
            offsets = torch.empty(slots + 1, dtype=torch.int32)
            pairs: int = lib.fx_receive(self._b, slots, offsets.data_ptr(), self._bad)
            if pairs < 0:
                raise self._refuse(pairs)
            received = HostReceived(self, self._b, payload, offsets, pairs, wire, k, masked)
            self._received = received
            self._state = State.RECEIVED
            return received

    def begin_combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Pending[torch.Tensor]:
        spec = self.spec
        _check_rows("y", y, received.weights.shape[0], spec)
        if reduce not in ("home", "rank"):
            raise ValueError(f"reduce is {reduce!r}, must be 'home' or 'rank'")
        if out is None:
            out = torch.empty((received.tokens_sent, spec.hidden), dtype=spec.dtype)
        else:
            _check_rows("out", out, received.tokens_sent, spec)
        home = reduce == "home"
        with self._exchange:
            self._check_whole()
            if received is not self._received or self._state is not State.RECEIVED:
                raise StaleEpoch(
                    f"combine for dispatch {received.sequence} of epoch {received.epoch}, but the "
                    f"last is {self.sequence} of epoch {self._epoch}, "
                    + ("combined already" if self._state is State.BETWEEN else "not combined")
                )
            if weights is not None:
                self._set_weights(weights, received, home)
            self._state = State.BROKEN
            lib.fx_send_combine(self._b, y.data_ptr(), home)
            self._flush()
            self._state = State.COMBINED
        sequence = self.sequence

        def receive(timeout_s: float | None) -> torch.Tensor:
            return self._reduce(y, out, home, sequence, timeout_s)

        return _Hook(receive)

    def _set_weights(self, weights: torch.Tensor, received: Received, home: bool) -> None:
        assert isinstance(received, HostReceived)
        shape = (received.tokens_sent, received.choices)
        if not home:
            raise ValueError("weights at combine need reduce='home'")
        if weights.dtype is not torch.float32 or weights.shape != shape:
            raise ValueError(
                f"weights must be {list(shape)} float32, is {list(weights.shape)} {weights.dtype}"
            )
        lib.fx_set_weights(self._b, weights.contiguous().data_ptr(), shape[1])

    def _reduce(
        self, y: torch.Tensor, out: torch.Tensor, home: bool, sequence: int, timeout_s: float | None
    ) -> torch.Tensor:
        with self._exchange:
            self._check_whole()
            if self._state is not State.COMBINED or sequence != self.sequence:
                raise StaleEpoch(
                    f"combine {sequence} cannot be received now (epoch {self._epoch}); "
                    "call what begin_combine returned once, before anything else"
                )
            self._state = State.BROKEN
            self._wait(_COMBINE, timeout_s)
            why = lib.fx_reduce(self._b, y.data_ptr(), out.data_ptr(), home, self._bad)
            if why:
                what = "another reduce mode" if why == _WRONG_MODE else "a wrong number of rows"
                raise self._nonsense(self._bad[0], what)
            self._state = State.BETWEEN
            return out

    def combine_input(self, received: Received) -> torch.Tensor:
        rows = received.weights.shape[0]
        raw = self.room(rows, self.spec.hidden * self.spec.dtype.itemsize, "y")
        return raw.view(self.spec.dtype)

    def loss(self, received: Received) -> Loss | None:
        with self._exchange:
            if received is not self._received or self._state is not State.BETWEEN:
                raise StaleEpoch(
                    f"loss of dispatch {received.sequence} of epoch {received.epoch}: "
                    "ask after its combine and before the next dispatch"
                )
            if not self._b.lost_pairs:
                return None
            assert isinstance(received, HostReceived)
            weight = torch.empty(received.tokens_sent, dtype=torch.float32)
            choices = torch.empty((received.tokens_sent, received.choices), dtype=torch.bool)
            ranks = torch.empty(MAX_CAPACITY, dtype=torch.uint8)
            lib.fx_loss(
                self._b,
                received.choices,
                weight.data_ptr(),
                choices.data_ptr(),
                ranks.data_ptr(),
            )
            return Loss(tuple(ranks.nonzero().flatten().tolist()), weight, choices)

    def statistics(self) -> Statistics:
        b = self._b
        ids = range(self.spec.capacity)
        return Statistics(
            exchanges=self._exchanges,
            bytes_sent={rank: b.bytes_sent[rank] for rank in ids},
            dispatch_wait_ns={rank: b.wait_ns[_DISPATCH][rank] for rank in ids},
            combine_wait_ns={rank: b.wait_ns[_COMBINE][rank] for rank in ids},
        )

    def close(self) -> None:
        self.interrupt()  # a wait on another thread ends before its memory goes
        with self._exchange, self._changes:
            if self._state is State.CLOSED:
                return
            with self._signal:
                self._state = State.CLOSED
            for link in [*self._links.values(), *self._departed]:
                link.close()
            self._links.clear()
            self._installed.clear()
            self._departed.clear()
            self._close_unused_endpoint()
            self._window.close()
            lib.fx_close(self._b)
        self._watcher.close()

    # ---- helpers ----------------------------------------------------------------------------

    def holds(self, received: HostReceived) -> bool:
        """Whether the rows of a dispatch still lie where they arrived."""
        return received is self._received and self._state is State.RECEIVED

    def room(self, rows: int, row_bytes: int, name: str = "x") -> torch.Tensor:
        """uint8 [rows, row_bytes], the same memory in every exchange."""
        size = rows * row_bytes
        if name not in self._rooms or self._rooms[name].shape[0] < size:
            self._rooms[name] = torch.empty(size + size // 2, dtype=torch.uint8)
        return self._rooms[name][:size].view(rows, row_bytes)

    def _quantise(self, x: torch.Tensor, payload: Payload) -> torch.Tensor:
        wire = self.room(x.shape[0], align(payload.bytes, LINE), "wire")
        lib.fx_quantise(
            x.data_ptr(),
            DTYPES[x.dtype],
            *x.shape,
            payload.kind - 1,
            wire.data_ptr(),
            wire.shape[1],
        )
        return wire

    def _check_open(self) -> None:
        if self._state is State.CLOSED:
            raise CommError(f"the buffer of rank {self.rank} is closed")

    def _check_whole(self) -> None:
        """No exchange of this epoch was left incomplete."""
        self._check_open()
        if lib.fx_is_interrupted(self._b):
            raise self._interrupted("call")
        if self._state is State.BROKEN:
            raise StaleEpoch(
                f"epoch {self._epoch} is over for rank {self.rank}: an exchange was incomplete; "
                "begin another with set_active"
            )

    def _begin(self, otherwise: str) -> None:
        """Between two exchanges: let changes take effect."""
        self._check_whole()
        if self._state is not State.BETWEEN:
            raise CommError(f"{otherwise} (epoch {self._epoch})")
        if self._changed:
            self._apply_now()
        lib.fx_greet(self._b)

    def _wait(self, what: int, timeout_s: float | None) -> tuple[int, ...]:
        """Until all active ranks have written; returns those that were masked instead."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        begun_ns = time.monotonic_ns()
        limit_ns = _limit_ns(limit_s)
        deadline_ns = begun_ns + limit_ns
        others = _Waiting(self._b, min(limit_ns, _limit_ns(self.timeout_s)), begun_ns)
        masked: list[int] = []
        poll_ns = _POLL_FIRST_NS
        while True:
            self.turns += 1
            remote = self._flush()
            poll_ns = min(2 * poll_ns, _POLL_MOST_NS)
            how = lib.fx_wait(
                self._b,
                what,
                begun_ns,
                deadline_ns,
                poll_ns if remote else min(others.period_ns, _SLICE_NS),
                self._missing,
                self._missing_count,
            )
            if self._b.to_open:
                self._open_places()
            if how == _OK:
                if remote:
                    patience_s = min(limit_s, self.timeout_s) / _LATE
                    self._send_on(time.monotonic_ns() + _limit_ns(patience_s))
                return tuple(sorted(masked))
            if how == _INTERRUPTED:
                raise self._interrupted(_PHASES[what])
            now_ns = time.monotonic_ns()
            others.listen(now_ns)
            if how not in (_TIMEOUT, _LOST):
                continue
            missing = sorted(self._missing[at] for at in range(self._missing_count[0]))
            if how == _TIMEOUT and now_ns < begun_ns + 2 * limit_ns:
                silent = [rank for rank in missing if not others.waits(rank, now_ns)]
                if len(silent) < len(missing):
                    missing = silent
                    deadline_ns = now_ns + others.period_ns
            if not missing:
                continue
            if not self._lenient:
                raise self._failed(tuple(missing), what, limit_s, lost=how == _LOST)
            self._drop(missing)
            masked += missing

    def _send_on(self, deadline_ns: int) -> None:
        """Until what was sent over NIXL has left: nobody may drive it once this call is over.

        No two ranks wait for each other here: who is done has all that was sent to it. A stopped
        peer must not make this rank so late that the others take it for stopped, too: once it is
        masked it is not waited for any more, neither here nor in later calls.
        """
        links = [
            link
            for link in self._installed.values()
            if isinstance(link, NixlLink) and link.peer in self._active
        ]
        while any(not self._gone(link.peer) and link.is_sending() for link in links):
            if time.monotonic_ns() >= deadline_ns or lib.fx_is_interrupted(self._b):
                return
            self._flush()
            time.sleep(_NAP_S)

    def _failed(
        self, missing: tuple[int, ...], what: int, limit_s: float, *, lost: bool
    ) -> CommError:
        if not lost:
            return RankTimeout(missing, _PHASES[what], self._epoch, limit_s)
        why = {rank: _WHY[self._gone(rank)] for rank in missing}
        return RankLost(missing, _PHASES[what], self._epoch, why)

    def _interrupted(self, phase: str) -> Interrupted:
        return Interrupted(f"rank {self.rank} was interrupted in {phase} (epoch {self._epoch})")

    def _refuse(self, why: int) -> Exception:
        if why == _NO_MEMORY:
            return MemoryError("no memory for the plan of an exchange")
        what = "another kind of rows" if why == _WRONG_PAYLOAD else "rows or slots that cannot be"
        return self._nonsense(self._bad[0], what)

    def _nonsense(self, peer: int, what: str) -> CommError:
        return CommError(
            f"rank {peer} sent {what} (epoch {self._epoch}, exchange {self.sequence}); "
            "it should be removed"
        )

    def _describe_expert(self, why: int, table: ExpertTable) -> str:
        expert = self._bad[0]
        if why == _NO_SUCH_EXPERT:
            return f"expert {expert} does not exist: the table has {table.rank.shape[0]}"
        rank, slot = int(table.rank[expert]), int(table.slot[expert])
        if rank >= 0 and not 0 <= slot < 2**15:
            return f"expert {expert} has slot {slot} on rank {rank}"
        who = "nobody" if rank < 0 else f"rank {rank}, which is not active"
        return f"expert {expert} is owned by {who} (epoch {self._epoch})"


class _Host(rendezvous.Host):
    """How links come about when two ranks meet through a store."""

    def __init__(self, buffer: HostBuffer) -> None:
        self._buffer = buffer
        self._half: dict[int, Link] = {}

    def greet(self) -> bytes:
        return msgspec.msgpack.encode(self._buffer._greeting)

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        buffer = self._buffer
        self.forget(peer)
        try:
            theirs = msgspec.msgpack.decode(greeting, type=Greeting)
        except msgspec.MsgspecError as error:
            raise ValueError(f"what rank {peer} wrote is no greeting: {error}") from error
        window, spec = buffer._window, buffer.spec
        if choose_channel(buffer._greeting, theirs) == "shm":
            self._half[peer] = ShmLink(peer, theirs.address, window, spec)
            return b""
        if theirs.address.spec != buffer._window.address.spec:
            raise ValueError(f"rank {peer} has a window of another spec than {spec}")
        link = NixlLink(peer, theirs.address, buffer.endpoint(), spec)
        self._half[peer] = link
        return link.offer

    def open(self, peer: int, details: bytes) -> None:
        link = self._half[peer]
        if isinstance(link, NixlLink):
            link.open(details)
        self._buffer._add(link)
        del self._half[peer]

    def forget(self, peer: int) -> None:
        link = self._half.pop(peer, None)
        if link is not None:
            link.close()


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
        "rows_at": ROWS_AT,
        "results_at": where.results_at,
    }
    for name, value in values.items():
        setattr(b, name, value)
    ffi.memmove(b.nonce, nonce, len(nonce))
