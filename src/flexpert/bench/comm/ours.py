"""`flexpert.comm.Buffer` as a baseline."""

from __future__ import annotations

from typing import cast

import torch

from flexpert.bench.comm.baseline import Site
from flexpert.bench.comm.workload import expert_table
from flexpert.comm import BufferSpec, Received, make_buffer
from flexpert.comm.buffer import Channel, Reduce
from flexpert.comm.quant import dequantise


class HostExchangeBaseline:
    def __init__(
        self, site: Site, *, gather: bool = False, reduce: Reduce = "rank", quantise: bool = False
    ) -> None:
        work = site.work
        spec = BufferSpec(work.ranks, work.tokens, work.hidden, work.topk, work.torch_dtype)
        self._buffer = make_buffer(
            site.rank,
            spec,
            store=site.store,
            channel=cast(Channel, site.channel),
            timeout_s=site.timeout_s,
        )
        self._buffer.connect(range(work.ranks))
        self._buffer.set_active(range(work.ranks), 1)
        self._buffer.barrier(timeout_s=site.timeout_s)
        self._site = site
        self._table = expert_table(work)
        self._gather = gather
        self._reduce = reduce
        self._fp8 = site.fp8 if quantise else None
        self._out = torch.empty((work.tokens, work.hidden), dtype=work.torch_dtype)
        self._received: Received | None = None

    def _last(self) -> Received:
        assert self._received is not None
        return self._received

    def dispatch(self, turn: int) -> None:
        i = self._site.input(turn)
        received = self._buffer.dispatch(i.x, i.expert_ids, i.weights, self._table, fp8=self._fp8)
        if self._gather:
            _ = received.x
        self._received = received

    def combine(self) -> torch.Tensor:
        y = self._buffer.combine_input(self._last())
        return self._buffer.combine(y, self._last(), reduce=self._reduce, out=self._out)

    def rows(self) -> torch.Tensor:
        received = self._last()
        if received.scales is None:
            return received.x
        return dequantise(received.x, received.scales, self._out.dtype)

    def y_room(self) -> torch.Tensor:
        return self._buffer.combine_input(self._last())

    def close(self) -> None:
        self._buffer.close()
