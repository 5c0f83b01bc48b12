"""Exchanges of nixl_ep's users on a CPU: rows are copied by the host from where they arrived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch

from flexpert.comm.buffer import Buffer, Received
from flexpert.comm.errors import CommError
from flexpert.comm.host._kernels import lib
from flexpert.compat.nixl_ep.call_checks import counting_weights
from flexpert.compat.nixl_ep.device_exchange import (
    Device,
    DeviceDispatched,
    DispatchSizes,
    Phase,
    Returned,
)
from flexpert.compat.nixl_ep.expert_major_tensors import Arrival, collect, spread
from flexpert.compat.nixl_ep.returned_memory import ReturnedMemory


class CpuDevice(Device[Arrival]):
    """See `Device`."""

    at = torch.device("cpu")
    own_rows_wait = True

    def __init__(self, core: Buffer) -> None:
        self.core = core
        self._memory = ReturnedMemory()

    def waited(self, phase: Phase) -> torch.Tensor:
        so_far = self.core.statistics()
        waits = so_far.dispatch_wait_ns if phase == "dispatch" else so_far.combine_wait_ns
        each = [waits.get(rank, 0) for rank in range(self.core.spec.capacity)]
        return torch.tensor(each, dtype=torch.int64, device="cpu")

    def routes(self, experts: torch.Tensor) -> torch.Tensor:
        """A copy: users mark experts of lost ranks in theirs."""
        return experts.clone()

    def repeated(self, experts: torch.Tensor) -> torch.Tensor:
        return experts

    def returned(self, rows: DispatchSizes) -> Returned:
        recv_x, scales = self._memory.next_dispatch(
            rows.shape, rows.dtype, rows.scale_columns, rows.scale_dtype
        )
        return Returned(
            recv_x,
            scales,
            torch.empty(rows.experts, dtype=torch.int32, device="cpu"),
            torch.empty((rows.experts, rows.limit), dtype=torch.int32, device="cpu"),
            torch.empty((rows.experts, rows.ranks), dtype=torch.int64, device="cpu"),
        )

    def staged(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._memory.combine.take(shape, torch.bfloat16)

    def fill(self, done: DeviceDispatched[Arrival], received: Received) -> Arrival:
        rows, returned = done.rows, done.returned
        arrival = Arrival.of(received.offsets, received.source, rows.ranks, rows.limit)
        returned.recv_count.copy_(arrival.per_expert)
        returned.src_info.view(-1)[arrival.places] = received.token
        returned.layout_range.copy_(arrival.layout_range())
        # one copy, from where the rows arrived to where they are desired
        addresses, offsets = received.rows, received.offsets.tolist()
        row_bytes = rows.hidden * rows.dtype.itemsize
        for expert, (begin, end) in enumerate(pairwise(offsets)):
            at = addresses.data_ptr() + begin * addresses.itemsize
            lib.fx_gather(at, end - begin, 0, row_bytes, returned.recv_x[expert].data_ptr())
        if returned.scales is not None and received.scales is not None:
            spread(received.scales[:, : rows.scale_columns], arrival.places, returned.scales)
        return arrival

    def again(self, done: DeviceDispatched[Arrival], came: Arrival, received: Received) -> Arrival:
        """Ranks that were masked since then bring no rows.

        Raises: CommError: the rows are not those of `done`.
        """
        new = Arrival.of(received.offsets, received.source, done.rows.ranks, done.rows.limit)
        here = new.counts.sum(0) > 0
        if not torch.equal(came.counts * here, new.counts):
            raise CommError(
                f"ranks combine different dispatches (rank {self.core.rank} has one of "
                f"{came.places.shape[0]} rows): all must call dispatch and combine in one order"
            )
        return replace(came, places=came.places_from(here))

    def discard(self, received: Received) -> None:
        self.core.combine(self.core.combine_input(received), received, reduce="rank")

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: Arrival,
        received: Received,
        *,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.begin_combine(x, topk_idx, weights, came, received, out=out)()

    def begin_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: Arrival,
        received: Received,
        *,
        out: torch.Tensor | None,
    ) -> Callable[[], torch.Tensor]:
        y = self.core.combine_input(received)
        collect(x.detach(), came.places, y)
        return self.core.begin_combine(y, received, reduce="home", weights=weights, out=out)

    def counting(
        self, topk_idx: torch.Tensor, weights: torch.Tensor, done: DeviceDispatched[Arrival]
    ) -> torch.Tensor:
        return counting_weights(topk_idx, weights, done.experts)
