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
        self,
        site: Site,
        *,
        gather: bool = False,
        reduce: Reduce = "rank",
        quantise: bool = False,
        two_level: bool = True,
        split: bool = False,
    ) -> None:
        """split: each (token, expert) is a token of its own."""
        work = site.work
        rows = work.tokens * work.topk if split else work.tokens
        spec = BufferSpec(work.ranks, rows, work.hidden, work.topk, work.torch_dtype)
        self._buffer = make_buffer(
            site.rank,
            spec,
            store=site.store,
            channel=cast(Channel, site.channel),
            machine=site.machine,
            two_level=two_level,
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
        self._split = split
        self._split_x = torch.empty((rows if split else 0, work.hidden), dtype=work.torch_dtype)
        self._of_row = torch.arange(work.tokens).repeat_interleave(work.topk)
        self._out = torch.empty((rows, work.hidden), dtype=work.torch_dtype)
        self._received: Received | None = None

    def _last(self) -> Received:
        assert self._received is not None
        return self._received

    def dispatch(self, turn: int) -> None:
        i = self._site.input(turn)
        x, ids, weights = i.x, i.expert_ids, i.weights
        if self._split:
            x = torch.index_select(x, 0, self._of_row, out=self._split_x)
            ids, weights = ids.view(-1, 1), weights.view(-1, 1)
        received = self._buffer.dispatch(x, ids, weights, self._table, fp8=self._fp8)
        if self._gather:
            _ = received.x
        self._received = received

    def combine(self) -> torch.Tensor:
        y = self._buffer.combine_input(self._last())
        out = self._buffer.combine(y, self._last(), reduce=self._reduce, out=self._out)
        if not self._split:
            return out
        work = self._site.work
        parts = out.view(work.tokens, work.topk, work.hidden)
        return parts.sum(1, dtype=torch.float32).to(work.torch_dtype)

    def rows(self) -> torch.Tensor:
        received = self._last()
        if received.scales is None:
            return received.x
        return dequantise(received.x, received.scales, self._out.dtype)

    def y_room(self) -> torch.Tensor:
        return self._buffer.combine_input(self._last())

    def link_bytes(self) -> int:
        return sum(self._buffer.statistics().wire_bytes.values())

    def close(self) -> None:
        self._buffer.close()
