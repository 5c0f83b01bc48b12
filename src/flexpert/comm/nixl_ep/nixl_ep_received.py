"""What a dispatch of nixl_ep brought: rows by slot, each slot in the room it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flexpert.comm.buffer import ExpertTable, Received
from flexpert.comm.errors import CommError, StaleEpoch
from flexpert.comm.nixl_ep.expert_numbers import packed, sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer


@dataclass(frozen=True, slots=True)
class NixlEpIndexed:
    """Where the rows of a dispatch lie, without waiting for the device.

    offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
    rows: [most rows] int32, the row of payload that each row is; 0 behind offsets[slots].
    places: the same; slots * limit behind.
    payload: [slots * limit, hidden], with gaps.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    payload: torch.Tensor


@dataclass(slots=True, eq=False)
class NixlEpDispatched:
    """One dispatch.

    expert_ids, weights, table, tokens: as given. numbers, factors: what nixl_ep was told, at least
    one token. recv_x: [slots, limit, hidden]; scales: [slots, limit, …] or None; counts: [slots]
    int32; handle: nixl_ep's. receive: what receives, or None.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    table: ExpertTable
    tokens: int
    numbers: torch.Tensor
    factors: torch.Tensor
    recv_x: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    handle: tuple[torch.Tensor, torch.Tensor, Any, Any]
    receive: Callable[[], None] | None
    indexed: NixlEpIndexed | None = field(default=None)

    @property
    def limit(self) -> int:
        return self.recv_x.shape[1]

    def index(self, most: int) -> NixlEpIndexed:
        """Once received. most: rows that there may be."""
        offsets, places = packed(self.counts, self.limit, most)
        rows = torch.where(places < self.recv_x.shape[0] * self.limit, places, 0)
        self.indexed = NixlEpIndexed(offsets, rows, places, self.recv_x.flatten(0, 1))
        return self.indexed


class NixlReceived(Received):
    """See `Received`.

    Differences: rows of a slot are in the order of their arrival; nixl_ep carries no router
    weights, so `weights` raises. What has a length that only the device knows (`source`, `token`,
    `rows`, `x`, `scales`) waits for the device once; `indexed` does not, and can be captured.
    """

    def __init__(
        self,
        buffer: NixlEpBuffer,
        sent: NixlEpDispatched,
        indexed: NixlEpIndexed,
        masked: tuple[int, ...],
        epoch: int,
        sequence: int,
    ) -> None:
        self._buffer = buffer
        self.sent = sent
        self.indexed = indexed
        self.tokens_sent = sent.tokens
        self.masked = masked
        self.epoch = epoch
        self.sequence = sequence
        self._count: int | None = None
        self._x: torch.Tensor | None = None

    @property
    def offsets(self) -> torch.Tensor:  # type: ignore[override]
        return self.indexed.offsets[: self.sent.table.slots + 1]

    @property
    def count(self) -> int:
        """Number of rows."""
        if self._count is None:
            self._check()
            self._count = int(self.indexed.offsets[-1])
        return self._count

    @property
    def weights(self) -> torch.Tensor:  # type: ignore[override]
        raise CommError(
            "nixl_ep does not carry router weights to the experts: it applies them at the token's "
            "home; pass combine unweighted rows"
        )

    @property
    def source(self) -> torch.Tensor:  # type: ignore[override]
        return sources(self.sent.handle[1], self._places(), self.sent.limit)

    @property
    def token(self) -> torch.Tensor:  # type: ignore[override]
        return self.sent.handle[0].flatten()[self._places().long()]

    @property
    def rows(self) -> torch.Tensor:
        payload = self.indexed.payload
        step = payload.shape[1] * payload.itemsize
        return self._places().long() * step + payload.data_ptr()

    @property
    def x(self) -> torch.Tensor:
        if self._x is None:
            payload = self.indexed.payload
            raw = payload.view(torch.uint8)  # float8 has no index_select everywhere
            self._x = raw[self._places().long()].view(payload.dtype)
        return self._x

    @property
    def scales(self) -> torch.Tensor | None:
        if self.sent.scales is None:
            return None
        places = self._places().long()
        slot = torch.div(places, self.sent.limit, rounding_mode="floor")
        return self.sent.scales[slot, places - slot * self.sent.limit]

    def _places(self) -> torch.Tensor:
        count = self.count
        self._check()
        return self.indexed.places[:count]

    def _check(self) -> None:
        if not self._buffer.holds(self):
            raise StaleEpoch(
                f"the rows of dispatch {self.sequence} (epoch {self.epoch}) were not copied "
                "before combine began: use x before"
            )
