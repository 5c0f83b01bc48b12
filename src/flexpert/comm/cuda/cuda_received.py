"""What a dispatch brought, on the GPU: rows stay where they arrived."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexpert.comm.buffer import Received
from flexpert.comm.cuda.cuda_exchange import CudaDispatched, CudaIndexed
from flexpert.comm.cuda.expert_major import ExpertMajor, pack
from flexpert.comm.errors import StaleEpoch

if TYPE_CHECKING:
    from flexpert.comm.cuda.cuda_buffer import CudaBuffer


class CudaReceived(Received):
    """See `Received`; all tensors are on the GPU.

    What has a length that only the device knows (`weights`, `source`, `token`, `rows`, `x`,
    `scales`) waits for the device once, raises what the dispatch has to raise, and cannot be used
    while a CUDA graph is captured. `indexed` can: its tensors have fixed sizes and addresses, and
    every replay fills them anew. `masked` waits, too, and must be asked for before the next
    dispatch.
    """

    # of most dispatches nobody asks; so an object has none of these before
    _masked: tuple[int, ...] | None = None
    _x: torch.Tensor | None = None
    _scales: torch.Tensor | None = None
    known_count: int | None = None
    """`count`, once somebody has asked."""

    def __init__(
        self,
        buffer: CudaBuffer,
        sent: CudaDispatched,
        epoch: int,
        sequence: int,
    ) -> None:
        self._buffer = buffer
        self.sent = sent
        self.epoch = epoch
        self.sequence = sequence

    @property
    def tokens_sent(self) -> int:  # type: ignore[override]
        return self.sent.tokens

    @property
    def indexed(self) -> CudaIndexed:
        """Where the rows lie, without waiting for the device."""
        return self.sent.indexed

    @property
    def offsets(self) -> torch.Tensor:  # type: ignore[override]
        return self.indexed.offsets

    @property
    def count(self) -> int:
        """Number of rows."""
        if self.known_count is None:
            self._check()
            count = int(self.indexed.offsets[-1])
            self._buffer.raise_reported()
            self.known_count = count
        return self.known_count

    @property
    def masked(self) -> tuple[int, ...]:  # type: ignore[override]
        if self._masked is None:
            self._masked = self._buffer.left_out(self)
        return self._masked

    @property
    def weights(self) -> torch.Tensor:  # type: ignore[override]
        return self.indexed.weights[self.indexed.pairs[: self.count].long()]

    @property
    def source(self) -> torch.Tensor:  # type: ignore[override]
        return self.indexed.rows[: self.count] // self._buffer.spec.max_tokens

    @property
    def token(self) -> torch.Tensor:  # type: ignore[override]
        return self.indexed.rows[: self.count] % self._buffer.spec.max_tokens

    @property
    def rows(self) -> torch.Tensor:
        self._check()
        payload = self.indexed.payload
        step = payload.shape[1] * payload.itemsize
        return self.indexed.rows[: self.count].long() * step + payload.data_ptr()

    @property
    def x(self) -> torch.Tensor:
        if self._x is None:
            self._x = self._gathered(self.indexed.payload)
        return self._x

    @property
    def scales(self) -> torch.Tensor | None:
        if self._scales is None and self.indexed.scales is not None:
            self._scales = self._gathered(self.indexed.scales)
        return self._scales

    def pack(self, into: ExpertMajor) -> None:
        """Copy the rows together by slot, with room for as many in each; can be captured.

        Raises: StaleEpoch: combine has begun. ValueError: tensors that do not fit.
        """
        self._check()
        pack(self._buffer.exchange, self.sent, into)

    def _gathered(self, payload: torch.Tensor) -> torch.Tensor:
        self._check()
        raw = payload.view(torch.uint8)  # float8 has no index_select everywhere
        return raw[self.indexed.rows[: self.count].long()].view(payload.dtype)

    def _check(self) -> None:
        if not self._buffer.holds(self):
            raise StaleEpoch(
                f"the rows of dispatch {self.sequence} (epoch {self.epoch}) were not copied "
                "before combine began: use x before"
            )
