"""The contract that every exchange backend fulfils.

One `Buffer` per rank. It owns the rank's *window* (the memory its peers write into), the channels
to connected peers, and the numbering that makes a late write harmless: every flag carries
(epoch, step), and a waiter accepts exactly the tag it expects.

Order of calls in one epoch, the same on all active ranks:

    vote → (dispatch → combine) × layers → vote → …

Between two votes that all say "no work" ranks may sleep in `wait_for_vote`.

Thread rule: exchanges come from one thread; `ring`, `interrupt`, `connect` and `disconnect` of
ids that are not active may come from another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Reduce = Literal["home", "rank"]


@dataclass(frozen=True, slots=True)
class BufferSpec:
    """Everything that fixes the size and layout of a window; equal on all ranks.

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
class ExpertTable:
    """Where this rank sends tokens of each logical expert, for one layer.

    rank: [experts] int32, id of the rank that owns the replica this rank uses; -1 = nobody.
    slot: [experts] int32, the slot of that replica in its owner.
    slots: number of local slots of *this* rank (rows may arrive for slots 0 … slots-1).
    """

    rank: torch.Tensor
    slot: torch.Tensor
    slots: int


@dataclass(frozen=True, slots=True)
class Received:
    """What a dispatch brought to this rank, sorted by local slot; also the handle for `combine`.

    x: [rows, hidden] dtype, one row per (token, local expert) pair, sorted by slot; within a slot
        by (source rank, token index at home). Valid until the next dispatch.
    offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
    weights: [rows] float32, the router weight of each row.
    tokens_sent: tokens of this rank, i.e. rows of the result of `combine`.
    """

    x: torch.Tensor
    offsets: torch.Tensor
    weights: torch.Tensor
    tokens_sent: int
    epoch: int
    sequence: int
    plan: object  # private to the backend


class Buffer(ABC):
    """Elastic dispatch/combine of one rank. See the module's docstring for the protocol."""

    rank: int
    spec: BufferSpec

    # ---- membership -------------------------------------------------------------------------

    @property
    @abstractmethod
    def address(self) -> bytes:
        """What a peer needs to `connect` to this rank; opaque, at most 1 KiB."""

    @property
    @abstractmethod
    def connected(self) -> tuple[int, ...]:
        """Ids with an open channel, sorted; the own id is always among them."""

    @property
    @abstractmethod
    def active(self) -> tuple[int, ...]:
        """Ids that take part in exchanges, sorted; the own id is always among them."""

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch of the current membership; 0 before the first `set_active`."""

    @abstractmethod
    def connect(self, peers: Mapping[int, bytes]) -> None:
        """Open channels to peers (id → address), masked: they become active by `set_active`.

        May run beside exchanges. The own id and connected ids with the same address are skipped;
        a connected id with another address is an error.

        Raises:
            PeerUnreachable: the process behind an address is gone; nothing was connected.
            ValueError: an id out of range, an address of another spec, a second address of an id.
        """

    @abstractmethod
    def disconnect(self, ids: Iterable[int]) -> None:
        """Close channels of ids that are not active; unknown ids are ignored."""

    @abstractmethod
    def set_active(self, ids: Iterable[int], epoch: int) -> None:
        """Begin an epoch: from now on exactly these ids exchange, and numbering starts anew.

        Must come between two steps, at the same vote on all ranks that stay; or after an exchange
        that was incomplete (RankTimeout, Interrupted, nonsense from a peer, Ctrl-C), which ends the
        epoch for this rank: until `set_active` every vote and exchange raises. After such an end
        the new epoch must begin with a vote, because a peer may still be reading.

        Raises:
            ValueError: an id is not connected, the own id is missing, or epoch does not rise.
        """

    # ---- the step barrier -------------------------------------------------------------------

    @abstractmethod
    def post_vote(self, payload: bytes) -> None:
        """Tell all active peers the payload (at most 48 bytes) of this step; once a step."""

    @abstractmethod
    def wait_for_vote(self, timeout_s: float | None) -> bool:
        """Sleep until a peer has voted for the current step (True), or `ring`, or the time is up.

        Returns whether a peer's vote is there. Never spins.

        Raises:
            Interrupted: `interrupt` was called.
        """

    @abstractmethod
    def collect_votes(self, timeout_s: float) -> dict[int, bytes]:
        """Wait for the votes of all active ranks; returns id → payload, own id included.

        Ends the current step's vote: the next `post_vote` belongs to the next step.

        Raises:
            RankTimeout: may be called again, for a peer that is slow but not dead.
            Interrupted
        """

    @abstractmethod
    def ring(self) -> None:
        """Wake this rank's `wait_for_vote` from another thread; remembered if nobody waits."""

    @abstractmethod
    def interrupt(self) -> None:
        """End this rank's current and future waits with `Interrupted` until `set_active`."""

    # ---- the exchange -----------------------------------------------------------------------

    @abstractmethod
    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        timeout_s: float | None = None,
    ) -> Received:
        """Send each token once to each rank that owns some of its experts, and receive.

        Args:
            x: [tokens, hidden] spec.dtype, contiguous; tokens may be 0.
            expert_ids: [tokens, k] int32 or int64, k <= spec.topk; -1 = none.
            weights: [tokens, k] float32.
            table: of this layer.
            timeout_s: limit of the wait; default: the buffer's.

        Raises:
            RankTimeout, Interrupted
            StaleEpoch: an exchange of this epoch was incomplete.
            CommError: a call out of turn, or nonsense from a peer (named in the message).
            ValueError: shapes, dtypes, or an expert without an active owner; nothing was sent.
        """

    @abstractmethod
    def combine(
        self,
        y: torch.Tensor,
        received: Received,
        *,
        reduce: Reduce = "rank",
        out: torch.Tensor | None = None,
        timeout_s: float | None = None,
    ) -> torch.Tensor:
        """Return expert results to the tokens' homes: out[t] = Σ_k weight[t, k] · y of (t, k).

        Args:
            y: [rows, hidden] spec.dtype, in the order of `received.x`, unweighted.
            reduce: "rank": each rank sends one partial sum a token (float32 sums, rounded to
                spec.dtype once on the wire); "home": one row per expert, summed at home in the
                order of expert_ids, in float32: independent of the placement.
            out: [tokens, hidden] spec.dtype to fill, or None.

        Raises:
            RankTimeout, Interrupted
            StaleEpoch: `received` is of another epoch or not the last dispatch.
            CommError: nonsense from a peer, or one that used another `reduce`.
        """

    @abstractmethod
    def close(self) -> None:
        """Unmap and release everything; idempotent."""


def make_buffer(
    rank: int, spec: BufferSpec, *, backend: str = "host", timeout_s: float = 30.0
) -> Buffer:
    """A new buffer of the named backend ("host": shared memory within one machine).

    Raises:
        ValueError: unknown backend, rank outside [0, capacity), or a spec out of range.
    """
    if backend != "host":
        raise ValueError(f"unknown exchange backend {backend!r}: there is 'host'")
    from flexpert.comm.host.buffer import HostBuffer

    return HostBuffer(rank, spec, timeout_s=timeout_s)
