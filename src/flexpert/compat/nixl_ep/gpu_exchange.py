"""Exchanges of nixl_ep's users on a GPU.

Nothing here waits for the device, so that all of it can be captured into a CUDA graph. For the same
reason nobody looks at what tensors hold.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from flexpert.comm.buffer import BufferSpec, Received, Reduce
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_exchange import ExchangeCalls
from flexpert.comm.cuda.cuda_layout import Word
from flexpert.comm.cuda.cuda_received import CudaReceived
from flexpert.comm.cuda.expert_major import NOWHERE, ExpertMajor
from flexpert.comm.errors import CommError
from flexpert.compat.nixl_ep.device_exchange import (
    Device,
    DeviceDispatched,
    DispatchSizes,
    Phase,
    Returned,
)
from flexpert.compat.nixl_ep.expert_major_tensors import column_major, widened

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# a result for each choice of a token can come back for so many choices, as memory grows;
# of more only sums can
_CHOICES = 16
_HELD = 3  # references to a src_info: of `GpuReturned`, of its `into`, of who counts them
_TURNS = 2  # sets of tensors: what a dispatch returned is valid until the dispatch after the next


@dataclass(slots=True, eq=False)
class GpuReturned(Returned):
    """into: the same tensors, as `CudaReceived.pack` takes them. used: more than once. calls: that
    fill them; None: not known yet."""

    into: ExpertMajor
    used: bool = False
    calls: ExchangeCalls | None = None


class GpuDevice(Device[torch.Tensor]):
    """See `Device`. What is remembered of a dispatch are its `places`, see `ExpertMajor`.

    Tensors for what comes are used again by the dispatch after the next of the same kind; while a
    graph is captured they are new, since the graph keeps them for itself.
    """

    core: CudaBuffer
    own_rows_wait = False

    def __init__(self, core: CudaBuffer) -> None:
        self.core = core
        self.at = core.device
        self._on_gpu = core.device.type == "cuda"
        most = core.exchange.most_rows
        self._nowhere = torch.full((most,), NOWHERE, dtype=torch.int32, device=self.at)
        most = core.spec.max_tokens * core.spec.topk
        self._nobody = torch.full((most,), -1, dtype=torch.int32, device=self.at)
        self._nothing = torch.zeros((1, core.spec.hidden), dtype=torch.bfloat16, device=self.at)
        self._captured = False  # the last dispatch
        self._rows: DispatchSizes | None = None  # of what `_turns` are for
        self._turns: deque[GpuReturned] = deque()

    @classmethod
    def of(cls, rank: int, spec: BufferSpec, timeout_s: float, store: Store) -> GpuDevice:
        """With a buffer on the current GPU."""
        core = CudaBuffer(
            rank,
            spec,
            timeout_s=timeout_s,
            on_timeout="mask",
            store=store,
            same_k=True,
            unmask_at_once=True,
            choices=_CHOICES,
        )
        return cls(core)

    def waited(self, phase: Phase) -> torch.Tensor:
        exchange = self.core.exchange
        if phase == "dispatch":
            return exchange.waited(Word.WAITED_DISPATCH)
        return exchange.waited(Word.WAITED_COMBINE)

    def routes(self, experts: torch.Tensor) -> torch.Tensor:
        return experts

    def repeated(self, experts: torch.Tensor) -> torch.Tensor:
        """To nobody: places are known, and peers only need the number of tokens."""
        return self._nobody[: experts.numel()].view(experts.shape)

    def returned(self, rows: DispatchSizes) -> Returned:
        if self._capturing():
            return self._new(rows)
        if rows is not self._rows:
            self._rows = rows
            self._turns.clear()
        if len(self._turns) < _TURNS:
            returned = self._new(rows)
        else:
            returned = self._turns.popleft()
            if sys.getrefcount(returned.src_info) > _HELD:  # somebody has a handle that is too old
                calls = returned.calls
                returned = self._with_info(returned.into, rows)
                returned.calls = calls
            returned.used = True
        self._turns.append(returned)
        return returned

    @torch.inference_mode(False)  # else who uses them next could not train with them
    def _new(self, rows: DispatchSizes) -> GpuReturned:
        def new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.at)

        scales: torch.Tensor | None = None
        if rows.scale_columns:
            storage = (rows.experts, rows.scale_columns, rows.limit)
            scales = column_major(new(storage, rows.scale_dtype))
        into = ExpertMajor(
            x=new(rows.shape, rows.dtype),
            scales=scales,
            count=new((rows.experts,), torch.int32),
            token=new((0,), torch.int32),
            ranges=new((rows.experts, rows.ranks), torch.int64),
            places=torch.empty_like(self._nowhere),
        )
        return self._with_info(into, rows)

    @torch.inference_mode(False)
    def _with_info(self, into: ExpertMajor, rows: DispatchSizes) -> GpuReturned:
        into.token = torch.empty((rows.experts, rows.limit), dtype=torch.int32, device=self.at)
        return GpuReturned(into.x, into.scales, into.count, into.token, into.ranges, into)

    def staged(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.at)

    def fill(self, done: DeviceDispatched[torch.Tensor], received: Received) -> torch.Tensor:
        into = cast(GpuReturned, done.returned).into
        cast(CudaReceived, received).pack(into)
        self._captured = self._capturing()
        return into.places

    def remember(self, done: DeviceDispatched[torch.Tensor], x: torch.Tensor) -> None:
        returned, sent = cast(GpuReturned, done.returned), cast(CudaReceived, done.received).sent
        packing = returned.into.packing
        if self._captured or not returned.used or packing is None:
            return
        sent.calls = returned.calls = self.core.calls_of(
            x, sent, done.rows.max_tokens, packing.step, token=returned.src_info
        )

    def dispatch_directly(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, rows: DispatchSizes
    ) -> tuple[Returned, Received, torch.Tensor] | None:
        turns = self._turns
        if rows is not self._rows or len(turns) < _TURNS:
            return None
        returned = turns[0]
        if (
            returned.calls is None
            or sys.getrefcount(returned.src_info) > _HELD
            or self._capturing()
        ):
            return None
        received = self.core.dispatch_by(returned.calls, x, experts, weights, returned.src_info)
        if received is None:
            return None
        turns.rotate(-1)
        self._captured = False
        return returned, received, returned.into.places

    def combine_directly(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: torch.Tensor,
        received: Received,
        out: torch.Tensor | None,
    ) -> torch.Tensor | None:
        return self.core.combine_by(received, x, out, weights, topk_idx, came)

    def again(
        self, done: DeviceDispatched[torch.Tensor], came: torch.Tensor, received: Received
    ) -> torch.Tensor:
        """Places are by source, token and choice; those of ranks that left are not looked at."""
        return came

    def discard(self, received: Received) -> None:
        """Raises: CommError: the dispatch was before the graph that is captured now."""
        if self._capturing() and not self._captured:
            raise CommError(
                "a dispatch before the graph that is captured was not combined: combine it, or "
                "call barrier() on all ranks, before the capture begins"
            )
        reduce = _reduce(cast(CudaReceived, received).sent.expert_ids)
        self.core.combine(self._nothing, received, reduce=reduce, places=self._nowhere)

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: torch.Tensor,
        received: Received,
        *,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        return self.core.combine(
            self._whole(x), received, weights=weights, out=out, places=came, expert_ids=topk_idx
        )

    def begin_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        came: torch.Tensor,
        received: Received,
        *,
        out: torch.Tensor | None,
    ) -> Callable[[], torch.Tensor]:
        return self.core.begin_combine(
            self._whole(x), received, reduce=_reduce(topk_idx), weights=weights, out=out,
            places=came, expert_ids=topk_idx,
        )  # fmt: skip

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """x as wide as the core's rows, contiguous."""
        hidden = self.core.spec.hidden
        if x.size(2) == hidden and x.is_contiguous():
            return x
        return widened(x.detach(), hidden)

    def counting(
        self, topk_idx: torch.Tensor, weights: torch.Tensor, done: DeviceDispatched[torch.Tensor]
    ) -> torch.Tensor:
        """As they are: topk_idx itself says at combine which rows count."""
        if topk_idx is done.experts:
            return weights
        shape = done.experts.shape
        if topk_idx.shape != shape or topk_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"topk_idx must be {list(shape)} int64 or int32 as in dispatch, is "
                f"{list(topk_idx.shape)} {topk_idx.dtype}"
            )
        return weights

    def on_stream(self, work: Callable[[], None]) -> Callable[[], None]:
        if not self._on_gpu:
            return work
        # by its address: to make one of torch's objects takes microseconds
        index, begun = self.at.index, _raw_stream(self.at.index)

        def run() -> None:
            if _raw_stream(index) == begun:
                work()
                return
            stream = torch.cuda.default_stream(self.at)
            if begun:
                stream = torch.cuda.ExternalStream(begun, self.at)  # type: ignore[no-untyped-call]
            now = torch.cuda.current_stream(self.at)
            with torch.cuda.stream(stream):
                work()
            now.wait_stream(stream)

        return run

    def _capturing(self) -> bool:
        return self._on_gpu and torch.cuda.is_current_stream_capturing()


_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _reduce(experts: torch.Tensor) -> Reduce:
    """Results row by row are sent without waiting for anybody, or not at all where none counts; but
    there must be room for them. experts: [tokens, k]."""
    return "home" if experts.shape[1] <= _CHOICES else "rank"
