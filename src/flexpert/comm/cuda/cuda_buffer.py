"""CudaBuffer: dispatch and combine between GPU ranks.

Rows and flags go from GPU to GPU (peers.py, cuda_exchange.py), to other machines by way of their
hosts (forwarder.py), what is agreed by hosts through the control buffer (comm/gpu_buffer.py).
Membership changes write one table on the GPU, in the order of the stream, so that captured CUDA
graphs go on without being captured again.

What its `capabilities` say has these reasons:
  - `unmask` takes effect at the end of the next vote, in which both sides agree on the new link; or
    at once, with `unmask_at_once` (link_tags.py).
  - Exchanges return when they are launched, also outside of graphs. What kernels report lies in
    page-locked memory of the host, which every call looks at without waiting: so a lost peer is
    raised (or masked) by the call after the kernel has noticed it, and before anybody relies on
    results by `check`, by votes, and by all that waits for the device anyhow. Until then tensors
    may lack what that peer owed.
  - Everything must be launched on one stream, the current one of the caller.
  - Windows are sized for the capacity: it cannot grow. An id may be used again only when its old
    process has exited: the place in the peers' windows belongs to the id.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from flexpert.comm import quant
from flexpert.comm.buffer import (
    BufferSpec,
    Capabilities,
    Channel,
    ExpertTable,
    MissingResults,
    OnTimeout,
    Pending,
    Received,
    Reduce,
    Scales,
)
from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.comm.cuda.cuda_exchange import (
    CudaDispatched,
    CudaExchange,
    DispatchKind,
    ExchangeCalls,
    Part,
    Tuning,
)
from flexpert.comm.cuda.cuda_layout import (
    LANES,
    MAX_EPOCH,
    PAGE_WORDS,
    PHASES,
    RELEASE,
    Page,
    Word,
    check,
    layout,
    read_report,
    tag,
)
from flexpert.comm.cuda.cuda_received import CudaReceived
from flexpert.comm.cuda.forwarder import FarWindow, Forwarder
from flexpert.comm.cuda.link_tags import Beginning, LinkTags
from flexpert.comm.cuda.peers import (
    CudaAddress,
    CudaWindow,
    WindowMemory,
    decode,
    open_window,
    own_window,
)
from flexpert.comm.errors import CommError, Interrupted, PeerUnreachable, StaleEpoch
from flexpert.comm.gpu_buffer import MOST_KINDS, DeviceBuffer, Hook, default_device, find_missing
from flexpert.comm.host.core import State
from flexpert.comm.routing import check_dispatch, check_table
from flexpert.comm.window_layout import VOTE_BYTES

if TYPE_CHECKING:
    from flexpert.comm.bounded import StoreKeys
    from flexpert.comm.cuda.kernel_launch import LaunchStep

_NAP_S = 0.001
_STOP = int(Page.STOP)
_WHOLE: Part = "whole"
_MOST_TABLES = 256  # and kinds of dispatches with them, whose calls are kept
_MOST_CALLS = 32  # of combines after one kind of dispatch: then their tensors differ each time
_NOTHING_REPORTED = bytes(8 * LANES)


@dataclass(slots=True, eq=False)
class _Back:
    """The arguments of a combine; see `CudaExchange.combine`."""

    y: torch.Tensor
    sent: CudaDispatched
    reduce: Reduce
    weights: torch.Tensor | None
    out: torch.Tensor
    places: torch.Tensor | None
    shared: bool

    def key(self, part: Part) -> tuple[Reduce, bool, bool, bool, Part]:
        """Of `ExchangeCalls.combine`."""
        return self.reduce, self.weights is None, not self.shared, self.places is None, part


class CudaBuffer(DeviceBuffer):
    """The `Buffer` of GPU ranks. See the module's docstring."""

    capabilities = Capabilities(
        graph_capture=True,
        grow=False,
        nixl_channel=True,
        reductions=frozenset({"home", "rank"}),
        byte_rows=True,
        row_order=True,
        row_weights=True,
        call_timeouts=True,
        mask_at_vote=False,
        unmask_at_vote=True,
        epoch_needs_vote=False,
        owners_checked=False,
        raises_later=True,
        vote_bytes=VOTE_BYTES,
        traffic_counted=False,
    )

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        timeout_s: float = 30.0,
        on_timeout: OnTimeout = "raise",
        store: StoreKeys | None = None,
        channel: Channel = "shm",
        machine: str | None = None,
        device: torch.device | None = None,
        same_k: bool = False,
        unmask_at_once: bool = False,
        choices: int | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        """
        Args:
            channel: "shm": all ranks are on this machine; otherwise each exchange has two launches
                more, which take what came from others.
            device: of the window; default: the current CUDA device.
            same_k: see `CudaExchange`; equal on all ranks.
            unmask_at_once: `unmask` called by the thread that exchanges takes effect when it
                returns, in captured graphs, too; equal on all ranks. Else in the next vote.
            choices: most choices of a token that a combine with "home" takes; the memory for
                results grows with them. Default: `spec.topk`. Equal on all ranks.
            The rest: see `make_buffer`.
        """
        check(spec)
        device = device or default_device()
        self._page = torch.zeros(
            PAGE_WORDS, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu"
        )
        raw = (ctypes.c_char * (8 * PAGE_WORDS)).from_address(self._page.data_ptr())
        self._words = memoryview(raw).cast("B").cast("q")  # the page; quicker than a tensor
        self._reports = memoryview(raw).cast("B")[8 * Page.REPORT :][: len(_NOTHING_REPORTED)]
        self._tables: dict[int, ExpertTable] = {}  # that were checked
        self._kinds: dict[tuple[object, ...], DispatchKind] = {}  # likewise
        # by id of the table and kind; and those that were used last, by id of the table, scales,
        # and whether phases are halved
        self._calls_of_kind: dict[tuple[int, DispatchKind], ExchangeCalls | None] = {}
        self._calls: dict[tuple[int, Scales | None, bool], ExchangeCalls] = {}
        self._like: dict[int, torch.Tensor] = {}  # results, by number of tokens
        super().__init__(
            rank,
            spec,
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            store=store,
            device=device,
            channel=channel,
            machine=machine,
            listener=self._hear,
        )
        self._received: CudaReceived | None = None
        self._epoch = self.epoch
        self._window: CudaWindow = own_window(layout(spec, choices=choices).size, self.device)
        self.exchange = CudaExchange(
            rank,
            spec,
            self._window.tensor,
            self._page,
            choices=choices,
            same_k=same_k,
            several_machines=channel != "shm",
            tuning=tuning,
        )
        self._address = CudaAddress.of(self._control.address, spec, self._window).encode()
        self._peers: dict[int, WindowMemory] = {}
        self._forwarder: Forwarder | None = None
        self._departed: list[WindowMemory] = []
        self._thread = threading.get_ident()  # that exchanges
        self._tags: dict[int, int] = {rank: tag(0, 0)}  # of the links that the device knows
        self._own_tags = LinkTags() if unmask_at_once else None
        if unmask_at_once:
            self.capabilities = replace(type(self).capabilities, unmask_at_vote=False)
        self._broken: dict[int, str] = {}  # id → the phase in which nothing came from it
        self._limit_s = timeout_s
        self._write(restart=None)

    # ---- membership -------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        return self._address

    @property
    def connected(self) -> tuple[int, ...]:
        with self._changes:
            return tuple(sorted((self.rank, *self._peers)))

    @property
    def most_rows(self) -> int:
        return self.exchange.most_rows

    @property
    def _stopped(self) -> bool:
        return self._words[_STOP] != 0

    def count(self, received: Received) -> int:
        assert isinstance(received, CudaReceived)
        return received.count

    def connect(
        self,
        peers: Mapping[int, bytes] | Iterable[int],
        *,
        activate: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        known, far = set(self.connected), list[int]()
        if isinstance(peers, Mapping):
            new = {p: decode(p, a, self.spec) for p, a in peers.items() if p not in known}
            controls = {peer: address.control for peer, address in new.items()}
            self._control.connect(controls, timeout_s=timeout_s)
        else:
            peers = sorted(set(peers))
            self._control.connect(peers, timeout_s=timeout_s)
            ids = [peer for peer in peers if peer not in known]
            far = [peer for peer in ids if self._control.channel(peer) == "nixl"]
            new = self._met([peer for peer in ids if peer not in far], timeout_s)
        opened: dict[int, WindowMemory] = {}
        try:
            if far:
                opened.update(self._meet(far, timeout_s))
            for peer, address in new.items():
                opened[peer] = open_window(peer, address, self.device)
        except (CommError, OSError, ValueError):
            self._control.disconnect((*new, *far))
            self._part(far)
            for memory in opened.values():
                memory.close()
            raise
        with self._changes:
            for peer, memory in opened.items():
                self._peers[peer] = memory
                if self._own_tags is not None:
                    nonces = self._control.nonce(self.rank), self._control.nonce(peer)
                    self._own_tags.meet(peer, *nonces)
            self._changed = True
        self._apply_now()
        if activate:
            self.unmask(peers)

    def _key(self, peer: int) -> str:
        """Of a process's address in the store; no other process ever has the same."""
        return f"flexpert/cuda/{self._control.nonce(peer).hex()}"

    def _met(self, near: list[int], timeout_s: float | None) -> dict[int, CudaAddress]:
        """The addresses of peers on this machine, which tell them here once they have met."""
        if not near:
            return {}
        assert self._store is not None
        self._store.set(self._key(self.rank), self._address.hex())
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        addresses: dict[int, CudaAddress] = {}
        while len(addresses) < len(near):
            for peer in near:
                # reads without waiting, as `get` would
                encoded = self._store.compare_set(self._key(peer), "-", "-").decode()
                if peer not in addresses and encoded != "-":
                    addresses[peer] = decode(peer, bytes.fromhex(encoded), self.spec)
            if time.monotonic() > deadline:
                late = [peer for peer in near if peer not in addresses]
                raise PeerUnreachable(f"ranks {late} told no address of their windows")
            if len(addresses) < len(near):
                time.sleep(_NAP_S)
        return addresses

    def _meet(self, far: list[int], timeout_s: float | None) -> dict[int, FarWindow]:
        """Links to ranks on other machines, and what stands in for their windows."""
        assert self._store is not None
        if self._forwarder is None:
            self._forwarder = Forwarder(
                self.rank,
                self.spec,
                self.device,
                choices=self.exchange.choices,
                broken=self._break,
            )
        return self._forwarder.connect(
            self._store,
            far,
            timeout_s=self.timeout_s if timeout_s is None else timeout_s,
            cancelled=lambda: self._state is State.CLOSED,
        )

    def _part(self, ids: Iterable[int]) -> None:
        if self._forwarder is not None:
            for peer in ids:
                self._forwarder.disconnect(peer)

    def _break(self, peer: int, why: str) -> None:
        """From the forwarder's thread: a link to another machine is broken."""
        self._control.break_link(peer)

    def disconnect(self, ids: Iterable[int]) -> None:
        gone = sorted(set(ids))
        self._control.disconnect(gone)
        self._part(gone)
        with self._changes:
            for peer in gone:
                memory = self._peers.pop(peer, None)
                if memory is not None:
                    self._tags.pop(peer, None)
                    self._departed.append(memory)
                    self._page[Page.GONE + peer] = 1
                    self._changed = True
        self._apply_now()

    def mask(self, ids: Iterable[int]) -> None:
        masked = sorted(set(ids))
        self._control.mask(masked)
        with self._changes:
            for peer in masked:
                if peer not in self._tags:
                    continue
                self._page[Page.GONE + peer] = 1
                if self._own_tags is None:
                    del self._tags[peer]
                elif self._state is not State.BETWEEN:
                    self._broken[peer] = "dispatch"
            self._changed = True
        self._apply_now()

    def unmask(self, ids: Iterable[int]) -> None:
        super().unmask(ids)
        if self._own_tags is not None:
            with self._changes:
                self._changed = True
            self._apply_now()

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        with self._lock, self._changes:
            self._thread = threading.get_ident()
            if epoch > MAX_EPOCH:
                raise ValueError(f"epoch {epoch} is above {MAX_EPOCH}, which flags can carry")
            desired = tuple(sorted(set(ids)))
            self._control.set_active(desired, epoch)
            self._epoch = epoch
            self._synchronize()
            # a peer may still be reading what an unfinished exchange sent
            unfinished = bool(read_report(self._page)) and not self._lenient
            self._must_vote |= unfinished or self._state is not State.BETWEEN
            self._page[Page.STOP] = 0
            self._page[Page.GONE : Page.GONE + LANES] = 0
            for peer in self._control.lost:
                self._page[Page.GONE + peer] = 1
            self._state = State.BETWEEN
            self._received = None
            self.sequence = 0
            self._tags = dict.fromkeys(desired, tag(epoch, 0))
            if self._own_tags is not None:
                self._own_tags.begin_epoch()
            self._broken.clear()
            self._unmap()
            self._write(restart=None)

    # ---- changes ------------------------------------------------------------------------------

    def _hear(self, peer: int, in_vain: bool) -> None:
        """From the control buffer's threads: whether waiting for a peer is in vain."""
        if peer < LANES:
            self._page[Page.GONE + peer] = int(in_vain)

    def _apply_now(self) -> None:
        """Apply changes if no exchange is under way; else the next exchange or vote will.

        Only the thread that exchanges may: to the others, the stream it launches on is unknown.
        """
        if self._thread == threading.get_ident() and self._lock.acquire(blocking=False):
            try:
                if self._state in (State.BETWEEN, State.BROKEN):
                    self._apply()
            finally:
                self._lock.release()

    def _apply(self) -> None:
        with self._changes:
            if not self._changed or self._capturing:
                return
            self._synchronize()
            missing = {m.rank: m.phase for m in read_report(self._page)}
            if missing and self._lenient:
                self._broken.update(missing)
                self._control.mask(missing)
            elif missing and self._state is State.BETWEEN:
                return  # writing the table would lose it; the next exchange or vote raises it
            self._changed = False
            began = self._relink()
            self._unmap()
            self._write(
                restart=tuple(peer for peer, link in began.items() if link.anew),
                ended={p: link.await_end for p, link in began.items() if link.await_end},
            )
            if self._own_tags is not None and not any(link.await_end for link in began.values()):
                self._synchronize()  # a replay on another stream finds the table as it is now

    def _relink(self) -> dict[int, Beginning]:
        """Make `_tags` those of the active peers; returns the links that begin or go on."""
        active, own = self._control.active, self._own_tags
        ended = {p: self._tags.pop(p) for p in list(self._tags) if p not in active}
        if own is None:
            return {}
        exchanges = self.exchange.exchanges
        for peer, its_tag in ended.items():
            if self._broken.get(peer) == PHASES[RELEASE]:
                own.take_back(peer)
            else:
                own.end(peer, its_tag, exchanges, whole=peer not in self._broken)
        self.exchange.release(p for p in ended if self._broken.get(p) != PHASES[RELEASE])
        self._broken.clear()
        began = {}
        for peer in active:
            if peer in self._tags or peer not in self._peers:
                continue
            if self._state is not State.BETWEEN:
                self._changed = True  # its first exchange is the next one
                continue
            began[peer] = own.begin(peer, self.epoch, exchanges)
            self._tags[peer] = began[peer].tag
            self._page[Page.GONE + peer] = 0
            if peer in self.lost:
                self._page[Page.GONE + peer] = 1
        return began

    def _unmap(self) -> None:
        """Nothing that was launched is under way. The table forgets these peers right after, and
        unmapping takes so long that no step should wait for it."""
        for memory in self._departed:
            CAPTURE_GUARD.later(memory.close)
        self._departed.clear()

    def _write(
        self, restart: tuple[int, ...] | None, ended: Mapping[int, int] | None = None
    ) -> None:
        """Rewrite the table, between two exchanges."""
        addresses = {peer: memory.address for peer, memory in self._peers.items()}
        addresses[self.rank] = self._window.address
        self._limit_s = self.timeout_s
        self.exchange.configure(
            addresses,
            self._tags,
            inboxes={p: m.inbox for p, m in self._peers.items() if isinstance(m, FarWindow)},
            limit_ns=int(self.timeout_s * 1e9),
            elsewhere=any(memory.elsewhere for memory in self._peers.values()),
            restart=restart,
            ended=ended,
        )

    # ---- the step barrier ---------------------------------------------------------------------

    def post_vote(self, payload: bytes, *, wait: bool = True) -> None:
        with self._lock:
            self._begin("vote between dispatch and combine", wait=wait)
            self._control.post_vote(payload)

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        with self._lock:
            self._check_whole()
            votes = self._control.collect_votes(timeout_s)
            self._must_vote = False
            with self._changes:
                tags = self._agreed()
                fresh = tuple(p for p, tag in tags.items() if self._tags.get(p) != tag)
                if fresh or tags.keys() != self._tags.keys():
                    self._synchronize()
                    for peer in fresh:
                        self._page[Page.GONE + peer] = 0
                    self._tags = tags
                    self._write(restart=fresh)
            return votes

    def _agreed(self) -> dict[int, int]:
        """The tags of the links that are up after a vote."""
        tags = {self.rank: tag(self.epoch, 0)}
        for peer in self._control.active:
            number = self._control.link(peer)
            if peer != self.rank and number is not None:
                tags[peer] = (
                    tag(self.epoch, number)
                    if self._own_tags is None
                    else self._own_tags.agree(peer, self.epoch, number)
                )
        return tags

    @property
    def vote_due(self) -> bool:
        """Whether peers were unmasked that only the next vote takes in."""
        with self._changes:
            return not set(self._control.active) <= self._tags.keys()

    def interrupt(self) -> None:
        self._control.interrupt()
        self._page[Page.STOP] = 1

    # ---- the exchange -------------------------------------------------------------------------

    def begin_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
    ) -> Pending[Received]:
        kind = self._kind_of(x, expert_ids, weights, table, fp8, wait=False)
        key = (id(table), fp8, True)
        with self._lock:
            sent = self._send(x, expert_ids, weights, table, kind, self._calls.get(key))
            sequence = self.sequence
            if sent.calls is None:
                self._choose(key, x, sent)

        def receive(timeout_s: float | None) -> Received:
            with self._lock:
                self._check_whole()
                self._check_turn(State.DISPATCHED, sequence, "dispatch")
                self._set_limit(timeout_s)
                return self._receive(sent, wait=True)

        return Hook(receive)

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
        timeout_s: float | None = None,
    ) -> CudaReceived:
        calls = self._calls.get((id(table), fp8, False))
        if calls is not None and timeout_s is None:
            received = self.dispatch_by(calls, x, expert_ids, weights)
            if received is not None:
                return received
        wait = self._cuda  # in one launch with the sending
        kind = self._kind_of(x, expert_ids, weights, table, fp8, wait=wait)
        with self._lock:
            self._set_limit(timeout_s)
            sent = self._send(x, expert_ids, weights, table, kind)
            received = self._receive(sent, wait=not wait)
            if wait:
                sent.calls = self._choose((id(table), fp8, False), x, sent)
            return received

    def _choose(
        self, key: tuple[int, Scales | None, bool], x: torch.Tensor, sent: CudaDispatched
    ) -> ExchangeCalls | None:
        """The calls of dispatches like this one, if it is not the first; the next with `key` are
        tried with them."""
        if self._capturing:  # it is one launch only if it is made apart from that
            return None
        of = id(sent.table), sent.kind
        if of not in self._calls_of_kind:  # of many tables there is but one dispatch
            if len(self._calls_of_kind) >= _MOST_TABLES:
                self._calls_of_kind.clear()
                self._calls.clear()
            self._calls_of_kind[of] = None
            return None
        calls = self._calls_of_kind[of]
        if calls is None:
            calls = self.calls_of(x, sent, self.spec.max_tokens)
        if calls is not None:
            self._calls_of_kind[of] = self._calls[key] = calls
        return calls

    def calls_of(
        self,
        x: torch.Tensor,
        sent: CudaDispatched,
        most_tokens: int,
        then: LaunchStep | None = None,
        **more: torch.Tensor,
    ) -> ExchangeCalls | None:
        """How others like this dispatch go in one call of C; None where they cannot.

        See `CudaExchange.dispatch_call`.
        """
        call = self.exchange.dispatch_call(x, sent, most_tokens, then, **more)
        if call is None:
            return None
        half = None if sent.kind.waits else self.exchange.receive_call(sent)
        receive = None if half is None else half.run
        return ExchangeCalls(sent.table, sent.kind, call.run, receive, {})

    def dispatch_by(
        self,
        calls: ExchangeCalls,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        *more: torch.Tensor,
    ) -> CudaReceived | None:
        """`dispatch` in one call of C, and what `calls_of` was told besides. That looks at tensors
        and at what kernels have reported; where it does nothing, as if anything is unusual,
        this returns None, and `dispatch` says why not, or does it."""
        with self._lock:
            if (
                self._state is not State.BETWEEN
                or self._changed
                or self._must_vote
                or self._limit_s != self.timeout_s
            ):
                return None
            self._state = State.BROKEN  # first: a signal may strike right after the launch
            tokens = calls.dispatch(-1, 0, x, expert_ids, weights, *more)
            if tokens < 0:
                self._state = State.BETWEEN
                return None
            self._thread = threading.get_ident()
            self.sequence += 1
            self._exchanges += 1
            sent = CudaDispatched(expert_ids, weights, calls.table, tokens, calls.kind, calls)
            received = self._received = CudaReceived(self, sent, self._epoch, self.sequence)
            self._state = State.RECEIVED
            return received

    def _send(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        kind: DispatchKind,
        calls: ExchangeCalls | None = None,
    ) -> CudaDispatched:
        """calls: which may fit. Else the result is without, and launched step by step."""
        self._begin("dispatch before combine of the last")
        if self._must_vote:
            self._check_voted("the last exchange was incomplete and a peer may still be reading it")
        self._state = State.BROKEN  # first: a signal may strike right after the launch
        if calls is not None and calls.dispatch(-1, 0, x, expert_ids, weights) >= 0:
            tokens = expert_ids.shape[0]
            sent = CudaDispatched(expert_ids, weights, table, tokens, kind, calls)
        else:
            sent = self.exchange.send_dispatch(
                x, expert_ids.contiguous(), weights.contiguous(), table, wait=kind.waits, kind=kind
            )
        self.sequence += 1
        self._exchanges += 1
        self._state = State.DISPATCHED
        return sent

    def _receive(self, sent: CudaDispatched, *, wait: bool) -> CudaReceived:
        self._state = State.BROKEN
        half = None if sent.calls is None else sent.calls.receive
        if half is None or half(sent.tokens, 0) < 0:
            if wait:
                self.exchange.wait_dispatch(sent)
            self.exchange.index(sent)
        self.raise_reported()
        received = self._received = CudaReceived(self, sent, self.epoch, self.sequence)
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
        places: torch.Tensor | None = None,
        expert_ids: torch.Tensor | None = None,
    ) -> Pending[torch.Tensor]:
        """As in `Buffer`, and:

        places: of `CudaReceived.pack`: y is [slots, limit, hidden] or [slots · limit, hidden],
            with each row in its place.
        expert_ids: [tokens, k] as in dispatch, but that some may be -1 now and count no longer.
            Together with `weights`, on all ranks if on one, it has all ranks tell each other the
            weights first, and both may be given with "rank" as well; the sending half then waits
            for the peers' weights.
        """
        with self._lock:
            back = self._checked(y, received, reduce, weights, out, places, expert_ids)
            self._state = State.BROKEN
            self._send_back(back)
            self._state = State.COMBINED
            sequence = self.sequence

        def receive(timeout_s: float | None) -> torch.Tensor:
            with self._lock:
                self._check_whole()
                self._check_turn(State.COMBINED, sequence, "combine")
                self._set_limit(timeout_s)
                self._state = State.BROKEN
                return self._sum(back)

        return Hook(receive)

    def combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        timeout_s: float | None = None,
        places: torch.Tensor | None = None,
        expert_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if timeout_s is None:
            summed = self.combine_by(received, y, out, weights, expert_ids, places, reduce)
            if summed is not None:
                return summed
        with self._lock:
            back = self._checked(y, received, reduce, weights, out, places, expert_ids)
            self._set_limit(timeout_s)
            self._state = State.BROKEN
            if not self._cuda:
                self._send_back(back)
                return self._sum(back)
            self.exchange.combine(
                y, back.sent, back.out, reduce=reduce, weights=back.weights, places=places,
                shared=back.shared,
            )  # fmt: skip
            self._state = State.BETWEEN
            self._remember(back, _WHOLE)
            return back.out

    def combine_by(
        self,
        received: Received,
        y: torch.Tensor,
        out: torch.Tensor | None,
        weights: torch.Tensor | None,
        expert_ids: torch.Tensor | None,
        places: torch.Tensor | None,
        reduce: Reduce = "rank",
    ) -> torch.Tensor | None:
        """`combine` in one call of C, as `dispatch_by`; or None, and nothing was done."""
        with self._lock:
            last = self._received
            if (
                last is None
                or received is not last
                or self._state is not State.RECEIVED
                or self._limit_s != self.timeout_s
            ):
                return None
            sent = last.sent
            if sent.calls is None:
                return None
            key = (reduce, weights is None, expert_ids is None, places is None, _WHOLE)
            call = sent.calls.combine.get(key)
            if call is None:
                return None
            if out is None:
                out = torch.empty_like(self._sums_like(sent.tokens))
            rows = self.most_rows if last.known_count is None else last.known_count
            ids = sent.expert_ids if expert_ids is None else expert_ids
            if weights is None:
                weights = sent.weights
            self._state = State.BROKEN
            if places is None:
                done = call(sent.tokens, rows, out, y, ids, weights)
            else:
                done = call(sent.tokens, rows, out, y, ids, weights, places)
            self._state = State.RECEIVED if done < 0 else State.BETWEEN
            return None if done < 0 else out

    def _sums_like(self, tokens: int) -> torch.Tensor:
        """[tokens, hidden] spec.dtype, one element of memory: to make others like it takes the host
        half as long as to make them from a shape."""
        like = self._like.get(tokens)
        if like is None:
            if len(self._like) >= MOST_KINDS:
                self._like.clear()
            one = torch.empty((1, 1), dtype=self.spec.dtype, device=self.device)
            like = self._like[tokens] = one.expand(tokens, self.spec.hidden)
        return like

    def _remember(self, back: _Back, part: Part) -> None:
        """Have others like this combine, or like a half of it, go in one call of C."""
        sent = back.sent
        if sent.calls is None or sent.calls.made >= _MOST_CALLS or self._capturing:
            return
        sent.calls.made += 1
        call = self.exchange.combine_call(
            back.out, back.y, sent,
            reduce=back.reduce, places=back.places, shared=back.shared, part=part,
        )  # fmt: skip
        if call is not None:
            sent.calls.combine[back.key(part)] = call.run

    def _run_half(self, back: _Back, part: Part) -> bool:
        """Whether a half of a combine went in one call of C."""
        sent = back.sent
        call = None if sent.calls is None else sent.calls.combine.get(back.key(part))
        if call is None:
            return False
        weights = sent.weights if back.weights is None else back.weights
        places = () if back.places is None else (back.places,)
        tensors = (back.out, back.y, sent.expert_ids, weights, *places)
        return call(sent.tokens, back.y.shape[0], *tensors) >= 0

    def _checked(
        self,
        y: torch.Tensor,
        received: Received,
        reduce: Reduce,
        weights: torch.Tensor | None,
        out: torch.Tensor | None,
        places: torch.Tensor | None,
        expert_ids: torch.Tensor | None,
    ) -> _Back:
        """What a combine sends, once its arguments are known to fit."""
        if reduce not in ("home", "rank"):
            raise ValueError(f"reduce is {reduce!r}, must be 'home' or 'rank'")
        self._check_combines(received)
        assert isinstance(received, CudaReceived)
        sent = received.sent
        self.raise_reported()
        if places is None:
            # only the device knows how many rows there are; with room for all nobody must ask
            whole = y.shape[:1] == (self.most_rows,) or self._capturing
            self._check_rows("y", y, None if whole else received.count)
        else:
            self._check_packed(y, places)
        shared = weights is not None and expert_ids is not None
        if reduce == "home":
            if sent.kind.k > self.exchange.choices:
                raise ValueError(
                    f"reduce='home' takes {self.exchange.choices} choices a token in this buffer, "
                    f"not {sent.kind.k}"
                )
        elif not shared and (weights is not None or expert_ids is not None):
            raise ValueError(
                "weights at combine need reduce='home', or expert_ids; expert_ids need weights"
            )
        if expert_ids is not None and expert_ids is not sent.expert_ids:
            self._check_ids(expert_ids, sent.expert_ids)
            sent = sent.with_ids(expert_ids.contiguous())
        if weights is not None:
            if weights.dtype is not torch.float32 or weights.shape != sent.weights.shape:
                raise ValueError(f"weights must be {list(sent.weights.shape)} float32")
            weights = weights.contiguous()
        if out is None:
            out = torch.empty_like(self._sums_like(sent.tokens))
        else:
            self._check_rows("out", out, sent.tokens)
        return _Back(y, sent, reduce, weights, out, places, shared)

    def _send_back(self, back: _Back) -> None:
        """The half of a combine that does not wait for results."""
        if self._run_half(back, "send"):
            return
        if back.shared:
            assert back.weights is not None
            self.exchange.share_weights(back.weights, back.sent, wait=back.reduce == "rank")
        self.exchange.send_combine(
            back.out, back.y, back.sent, reduce=back.reduce, wait=False, places=back.places,
            shared=back.shared,
        )  # fmt: skip
        self._remember(back, "send")

    def _sum(self, back: _Back) -> torch.Tensor:
        """The other half."""
        if not self._run_half(back, "receive"):
            self.exchange.wait_combine()
            self.exchange.reduce(
                back.out, back.y, back.sent, reduce=back.reduce, weights=back.weights,
                places=back.places, shared=back.shared,
            )  # fmt: skip
            self._remember(back, "receive")
        self.raise_reported()
        self._state = State.BETWEEN
        return back.out

    def check(self, *, wait: bool = True) -> tuple[int, ...]:
        """As in `Buffer`. Does nothing while a graph is captured."""
        if self._capturing:
            return ()
        if wait:
            self._synchronize()
        return self.raise_reported()

    def raise_reported(self) -> tuple[int, ...]:
        """What `check` does, for what kernels have reported by now: waits for nothing."""
        if self._reports.tobytes() == _NOTHING_REPORTED or self._capturing:
            return ()
        missing = read_report(self._page)
        if not missing:
            return ()
        ranks = tuple(m.rank for m in missing)
        if self._page[Page.STOP]:
            self._state = State.BROKEN
            raise Interrupted(
                f"rank {self.rank} was interrupted in {missing[0].phase} (epoch {self.epoch})"
            )
        if not self._lenient:
            self._state = State.BROKEN
            raise self._failed(ranks, missing[0].phase, self.epoch, self._limit_s)
        for rank in ranks:  # others may be reported meanwhile
            self._words[Page.REPORT + rank] = 0
        self._broken.update({m.rank: m.phase for m in missing})
        self.mask(ranks)
        return ranks

    def missing_results(self, received: Received) -> MissingResults | None:
        with self._lock:
            self._check_combined(received)
            assert isinstance(received, CudaReceived)
            sent = received.sent
            self.check()
            back = self.exchange.table[Word.RETURNED : Word.RETURNED + LANES] != 0
            back[self.rank] = True
            return find_missing(sent.expert_ids, sent.weights, sent.table, back)

    def left_out(self, received: Received) -> tuple[int, ...]:
        """Ids from which nothing came in this dispatch, the last one; waits for the device."""
        with self._lock:
            if self._capturing:
                return ()
            if received is not self._received:
                raise StaleEpoch(
                    f"masked of dispatch {received.sequence} of epoch {received.epoch}: ask before "
                    "the next dispatch"
                )
            arrived = self.exchange.table[Word.ARRIVED : Word.ARRIVED + LANES].tolist()
            self.raise_reported()
            return tuple(rank for rank, tokens in enumerate(arrived) if tokens < 0)

    def close(self) -> None:
        self.interrupt()  # what waits on the device ends
        with self._lock, self._changes:
            if self._state is State.CLOSED:
                return
            self._synchronize()
            self._state = State.CLOSED
            self._received = None
            self._calls.clear()
            self._calls_of_kind.clear()
            if self._forwarder is not None:
                self._forwarder.close()
            for memory in (*self._departed, *self._peers.values()):
                memory.close()
            self._departed.clear()
            self._peers.clear()
            self._control.close()
            self._window.close()

    # ---- helpers ------------------------------------------------------------------------------

    def _set_limit(self, timeout_s: float | None) -> None:
        """In the order of the stream."""
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        if limit_s != self._limit_s and self._cuda and not self._capturing:
            self._limit_s = limit_s
            self.exchange.table[Word.LIMIT] = int(limit_s * 1e9)

    def _begin(self, otherwise: str, *, wait: bool = False) -> None:
        """wait: for the device, so that nothing is reported later of what came before."""
        self._check_between(otherwise)
        self._thread = threading.get_ident()
        if wait or self._changed:
            self.check()
            self._apply()
        else:
            self.raise_reported()
            if self._changed:  # somebody was masked
                self._apply()

    def _kind_of(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        fp8: Scales | None,
        *,
        wait: bool,
    ) -> DispatchKind:
        """Of a dispatch, once its arguments are known to fit."""
        if self._tables.get(id(table)) is not table:
            check_table(table)
            self._check_here(table=table.rank)
            if len(self._tables) >= MOST_KINDS:
                self._tables.clear()
            self._tables[id(table)] = table
        key = (
            x.dtype, x.shape, x.device, expert_ids.dtype, expert_ids.shape, expert_ids.device,
            weights.dtype, weights.shape, table.slots, fp8, wait,
        )  # fmt: skip
        kind = self._kinds.get(key)
        if kind is None or not x.is_contiguous():
            check_dispatch(self.spec, x, expert_ids, weights)
            self._check_here(x=x, expert_ids=expert_ids)
            if fp8 is not None:
                if x.dtype is torch.uint8:
                    raise ValueError(f"x is bytes already; fp8={fp8!r} takes {self.spec.dtype}")
                quant.check(self.spec.hidden, fp8)
            if len(self._kinds) >= MOST_KINDS:
                self._kinds.clear()
            kind = self.exchange.kind_of(x, expert_ids, table.slots, fp8, wait=wait)
            self._kinds[key] = kind
        return kind

    def _check_packed(self, y: torch.Tensor, places: torch.Tensor) -> None:
        kind = (y.dtype, y.shape, y.device, places.dtype, places.shape)
        if kind in self._fitting and y.is_contiguous():
            return
        if y.ndim == 3 and y.is_contiguous():
            self._check_rows("y", y.view(-1, y.shape[2]), y.shape[0] * y.shape[1])
        else:
            self._check_rows("y", y, y.shape[0])
        if places.dtype is not torch.int32 or places.shape != self.exchange.rows.shape:
            raise ValueError("places must be those that `pack` filled")
        self._fits(kind)

    def _check_ids(self, ids: torch.Tensor, sent: torch.Tensor) -> None:
        if (
            ids.shape != sent.shape
            or ids.dtype not in (torch.int32, torch.int64)
            or ids.device != self.device
        ):
            raise ValueError(
                f"expert_ids must be {list(sent.shape)} int32 or int64 on {self.device}, is "
                f"{list(ids.shape)} {ids.dtype} on {ids.device}"
            )
