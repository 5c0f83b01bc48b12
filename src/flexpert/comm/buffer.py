"""The contract that every exchange backend fulfils.

One `Buffer` per rank. It owns the rank's *window* (the memory its peers write into), the links to
connected peers, and the numbering that makes a late write harmless: every flag carries (epoch,
link, exchange), and a waiter accepts exactly the tag it expects.

Three sets of ids, each within the one before:

    capacity    ids that may exist; costs nothing, may grow while peers go on
    connected   peers with an open link
    active      peers that take part in exchanges; the rest of the capacity is *masked*

Active peers come and go in two ways. A group with a coordinator, or one that uses `agree`, begins
numbered epochs on all ranks at once: `set_active(ids, epoch)`. Ranks on their own `unmask` and
`mask` peers one by one; both sides of a link must do it between the same two exchanges.

What only some backends can do is said in `Capabilities`, and nowhere else: callers ask for those,
and for no backend by name.

Order of calls, the same on all active ranks:

    [vote] → (dispatch → combine) × layers → [vote] → …

Thread rule: exchanges, votes and `set_active` come from one thread at a time; `connect`,
`disconnect`, `mask`, `unmask`, `grow`, `ring` and `interrupt` may come from any other. What they
change takes effect between two exchanges, except that masking a peer ends a wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

import torch

Reduce = Literal["home", "rank"]
OnTimeout = Literal["raise", "mask"]
Scales = Literal["float32", "power2", "ue8m0"]
Channel = Literal["auto", "shm", "nixl"]
Point = Literal["dispatch_send", "dispatch_wait", "combine_send", "combine_wait"]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """Everything that fixes the size and layout of a window.

    All values but the capacity must be equal on two ranks that connect.

    capacity: number of rank ids, 1 to 256.
    max_tokens: most tokens a rank sends in one dispatch.
    hidden: elements of a row.
    topk: most experts of a token.
    dtype: of the rows: bfloat16, float32 or float16.
    """

    capacity: int
    max_tokens: int
    hidden: int
    topk: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Capabilities:
    """In what buffers of different backends differ; known when a buffer is made, and constant.

    graph_capture: exchanges can be captured into a CUDA graph, and the graph replayed whoever takes
        part by then; after a replay `Buffer.check` raises what the exchanges would have raised.
    grow: the capacity can be raised in place; else `grow` raises ValueError.
    nixl_channel: peers may be on other machines.
    reductions: what `combine` takes as `reduce`; without "home" it takes no weights either.
    byte_rows: `dispatch` also takes uint8 rows.
    row_order: rows of a slot are ordered by (source rank, token index); else by arrival, and an
        expert that a token chose twice gets one row.
    row_weights: `Received.weights` is known; else reading it raises CommError.
    call_timeouts: each exchange may have a limit of its own, and `interrupt` or the end of a peer's
        process ends its waits at once; else all run for the limit of the buffer.
    mask_at_vote, unmask_at_vote: `mask`, `unmask` take effect in the next vote, not in the next
        exchange.
    epoch_needs_vote: every epoch must begin with a vote, not only one after a broken exchange.
    raises_later: exchanges return before the device is done with them. What they would raise, or
        whom they would mask, a later call does: `Buffer.check`, which must therefore come before
        results are relied on, a vote, or the next exchange that finds it known. `Received.masked`
        waits, and must be read before the next dispatch.
    owners_checked: with on_timeout="raise", an expert without an active owner is a ValueError;
        else it is skipped with either `on_timeout`.
    vote_bytes: most bytes of a vote's payload.
    traffic_counted: `Statistics` has bytes and waits; else they are 0.
    """

    graph_capture: bool
    grow: bool
    nixl_channel: bool
    reductions: frozenset[Reduce]
    byte_rows: bool
    row_order: bool
    row_weights: bool
    call_timeouts: bool
    mask_at_vote: bool
    unmask_at_vote: bool
    epoch_needs_vote: bool
    owners_checked: bool
    raises_later: bool
    vote_bytes: int
    traffic_counted: bool


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Where this rank sends tokens of each logical expert, for one layer.

    rank: [experts] int32, id of the rank that owns the replica this rank uses; -1 = nobody.
    slot: [experts] int32, the slot of that replica in its owner.
    slots: number of local slots of *this* rank (rows may arrive for slots 0 … slots-1).
    experts: how many logical experts there are.
    """

    rank: torch.Tensor
    slot: torch.Tensor
    slots: int
    experts: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", self.rank.numel())


@dataclass(frozen=True, slots=True)
class NativeExchange:
    """What other C calls for a whole dispatch and combine, see comm/host/exchange.h; in addresses.

    function: an `fx_exchange_of`. buffer: its first argument.
    """

    function: int
    buffer: int


class Received(ABC):
    """What a dispatch brought to this rank, sorted by local slot; also the handle for `combine`.

    A row here is one (token, local expert) pair; within a slot rows are ordered by (source rank,
    token index at home). Valid until the next dispatch; `x`, `scales` and `rows` read what lies
    where it arrived, and must be asked for before `begin_combine`.

    offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
    weights: [rows] float32, the router weight of each row.
    source: [rows] int32, the home rank of each row.
    token: [rows] int32, the index of the row's token at its home.
    tokens_sent: tokens of this rank, i.e. rows of the result of `combine`.
    masked: ids masked by this dispatch because nothing came from them (on_timeout="mask").
    """

    offsets: torch.Tensor
    weights: torch.Tensor
    source: torch.Tensor
    token: torch.Tensor
    tokens_sent: int
    masked: tuple[int, ...]
    epoch: int
    sequence: int

    @property
    @abstractmethod
    def x(self) -> torch.Tensor:
        """[rows, hidden] in the dtype that was sent (spec.dtype, float8_e4m3fn, or uint8
        [rows, bytes]); copied together on first use."""

    @property
    @abstractmethod
    def scales(self) -> torch.Tensor | None:
        """Of an fp8 dispatch: [rows, hidden / 128] float32, or int32 [rows, hidden / 512] with
        four exponents each ("ue8m0"); else None."""

    @property
    @abstractmethod
    def rows(self) -> torch.Tensor:
        """[rows] int64: the address of each row's payload where it arrived, without a copy.
        A token that several local experts want has the same address in each of its rows."""


@dataclass(frozen=True, slots=True)
class MissingResults:
    """What the result of a combine lacks, because owners of experts were masked.

    ranks: the ids whose results are missing.
    weight: [tokens] float32, the sum of the router weights that each token lost.
    choices: [tokens, k] bool, True where the k-th expert of a token is missing.
    """

    ranks: tuple[int, ...]
    weight: torch.Tensor
    choices: torch.Tensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the life of a buffer; differences of two tell about the time between.

    exchanges: dispatches that were begun.
    bytes_sent: id → payload bytes of rows written for that peer, or shared with it (own id: 0);
        rows that several ranks of another machine share count for the one that gets them.
    dispatch_wait_ns, combine_wait_ns: id → nanoseconds from the begin of a wait until that peer's
        flag was seen; the peer with the largest value is the slow one.
    waited_ns: "dispatch", "combine" → nanoseconds in such waits, for all peers together.
    wire_bytes: connected id on another machine → all bytes written to it, messages included, since
        it was connected.
    """

    exchanges: int
    bytes_sent: dict[int, int]
    dispatch_wait_ns: dict[int, int]
    combine_wait_ns: dict[int, int]
    wire_bytes: dict[int, int] = field(default_factory=dict)
    waited_ns: dict[str, int] = field(default_factory=dict)


class Pending(ABC, Generic[T]):
    """The receiving half of an exchange whose sending half is done.

    Nothing is received until it is called; compute in between overlaps with the peers' sending.
    Must be called once, before any other exchange.
    """

    @abstractmethod
    def __call__(self, timeout_s: float | None = None) -> T:
        """Wait and receive. Raises what `Buffer.dispatch` and `Buffer.combine` raise."""


class Buffer(ABC):
    """Elastic dispatch/combine of one rank. See the module's docstring for the protocol.

    capabilities: where the backend does more or less than the methods below say.
    turns: grows now and then while this rank waits for peers, whatever they do: so another thread
        can tell a wait that goes on from a thread that hangs.
    """

    rank: int
    spec: BufferSpec
    capabilities: Capabilities
    turns: int = 0

    # ---- membership -------------------------------------------------------------------------

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What a peer on this machine needs to `connect` to this rank; opaque, at most 1 KiB."""

    @property
    @abstractmethod
    def connected(self) -> tuple[int, ...]:
        """Ids with an open link, sorted; the own id is always among them."""

    @property
    @abstractmethod
    def active(self) -> tuple[int, ...]:
        """Ids that take part in exchanges, sorted; the own id is always among them."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch of the current membership; 0 before the first `set_active`."""

    @abstractmethod
    def channel(self, peer: int) -> Literal["self", "shm", "nixl"]:
        """How bytes reach a connected peer. Raises: KeyError: not connected."""

    @abstractmethod
    def connect(
        self,
        peers: Mapping[int, bytes] | Iterable[int],
        *,
        activate: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        """Open links to peers, masked; with `activate` they are unmasked at the end.

        peers: id → address of ranks on this machine (opened at once, nothing is waited for); or
            ids, which then meet through the store given to `make_buffer`: each pair waits for each
            other, at most `timeout_s` (default: the buffer's). Keys left by dead ranks do no harm.

        May run during exchanges. The own id and connected ids are skipped.

        Raises:
            PeerUnreachable: the process behind an address is gone; nothing was connected.
            RankTimeout: ids did not come to the store; those that did stay connected.
            ValueError: an id out of range, an address of another spec, another address for a
                connected id, or ids without a store.
        """

    @abstractmethod
    def disconnect(self, ids: Iterable[int]) -> None:
        """Mask and close links, any subset in any order; unknown ids are ignored."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Allow more ids, from now on; peers need not know.

        Raises: ValueError: fewer than now, or more than 256.
        """

    @abstractmethod
    def shrink(self, capacity: int) -> None:
        """Disconnect ids from `capacity` on, and allow them no more.

        Raises: ValueError: more than now, or the own id would not be allowed.
        """

    @abstractmethod
    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        """Begin an epoch: from now on exactly these ids exchange, and numbering starts anew.

        Must come between two steps, at the same vote on all ranks that stay; or after an exchange
        that was incomplete (RankTimeout, RankLost, Interrupted, nonsense from a peer, Ctrl-C),
        which ends the epoch for this rank: until `set_active` every vote and exchange raises. After
        such an end the new epoch must begin with a vote, because a peer may still be reading.

        Raises:
            ValueError: an id is not connected, the own id is missing, or epoch does not rise.
        """

    @abstractmethod
    def mask(self, ids: Iterable[int]) -> None:
        """Leave peers out of exchanges, from now on; a wait for one ends. Local: peers that are
        not told run into their limit. Unknown ids are ignored.

        Raises: ValueError: the own id.
        """

    @abstractmethod
    def unmask(self, ids: Iterable[int]) -> None:
        """Take connected peers into the exchanges, from the next one on.

        The first exchange waits until the peer has unmasked this rank, too; the link then starts
        afresh, so that nothing left of earlier exchanges can be taken for new.

        Raises: ValueError: an id is not connected.
        """

    @property
    @abstractmethod
    def lost(self) -> dict[int, str]:
        """Connected ids known to be gone → why: "process exited" or "link broken"."""

    # ---- the step barrier -------------------------------------------------------------------

    @abstractmethod
    def post_vote(self, payload: bytes, *, wait: bool = True) -> None:
        """Tell all active peers the payload of this step; once a step.

        Args:
            payload: at most `capabilities.vote_bytes`.
            wait: until all exchanges so far are whole, which the vote then says, too. False: a
                device may still be at them, and what they would raise comes later; not where
                ranks are masked or taken in again by the vote.
        """

    @abstractmethod
    def wait_for_vote(self, timeout_s: float | None) -> bool:
        """Sleep until a peer has voted for the current step (True), or `ring`, or the time is up.

        Returns whether a peer's vote is there. Never spins. The end of a peer does not wake it:
        `lost` tells, and so does `collect_votes`.

        Raises:
            Interrupted: `interrupt` was called.
        """

    @abstractmethod
    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        """Wait for the votes of all active ranks; returns id → payload, own id included.

        Ends the current step's vote: the next `post_vote` belongs to the next step. With
        on_timeout="mask", ranks that do not vote are masked and missing in the answer.

        Raises:
            RankTimeout: may be called again, for a peer that is slow but not dead.
            RankLost, Interrupted
        """

    def barrier(self, payload: bytes = b"", *, timeout_s: float) -> dict[int, bytes]:
        """Wait for all active ranks; returns id → the payload each of them brought."""
        self.post_vote(payload)
        return self.collect_votes(timeout_s)

    @abstractmethod
    def ring(self) -> None:
        """Wake this rank's `wait_for_vote` from another thread; remembered if nobody waits."""

    @abstractmethod
    def interrupt(self) -> None:
        """End this rank's current and future waits with `Interrupted` until `set_active`."""

    # ---- the exchange -----------------------------------------------------------------------

    @abstractmethod
    def begin_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
    ) -> Pending[Received]:
        """Send each token once to each rank that owns some of its experts.

        Args:
            x: [tokens, hidden] spec.dtype, contiguous; tokens may be 0. Or uint8 [tokens, n], any
                bytes, n at most a row of spec.dtype; equal on all ranks. Must stay unchanged until
                the exchange is received.
            expert_ids: [tokens, k] int32 or int64, k <= spec.topk; -1 = none.
            weights: [tokens, k] float32.
            table: of this layer.
            fp8: quantise on the way (see `flexpert.comm.quant`): one scale for 128 channels,
                float32, a power of two in float32, or four packed exponents.

        Raises:
            Interrupted
            StaleEpoch: an exchange of this epoch was incomplete.
            CommError: a call out of turn.
            ValueError: shapes, dtypes, or (on_timeout="raise") an expert without an active owner;
                nothing was sent. With "mask" such experts are skipped; `missing_results` tells.
        """

    @abstractmethod
    def begin_combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> Pending[torch.Tensor]:
        """Return expert results to the tokens' homes: out[t] = Σ_k weight[t, k] · y of (t, k).

        Args:
            y: [rows, hidden] spec.dtype, in the order of `received.x`, unweighted. What
                `combine_input` gave is sent from where it lies, and peers may read it there until
                the next dispatch or vote is received: leave it as it is until then.
            reduce: "rank": each rank sends one partial sum a token (float32 sums, rounded to
                spec.dtype once on the wire), or with two levels each other machine one; "home":
                one row per expert, summed at home in the order of expert_ids, in float32:
                independent of the placement.
            weights: [tokens, k] float32 instead of those given to dispatch; only for "home".
            out: [tokens, hidden] spec.dtype to fill, or None.

        Raises:
            Interrupted
            StaleEpoch: `received` is of another epoch or not the last dispatch.
            ValueError: shapes or dtypes; nothing was sent.
        """

    @abstractmethod
    def combine_input(self, received: Received) -> torch.Tensor:
        """[rows, hidden] spec.dtype for the experts to write y into, reused by every exchange; ask
        for it after the dispatch. Peers that can read it there need no copy."""

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
        timeout_s: float | None = None,
    ) -> Received:
        """`begin_dispatch`, then receive, within `timeout_s` (default: the buffer's).

        Raises (later, where `capabilities.raises_later`):
            RankTimeout, RankLost: on_timeout="raise".
            Interrupted
            CommError: nonsense from a peer (named in the message).
            And what `begin_dispatch` raises.
        """
        return self.begin_dispatch(x, expert_ids, weights, table, fp8=fp8)(timeout_s)

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
        """`begin_combine`, then receive: [tokens, hidden] spec.dtype.

        Raises (later, where `capabilities.raises_later`):
            RankTimeout, RankLost: on_timeout="raise".
            Interrupted
            CommError: nonsense from a peer, or one that used another `reduce`.
            And what `begin_combine` raises.
        """
        pending = self.begin_combine(y, received, reduce=reduce, weights=weights, out=out)
        return pending(timeout_s)

    def native(
        self, tell: Callable[[Point], None] | None = None
    ) -> AbstractContextManager[NativeExchange | None]:
        """While it is entered, this thread's C may dispatch and combine without Python.

        What is entered is None where that cannot be: then each exchange is `dispatch` and
        `combine`, and so is one that C is told to leave to Python. When it is left, all exchanges
        were whole, or it raises what `dispatch` or `combine` would have raised.

        Args:
            tell: called at each point that an exchange passes; what it raises ends it.

        Raises: as `begin_dispatch`, but for what is wrong with its arguments.
        """
        return nullcontext()

    def check(self, *, wait: bool = True) -> tuple[int, ...]:
        """Wait for the device, and raise what exchanges so far would have raised: after each replay
        of a CUDA graph, and where `capabilities.raises_later` before results are relied on. Else
        there is nothing to do.

        Args:
            wait: for all that was launched; else the caller has waited for what he asks about, and
                what was launched since may be raised, too.

        Returns: the ids that were masked because nothing came from them (on_timeout="mask").

        Raises: RankTimeout, RankLost, Interrupted: the epoch is over.
        """
        return ()

    @abstractmethod
    def missing_results(self, received: Received) -> MissingResults | None:
        """After the combine of `received`: what its result lacks, or None if it is complete."""

    @abstractmethod
    def statistics(self) -> Statistics:
        """Counted so far."""

    @abstractmethod
    def close(self) -> None:
        """Unmap and release everything; idempotent."""
