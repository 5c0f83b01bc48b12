"""NixlEpBuffer: NVIDIA's nixl_ep as a backend of `Buffer`.

nixl_ep moves the rows; what hosts agree on goes through the control buffer (comm/gpu_buffer.py).
Its kernels know no epochs: a flag in its memory says that rows came, not when they were sent. So
what a rank may receive changes only in a vote, and a vote in which anything changes has two rounds:

    round 1   all who take part are here: none of them has a kernel under way
              each leaves all others out, and dispatches and combines alone, which clears both of
              nixl_ep's sets of flags and brings them into step again
    round 2   all have cleared: nothing that is sent from now on is cleared away
              each takes the others in

What its `capabilities` say has these reasons:
  - An epoch begins with a vote; `mask`, `unmask` and `disconnect` take effect at the next.
  - A byte of each vote says whether anything changes.
  - Who takes part is in nixl_ep's own mask, which its kernels also set, silently, for a peer that
    did not answer within its limit, the buffer's timeout_s: after each exchange the mask is read.
    Another limit for one exchange is not possible, and neither `interrupt` nor the end of a
    peer's process ends the wait of a kernel.
  - combine sums rows at home, in float32 (reduce="rank"); `Received.weights` is not known.
  - Rows of a slot are in the order of their arrival; an expert that a token chose twice gets one
    row, with both weights.
  - Memory is taken for capacity · slots experts; neither can grow.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from flexpert.comm import quant
from flexpert.comm.buffer import (
    BufferSpec,
    Capabilities,
    ExpertTable,
    MissingResults,
    OnTimeout,
    Pending,
    Received,
    Reduce,
    Scales,
)
from flexpert.comm.errors import CommError, Interrupted
from flexpert.comm.gpu_buffer import DeviceBuffer, Hook, default_device, find_missing
from flexpert.comm.host.core import State
from flexpert.comm.nixl_ep.expert_numbers import numbered, once
from flexpert.comm.nixl_ep.meeting import (
    MeetingPlace,
    NixlEpAddress,
    at_the_door,
    decode,
    pair_store,
    store_of,
)
from flexpert.comm.nixl_ep.nixl_ep_received import NixlEpDispatched, NixlReceived
from flexpert.comm.nixl_ep.package import Package, check, check_room, find
from flexpert.comm.nixl_ep.shared_store import SharedStore
from flexpert.comm.routing import check_dispatch, check_table
from flexpert.comm.window_layout import VOTE_BYTES, align

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# the first byte of a vote
_AS_BEFORE, _CHANGED, _CLEARED = b"\0", b"\1", b"\2"

_PAYLOAD_BYTES = VOTE_BYTES - 1

_TOKENS_UNIT = 4  # nixl_ep takes multiples of this


def _capabilities(package: Package) -> Capabilities:
    """Graphs go on through joins and leaves where the sizes of tensors do not depend on them."""
    return Capabilities(
        graph_capture=package.fixed,
        grow=False,
        nixl_channel=False,
        reductions=frozenset({"rank"}),
        byte_rows=False,
        row_order=False,
        row_weights=False,
        call_timeouts=False,
        mask_at_vote=True,
        unmask_at_vote=True,
        epoch_needs_vote=True,
        owners_checked=False,
        raises_later=False,
        vote_bytes=_PAYLOAD_BYTES,
        traffic_counted=False,
    )


class NixlEpBuffer(DeviceBuffer):
    """The `Buffer` of ranks whose rows nixl_ep moves. See the module's docstring."""

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        *,
        slots: int,
        timeout_s: float = 30.0,
        on_timeout: OnTimeout = "raise",
        store: Store | None = None,
        package: Package | None = None,
        device: torch.device | None = None,
    ) -> None:
        """
        Args:
            slots: most local slots of any rank; the same on all.
            package: default: the installed one. device: default: the current GPU.
            The rest: see `make_buffer`.

        Raises:
            CommError: no package, or no memory.
            ValueError: sizes that its kernels do not take.
        """
        check(spec, slots)
        package = package or find()
        device = device or default_device()
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
            check_room(spec.capacity, slots, count)
        super().__init__(
            rank,
            spec,
            timeout_s=timeout_s,
            on_timeout=on_timeout,
            store=store,
            device=device,
        )
        self.slots = slots
        self.capabilities = _capabilities(package)
        self._fixed = package.fixed
        self._index_type: torch.dtype = package.module.topk_idx_t
        self._most = align(spec.max_tokens, _TOKENS_UNIT)
        self._halt = False
        self._votes: dict[int, bytes] | None = None  # of round 1, while round 2 is under way
        self._linked: set[int] = set()  # that nixl_ep has connected
        self._parted: set[int] = set()  # of these, those to disconnect
        self._taking_part = {rank}
        self._out_of_step = False  # nixl_ep dispatched, and did not combine
        self._captured = False
        self._place = MeetingPlace()
        self._ep: Any = None
        try:
            self._ep = self._open(package)
        except (RuntimeError, ValueError) as error:
            self.close()
            raise _refused(error, spec, slots) from error
        except BaseException:
            self.close()
            raise

    def _open(self, package: Package) -> Any:
        """A buffer of nixl_ep that has exchanged alone: so its kernels are loaded, which would
        otherwise keep a peer waiting, and known to take these sizes."""
        spec, capacity = self.spec, self.spec.capacity
        make = package.module.Buffer
        ep = make(
            rank=self.rank, explicitly_destroy=True, timeout_ms=max(1, int(self.timeout_s * 1e3))
        )
        try:
            size = make.get_rdma_size_hint(self._most, spec.hidden, capacity, capacity * self.slots)
            ep.update_memory_buffers(capacity, self.slots, size)
            ep.connect_ranks([self.rank])
            self._masks = torch.zeros(capacity, dtype=torch.int32, device=self.device)
            self._up = torch.zeros(capacity, dtype=torch.bool, device=self.device)
            rows = self.slots * capacity * self._most
            # one more, where rows go that did not come
            self._results = torch.zeros(
                (rows + 1, spec.hidden), dtype=spec.dtype, device=self.device
            )
            self._ep = ep
            self._alone()
            self._take_in(self._taking_part)
        except BaseException:
            ep.destroy()
            self._ep = None
            raise
        return ep

    # ---- membership ---------------------------------------------------------------------------

    @property
    def address(self) -> bytes:
        return self._place.address(self._control.address, self.spec, self.slots).encode()

    @property
    def connected(self) -> tuple[int, ...]:
        with self._changes:
            return tuple(sorted({self.rank} | (self._linked - self._parted)))

    @property
    def most_rows(self) -> int:
        return self.spec.capacity * self._most * min(self.spec.topk, self.slots)

    @property
    def _stopped(self) -> bool:
        return self._halt

    def count(self, received: Received) -> int:
        assert isinstance(received, NixlReceived)
        return received.count

    def connect(
        self,
        peers: Mapping[int, bytes] | Iterable[int],
        *,
        activate: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """As in `Buffer`; but also with addresses, each pair waits for each other."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        known = set(self.connected)
        addresses: dict[int, NixlEpAddress] = {}
        if isinstance(peers, Mapping):
            addresses = {
                peer: decode(peer, address, self.spec, self.slots)
                for peer, address in peers.items()
                if peer not in known
            }
            controls = {peer: address.control for peer, address in addresses.items()}
            self._control.connect(controls, timeout_s=timeout_s)
        else:
            peers = set(peers)
            self._control.connect(peers, timeout_s=timeout_s)
        # in order of ids: pairs wait for each other in the same order everywhere
        left = sorted(set(peers) - known)
        try:
            while left:
                self._link(left[0], addresses.get(left[0]), deadline)
                left.pop(0)
        except BaseException:
            self._control.disconnect(left)
            raise
        if activate:
            self.unmask(peers)

    def _link(self, peer: int, address: NixlEpAddress | None, deadline: float) -> None:
        """Have nixl_ep connect to a peer, which does the same; masked."""
        with self._meeting_place(peer, address) as store:
            nonces = self._control.nonce(self.rank), self._control.nonce(peer)
            at_the_door(
                pair_store(store, "door", *nonces),
                self.rank,
                peer,
                timeout_s=max(0.0, deadline - time.monotonic()),
                epoch=self.epoch,
                cancelled=lambda: self._state is State.CLOSED or peer in self._control.lost,
            )
            # a nixl_ep that does not connect during exchanges must wait for their end
            with nullcontext() if self._fixed else self._lock, self._on_device():
                if peer in self._parted:  # the id's last process: no exchange uses it any more
                    self._part()
                self._ep.set_tcp_store_group(pair_store(store, "inside", *nonces))
                self._ep.connect_ranks([peer], activate=False)
                self._ep.set_tcp_store_group(None)
        with self._changes:
            self._linked.add(peer)

    def _meeting_place(
        self, peer: int, address: NixlEpAddress | None
    ) -> AbstractContextManager[Store | SharedStore]:
        if address is None:
            assert self._store is not None  # the control buffer has met the peer there
            return nullcontext(cast("Store", self._store))
        return nullcontext(self._place.store) if self.rank < peer else store_of(peer, address)

    def disconnect(self, ids: Iterable[int]) -> None:
        gone = set(ids)
        self._control.disconnect(gone)
        with self._changes:
            self._parted |= gone & self._linked
            self._changed = True

    def _part(self) -> None:
        """No kernel is under way."""
        with self._lock, self._changes:
            gone = sorted(self._parted)
            if gone:
                self._ep.disconnect_ranks(gone)
            self._linked -= self._parted
            self._parted.clear()

    def mask(self, ids: Iterable[int]) -> None:
        self._control.mask(ids)
        with self._changes:
            self._changed = True

    def unmask(self, ids: Iterable[int]) -> None:
        desired = set(ids)
        self._check_connected(desired)
        self._control.unmask(desired)
        with self._changes:
            self._changed = True

    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        with self._lock:
            desired = set(ids)
            self._check_connected(desired)
            self._control.set_active(desired, epoch)
            self._synchronize()
            self._halt = False
            self._state = State.BETWEEN
            self._received = self._votes = None
            self.sequence = 0
            self._must_vote = True
            with self._changes:
                self._changed = True

    def _check_connected(self, ids: set[int]) -> None:
        for peer in sorted(ids - set(self.connected)):
            raise ValueError(f"rank {peer} is not connected")

    # ---- the step barrier ---------------------------------------------------------------------

    def post_vote(self, payload: bytes, *, wait: bool = True) -> None:
        if len(payload) > _PAYLOAD_BYTES:
            raise ValueError(f"a vote holds {_PAYLOAD_BYTES} bytes, not {len(payload)}")
        with self._lock:
            self._check_between("vote between dispatch and combine")
            self.check()
            with self._changes:
                self._control.post_vote((_CHANGED if self._changed else _AS_BEFORE) + payload)
                self._changed = False

    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._check_whole()
            if self._votes is None:
                votes = self._control.collect_votes(timeout_s)
                self._check_round(_CLEARED not in {vote[:1] for vote in votes.values()})
                if _CHANGED not in {vote[:1] for vote in votes.values()}:
                    return self._unchanged(votes)
                self._alone()
                self._control.post_vote(_CLEARED)
                self._votes = votes
            cleared = self._control.collect_votes(max(0.0, deadline - time.monotonic()))
            self._check_round(set(cleared.values()) == {_CLEARED})
            votes, self._votes = self._votes, None
            self._take_in(set(cleared))
            self._must_vote = False
            return {rank: votes[rank][1:] for rank in cleared}

    def _unchanged(self, votes: dict[int, bytes]) -> dict[int, bytes]:
        """After a vote of one round; a rank that did not come is left out until the next."""
        silent = self._taking_part - set(votes)
        if silent:
            self._leave_out(silent)
            if self._fixed:  # else ranks that do so at different times lay out rows differently
                for peer in silent:
                    self._ep.update_mask_buffer(peer, True)
        return {rank: vote[1:] for rank, vote in votes.items()}

    def _check_round(self, agreed: bool) -> None:
        if not agreed:
            self._state = State.BROKEN
            raise CommError(
                f"ranks disagree who takes part (rank {self.rank}, epoch {self.epoch}): a peer is "
                "in another round of the vote; begin an epoch on all of them with set_active"
            )

    def _alone(self) -> None:
        """Clear the flags of nixl_ep, which must not exchange with anybody meanwhile.

        All who might write here are waiting in a vote, or gone.
        """
        with self._on_device():
            # also those that its kernels have masked: it does not count them out until told
            for peer in self._linked:
                self._ep.update_mask_buffer(peer, True)
            self._take_in({self.rank})
            self._part()
            nothing = torch.zeros((1, self.spec.hidden), dtype=self.spec.dtype, device=self.device)
            none = torch.full((1, self.spec.topk), -1, dtype=self._index_type, device=self.device)
            if self._out_of_step:  # dispatches and combines take turns with its sets of flags
                self._launch(nothing, none, None, later=False)
            _, _, handle, _ = self._launch(nothing, none, None, later=False)
            factors = torch.zeros(none.shape, dtype=torch.float32, device=self.device)
            self._give_back(none, factors, handle, torch.empty_like(nothing), later=False)
            self._synchronize()

    def _take_in(self, ids: set[int]) -> None:
        for peer in ids - self._taking_part:
            self._ep.update_mask_buffer(peer, False)
        self._taking_part = set(ids)
        up = [id in ids for id in range(self.spec.capacity)]
        self._up.copy_(torch.tensor(up, dtype=torch.bool, device="cpu"))

    def _leave_out(self, ids: Iterable[int]) -> None:
        """Send these nothing more, and say so in the next vote."""
        self._taking_part -= set(ids)
        self._take_in(self._taking_part)
        with self._changes:
            self._changed = True

    def interrupt(self) -> None:
        self._halt = True
        self._control.interrupt()

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
        pending: Pending[Any] = self._send(x, expert_ids, weights, table, fp8, later=True)
        return pending

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
        timeout_s: float | None = None,
    ) -> NixlReceived:
        return self._send(x, expert_ids, weights, table, fp8, later=False)(timeout_s)

    def _send(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        fp8: Scales | None,
        *,
        later: bool,
    ) -> Hook[NixlReceived]:
        self._check_sent(x, expert_ids, weights, table, fp8)
        tokens = x.shape[0]
        with self._lock:
            self._check_between("dispatch before combine of the last")
            self._check_voted("nixl_ep ranks take each other in with it")
            given = weights
            numbers = numbered(expert_ids, table, self._up, self.slots, self._index_type)
            if not self._capturing:
                self._check_slots(table)
            numbers, weights = once(numbers, weights)
            if tokens == 0:
                x, weights = x.new_zeros((1, x.shape[1])), weights.new_zeros((1, weights.shape[1]))
                numbers = torch.full_like(weights, -1, dtype=self._index_type)
            self._captured |= self._capturing
            self._state = State.BROKEN  # first: a signal may strike right after the launch
            got, counts, handle, hook = self._launch(x, numbers, fp8, later=later)
            recv_x, scales = got if fp8 is not None else (got, None)
            sent = NixlEpDispatched(
                expert_ids,
                given,
                table,
                tokens,
                numbers,
                weights.contiguous(),
                recv_x,
                scales,
                counts,
                handle,
                hook,
            )
            if self._capturing and recv_x.shape[1] != self.spec.capacity * self._most:
                raise CommError(
                    "this nixl_ep sizes its tensors by who is active: a graph of it would break "
                    "with the next join; install 1.5 or later, or do not capture"
                )
            self.sequence += 1
            self._exchanges += 1
            self._state = State.DISPATCHED
        sequence = self.sequence
        return Hook(lambda _: self._receive(sent, sequence))

    def _check_sent(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        fp8: Scales | None,
    ) -> None:
        check_dispatch(self.spec, x, expert_ids, weights)
        check_table(table)
        self._check_here(x=x, expert_ids=expert_ids, weights=weights, table=table.rank)
        if x.dtype is not self.spec.dtype:
            raise ValueError(f"nixl_ep sends rows of {self.spec.dtype}, not {x.dtype}")
        if fp8 is not None:
            quant.check(self.spec.hidden, fp8)
        if table.slots > self.slots:
            raise ValueError(
                f"the table has {table.slots} slots, the buffer was made for {self.slots}"
            )

    def _check_slots(self, table: ExpertTable) -> None:
        """What a graph is not asked: it would have to wait for the device."""
        beyond = (table.rank >= 0) & ((table.slot < 0) | (table.slot >= self.slots))
        if bool(beyond.any()):
            raise ValueError(f"the table names slots outside of the {self.slots} of the buffer")

    def _launch(
        self, x: torch.Tensor, numbers: torch.Tensor, fp8: Scales | None, *, later: bool
    ) -> tuple[Any, torch.Tensor, Any, Any]:
        got, counts, handle, _, hook = self._ep.dispatch(
            x,
            numbers,
            self._most,
            num_experts=self.spec.capacity * self.slots,
            use_fp8=fp8 is not None,
            round_scale=fp8 in ("power2", "ue8m0"),
            use_ue8m0=fp8 == "ue8m0",
            return_recv_hook=later,
        )
        self._out_of_step = not self._out_of_step
        return got, counts, handle, hook

    def _give_back(
        self,
        numbers: torch.Tensor,
        factors: torch.Tensor,
        handle: Any,
        out: torch.Tensor,
        *,
        later: bool,
    ) -> Any:
        """Send home what lies in `_results`; returns nixl_ep's hook."""
        limit = handle[0].shape[1]
        rows = self._results[: self.slots * limit].view(self.slots, limit, self.spec.hidden)
        _, _, hook = self._ep.combine(
            rows, numbers, factors, handle, out=out, return_recv_hook=later
        )
        self._out_of_step = not self._out_of_step
        return hook

    def _receive(self, sent: NixlEpDispatched, sequence: int) -> NixlReceived:
        with self._lock:
            self._check_whole()
            self._check_turn(State.DISPATCHED, sequence, "dispatch")
            self._state = State.BROKEN
            if sent.receive is not None:
                sent.receive()
            indexed = sent.index(self.most_rows)
            masked = self._look("dispatch")
            received = NixlReceived(self, sent, indexed, masked, self.epoch, sequence)
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
        return self._return(y, received, reduce, weights, out, later=True)

    def combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        timeout_s: float | None = None,
    ) -> torch.Tensor:
        return self._return(y, received, reduce, weights, out, later=False)(timeout_s)

    def _return(
        self,
        y: torch.Tensor,
        received: Received,
        reduce: Reduce,
        weights: torch.Tensor | None,
        out: torch.Tensor | None,
        *,
        later: bool,
    ) -> Hook[torch.Tensor]:
        if reduce != "rank":
            raise ValueError(
                f"reduce is {reduce!r}; backend 'nixl_ep' has reduce='rank' only: nobody promises "
                "the order of its kernels' sums"
            )
        if weights is not None:
            raise ValueError("weights at combine need reduce='home', which nixl_ep does not have")
        with self._lock:
            self._check_combines(received)
            assert isinstance(received, NixlReceived)
            sent = received.sent
            self._check_rows("y", y, None if self._capturing else received.count)
            if out is None:
                out = torch.empty(
                    (sent.tokens, self.spec.hidden), dtype=self.spec.dtype, device=self.device
                )
            else:
                self._check_rows("out", out, sent.tokens)
            target = out if sent.tokens else y.new_empty((1, self.spec.hidden))
            self._state = State.BROKEN
            places = received.indexed.places[: y.shape[0]]
            room = self._results[: self.slots * sent.limit + 1]
            room.index_copy_(0, places.long(), y)
            hook = self._give_back(sent.numbers, sent.factors, sent.handle, target, later=later)
            self._state = State.COMBINED
        sequence, result = self.sequence, out

        def receive(_: float | None) -> torch.Tensor:
            with self._lock:
                self._check_whole()
                self._check_turn(State.COMBINED, sequence, "combine")
                self._state = State.BROKEN
                if hook is not None:
                    hook()
                self._look("combine")
                self._state = State.BETWEEN
                return result

        return Hook(receive)

    def check(self, *, wait: bool = True) -> tuple[int, ...]:
        """As in `Buffer`: what replays of graphs have met since; always waits."""
        return self._look("replay") if self._captured else ()

    def _look(self, phase: str) -> tuple[int, ...]:
        """Wait for the device, and see whom nixl_ep has masked on its own."""
        if self._capturing:
            return ()
        self._synchronize()
        if self._halt:
            self._state = State.BROKEN
            raise Interrupted(f"rank {self.rank} was interrupted in {phase} (epoch {self.epoch})")
        self._ep.query_mask_buffer(self._masks)
        masks = self._masks.tolist()
        missing = tuple(peer for peer in sorted(self._taking_part) if masks[peer] != 0)
        if not missing:
            return ()
        if not self._lenient:
            self._state = State.BROKEN
            raise self._failed(missing, phase, self.epoch, self.timeout_s)
        self._control.mask(missing)
        self._leave_out(missing)
        return missing

    def missing_results(self, received: Received) -> MissingResults | None:
        with self._lock:
            self._check_combined(received)
            assert isinstance(received, NixlReceived)
            sent = received.sent
            return find_missing(sent.expert_ids, sent.weights, sent.table, self._up)

    def close(self) -> None:
        self.interrupt()
        with self._lock, self._changes:
            if self._state is State.CLOSED:
                return
            self._synchronize()
            self._state = State.CLOSED
            self._control.close()
            if self._ep is not None:
                self._ep.destroy()
            self._place.close()

    def _on_device(self) -> AbstractContextManager[Any]:
        """Threads that connect have not chosen a GPU."""
        return torch.cuda.device(self.device) if self._cuda else nullcontext()


def _refused(error: Exception, spec: BufferSpec, slots: int) -> Exception:
    kind = ValueError if "Unsupported" in str(error) or isinstance(error, ValueError) else CommError
    return kind(
        f"nixl_ep cannot be used with {spec} and {slots} slots: {error}. Its kernels are compiled "
        "for some hidden sizes only (of 2048 to 8192), and its memory grows with capacity · slots"
    )
