"""torch.distributed's gloo as a baseline, in the three ways that frameworks use it.

Rows travel as bytes, because gloo need not know their dtype; memory is allocated once, except for
what `embedding_bag` returns.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from flexpert.bench.comm import index_work as routes
from flexpert.bench.comm.baseline import Site


class _Gloo:
    """A group of its own, and y."""

    def __init__(self, site: Site, rows: int) -> None:
        """rows: the most (token, expert) pairs that a rank can get."""
        self._site = site
        self._work = site.work
        if not dist.is_initialized():  # one group for all of them
            dist.init_process_group(
                "gloo",
                store=site.store,
                rank=site.rank,
                world_size=site.work.ranks,
                timeout=timedelta(seconds=site.timeout_s),
            )
        # ones: what happens to lie in fresh memory may be denormal, and sums of that are slow
        self._y = torch.ones((rows, site.work.hidden), dtype=site.work.torch_dtype)
        self._pairs = 0

    def _room(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self._work.hidden), dtype=self._work.torch_dtype)

    def _all_gather(self, out: torch.Tensor, own: torch.Tensor) -> None:
        dist.all_gather_into_tensor(out, own)

    def _all_to_all(
        self, out: torch.Tensor, rows: torch.Tensor, out_split: list[int], split: list[int]
    ) -> None:
        dist.all_to_all_single(out.view(torch.uint8), rows.view(torch.uint8), out_split, split)

    def y_room(self) -> torch.Tensor:
        return self._y[: self._pairs]

    def close(self) -> None:
        """The group stays, for the next workload."""


class RowPerRank(_Gloo):
    """A token travels once to each rank, and one partial sum travels back."""

    def __init__(self, site: Site) -> None:
        work = site.work
        came = work.ranks * work.tokens
        super().__init__(site, came * min(work.topk, work.slots))
        self._routing = torch.empty((work.tokens, 2 * work.topk), dtype=torch.int32)
        self._all_routing = torch.empty((came, 2 * work.topk), dtype=torch.int32)
        self._sent = self._room(came)
        self._came = self._room(came)
        self._back = self._room(came)

    def dispatch(self, turn: int) -> None:
        work, i = self._work, self._site.input(turn)
        routes.pack_routing(self._routing, i.expert_ids, i.weights)
        self._all_gather(self._all_routing, self._routing)
        self._out = out = routes.outgoing(i.expert_ids, work.slots, work.ranks)
        sent = self._sent[: len(out.token)]
        torch.index_select(i.x, 0, out.token, out=sent)
        ids, weights = routes.unpack_routing(self._all_routing)
        local = routes.local_pairs(ids, weights, work.slots, self._site.rank)
        came = local.counts > 0
        self._in_counts = came.view(work.ranks, work.tokens).sum(1).tolist()
        self._in = self._came[: sum(self._in_counts)]
        self._all_to_all(self._in, sent, self._in_counts, out.counts)
        self._row_of = (came.cumsum(0) - 1)[local.token]
        self._starts = local.starts[came]
        self._local = local
        self._pairs = len(local.token)

    def combine(self) -> torch.Tensor:
        local, out = self._local, self._out
        partial = routes.sum_rows(self.y_room(), local.bags, self._starts, local.weights)
        back = self._back[: len(out.token)]
        self._all_to_all(back, partial, out.counts, self._in_counts)
        return routes.sum_rows(back, out.bags, out.starts)

    def rows(self) -> torch.Tensor:
        return self._in[self._row_of]


class RowPerExpert(_Gloo):
    """A token travels once for each of its experts, and each result travels back."""

    def __init__(self, site: Site) -> None:
        work = site.work
        sent = work.tokens * work.topk
        most = work.ranks * work.tokens * min(work.topk, work.slots)
        super().__init__(site, most)
        self._all_counts = torch.empty(work.ranks * work.ranks * work.slots, dtype=torch.int64)
        self._sent = self._room(sent)
        self._back = self._room(sent)
        self._came = self._room(most)
        self._returned = self._room(most)
        self._starts = torch.arange(0, sent, work.topk)

    def dispatch(self, turn: int) -> None:
        work, i = self._work, self._site.input(turn)
        experts = i.expert_ids.flatten()
        counts = torch.bincount(experts, minlength=work.ranks * work.slots)
        self._all_gather(self._all_counts, counts)
        order = torch.argsort(experts, stable=True)
        token = torch.div(order, work.topk, rounding_mode="floor")
        torch.index_select(i.x, 0, token, out=self._sent)
        self._split = counts.view(work.ranks, work.slots).sum(1).tolist()
        here = self._all_counts.view(work.ranks, work.ranks, work.slots)[:, self._site.rank]
        self._in_split = here.sum(1).tolist()
        self._pairs = sum(self._in_split)
        came = self._came[: self._pairs]
        self._all_to_all(came, self._sent, self._in_split, self._split)
        slot = torch.repeat_interleave(
            torch.arange(work.slots).repeat(work.ranks), here.flatten(), output_size=self._pairs
        )
        self._row_of = torch.argsort(slot, stable=True)
        self._place = routes.inverse(order)
        self._weights = i.weights.flatten()

    def combine(self) -> torch.Tensor:
        returned = self._returned[: self._pairs]
        torch.index_select(self.y_room(), 0, routes.inverse(self._row_of), out=returned)
        self._all_to_all(self._back, returned, self._split, self._in_split)
        return routes.sum_rows(self._back, self._place, self._starts, self._weights)

    def rows(self) -> torch.Tensor:
        return self._came[self._row_of]


class Gather(_Gloo):
    """Every rank gets all tokens; sums of all tokens are reduced. vLLM's default."""

    def __init__(self, site: Site, *, all_reduce: bool = False) -> None:
        work = site.work
        came = work.ranks * work.tokens
        super().__init__(site, came * min(work.topk, work.slots))
        self._all_reduce = all_reduce
        packed = work.row_bytes + 8 * work.topk  # the row, then its routing
        self._sent = torch.empty((work.tokens, packed), dtype=torch.uint8)
        self._came = torch.empty((came, packed), dtype=torch.uint8)
        self._result = self._room(work.tokens)

    def dispatch(self, turn: int) -> None:
        work, i = self._work, self._site.input(turn)
        self._sent.view(work.torch_dtype)[:, : work.hidden] = i.x
        routing = self._sent.view(torch.int32)[:, work.row_bytes // 4 :]
        routes.pack_routing(routing, i.expert_ids, i.weights)
        self._all_gather(self._came, self._sent)
        packed = self._came.view(torch.int32)[:, work.row_bytes // 4 :]
        ids, weights = routes.unpack_routing(packed)
        self._local = routes.local_pairs(ids, weights, work.slots, self._site.rank)
        self._pairs = len(self._local.token)

    def combine(self) -> torch.Tensor:
        local, work = self._local, self._work
        partial = routes.sum_rows(self.y_room(), local.bags, local.starts, local.weights)
        if self._all_reduce:
            dist.all_reduce(partial)
            first = self._site.rank * work.tokens
            return partial[first : first + work.tokens]
        dist.reduce_scatter_tensor(self._result, partial)
        return self._result

    def rows(self) -> torch.Tensor:
        return self._came.view(self._work.torch_dtype)[:, : self._work.hidden][self._local.token]
