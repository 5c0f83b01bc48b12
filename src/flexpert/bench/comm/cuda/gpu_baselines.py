"""What is measured on GPUs. Everything a baseline launches can be captured into a CUDA graph."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from flexpert.bench.comm.baseline import Unavailable
from flexpert.bench.comm.workload import Input, Workload, expert_table
from flexpert.comm import BufferSpec, CommError, ExpertTable
from flexpert.comm.buffer import Scales
from flexpert.comm.nixl_ep.package import find
from flexpert.comm.quant import dequantise
from flexpert.comm.window_layout import align

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

    from flexpert.comm.cuda.cuda_exchange import CudaIndexed


@dataclass(slots=True)
class GpuSite:
    """Where a baseline runs. pool: inputs on the device; store, gather: as in `Site`."""

    rank: int
    work: Workload
    store: Store
    gather: Callable[[Any], list[Any]]
    fp8: Scales | None
    timeout_s: float
    pool: list[Input]
    device: torch.device


class GpuBaseline(Protocol):
    """One way to exchange, on one rank. A turn is an input of the pool.

    `dispatch` ends when each expert can find its rows; `combine` begins with one row of results
    for each (token, local expert) and ends with the weighted sums [tokens, hidden].
    """

    def dispatch(self, turn: int) -> None: ...

    def combine(self, turn: int) -> torch.Tensor: ...

    def rows(self) -> torch.Tensor:
        """[pairs, hidden] of the last dispatch by slot, source and token; not timed."""

    def put_results(self, turn: int, y: torch.Tensor) -> None:
        """y: [pairs, hidden] in the order of `rows`: what combine of this turn sends."""

    def close(self) -> None: ...


class _IndexedRows:
    """What our baselines have in common: rows stay where they arrived."""

    def __init__(self, site: GpuSite, most_rows: int, fp8: Scales | None) -> None:
        work = site.work
        self._site, self._fp8 = site, fp8
        table = expert_table(work)
        self._table = ExpertTable(
            table.rank.to(site.device), table.slot.to(site.device), table.slots
        )
        shape = (most_rows, work.hidden)
        self._y = [torch.randn(shape, device=site.device).to(work.torch_dtype) for _ in site.pool]
        self._out = torch.empty(
            (work.tokens, work.hidden), dtype=work.torch_dtype, device=site.device
        )
        self._indexed: CudaIndexed | None = None

    def rows(self) -> torch.Tensor:
        indexed = self._indexed
        assert indexed is not None
        rows = indexed.rows[: int(indexed.offsets[-1])].long()
        if indexed.scales is None:
            return indexed.payload[rows]
        return dequantise(indexed.payload[rows], indexed.scales[rows], self._out.dtype)

    def put_results(self, turn: int, y: torch.Tensor) -> None:
        self._y[turn][: y.shape[0]] = y


class CudaExchangeBaseline(_IndexedRows):
    """`flexpert.comm.cuda`."""

    def __init__(self, site: GpuSite, *, fp8: bool = True, **tuning: Any) -> None:
        from flexpert.comm.cuda.cuda_exchange import CudaDispatched, CudaExchange, Tuning
        from flexpert.comm.cuda.cuda_layout import PAGE_WORDS, layout, tag
        from flexpert.comm.cuda.ipc_memory import PeerMemory, SharedMemory

        work = site.work
        spec = BufferSpec(work.ranks, work.tokens, work.hidden, work.topk, work.torch_dtype)
        self._memory = SharedMemory(layout(spec, choices=1).size, site.device)
        page = torch.zeros(PAGE_WORDS, dtype=torch.int64, pin_memory=True)
        self.exchange = CudaExchange(
            site.rank, spec, self._memory.tensor, page, choices=1, tuning=Tuning(**tuning)
        )
        super().__init__(site, self.exchange.most_rows, site.fp8 if fp8 else None)
        self._peers = {
            rank: PeerMemory(f"rank {rank}", handle, site.device)
            for rank, handle in enumerate(site.gather(self._memory.handle))
            if rank != site.rank
        }
        addresses = {rank: peer.address for rank, peer in self._peers.items()}
        addresses[site.rank] = self._memory.address
        self.exchange.configure(
            addresses,
            dict.fromkeys(range(work.ranks), tag(1, 0)),
            limit_ns=int(site.timeout_s * 1e9),
        )
        torch.cuda.synchronize()
        site.gather(None)
        self._sent: CudaDispatched | None = None

    def dispatch(self, turn: int) -> None:
        i = self._site.pool[turn]
        self._sent = self.exchange.dispatch(
            i.x, i.expert_ids, i.weights, self._table, fp8=self._fp8
        )
        self._indexed = self._sent.indexed

    def combine(self, turn: int) -> torch.Tensor:
        assert self._sent is not None
        return self.exchange.combine(self._y[turn], self._sent, self._out)

    def close(self) -> None:
        torch.cuda.synchronize()
        self._site.gather(None)
        for peer in self._peers.values():
            peer.close()
        self._site.gather(None)
        self._memory.close()


class CudaBufferBaseline(_IndexedRows):
    """`flexpert.comm.Buffer` on a GPU, called as its users call it."""

    def __init__(self, site: GpuSite, **tuning: Any) -> None:
        from flexpert.comm.cuda.cuda_buffer import CudaBuffer
        from flexpert.comm.cuda.cuda_exchange import FEW, Tuning
        from flexpert.comm.cuda.cuda_received import CudaReceived
        from flexpert.comm.interpreter import INTERPRETED

        work = site.work
        spec = BufferSpec(work.ranks, work.tokens, work.hidden, work.topk, work.torch_dtype)
        self._buffer = CudaBuffer(
            site.rank,
            spec,
            timeout_s=site.timeout_s,
            device=site.device,
            choices=1,
            tuning=replace(FEW if INTERPRETED else Tuning(), **tuning),
        )
        super().__init__(site, self._buffer.most_rows, site.fp8)
        self._buffer.connect(dict(enumerate(site.gather(self._buffer.address))))
        site.gather(None)
        self._buffer.set_active(range(work.ranks), 1)
        self._buffer.barrier(timeout_s=site.timeout_s)
        self._received: CudaReceived | None = None

    def dispatch(self, turn: int) -> None:
        i = self._site.pool[turn]
        self._received = self._buffer.dispatch(
            i.x, i.expert_ids, i.weights, self._table, fp8=self._fp8
        )
        self._indexed = self._received.indexed

    def combine(self, turn: int) -> torch.Tensor:
        assert self._received is not None
        return self._buffer.combine(self._y[turn], self._received, out=self._out)

    def close(self) -> None:
        self._buffer.check()
        self._site.gather(None)
        self._buffer.close()
        self._site.gather(None)  # nobody has the others' windows mapped any more


def _nvidias() -> Any:
    """Raises: Unavailable: NVIDIA's package cannot be used here."""
    if not torch.cuda.is_available():
        raise Unavailable("nixl_ep needs a GPU")
    try:
        return find().module
    except CommError as error:
        raise Unavailable(str(error)) from None


class NixlEp:
    """NVIDIA's nixl_ep, low-latency kernels; or `module` with the same interface."""

    def __init__(self, site: GpuSite, module: str = "") -> None:
        nixl_ep: Any = importlib.import_module(module) if module else _nvidias()
        work = site.work
        if work.torch_dtype is not torch.bfloat16 or site.fp8 not in (None, "float32"):
            raise Unavailable("nixl_ep is measured with bfloat16 and float32 scales")
        self._site, self._fp8 = site, site.fp8 is not None
        self._ids = [i.expert_ids.to(nixl_ep.topk_idx_t) for i in site.pool]
        self._buffer = nixl_ep.Buffer(
            rank=site.rank,
            tcp_store_group=site.store,
            explicitly_destroy=True,
            timeout_ms=int(site.timeout_s * 1e3),
        )
        self._most = align(work.tokens, 4)  # it takes no other numbers
        size = nixl_ep.Buffer.get_rdma_size_hint(
            self._most, work.hidden, work.ranks, work.slots * work.ranks
        )
        self._buffer.update_memory_buffers(work.ranks, work.slots, size)
        self._out = torch.empty(
            (work.tokens, work.hidden), dtype=torch.bfloat16, device=site.device
        )
        # alone first: a kernel is loaded at its first launch, and that would wait for a peer that
        # is waiting already
        self._buffer.connect_ranks([site.rank])
        self._y = [
            torch.zeros(
                (work.slots, (site.rank + 1) * self._most, work.hidden),
                device=site.device,
                dtype=torch.bfloat16,
            )
        ]
        ids, self._ids = self._ids, [torch.full_like(ids, -1) for ids in self._ids]
        self.dispatch(0)
        self.combine(0)
        torch.cuda.synchronize()
        self._ids = ids
        site.gather(None)
        self._buffer.connect_ranks(list(range(work.ranks)))
        site.gather(None)
        shape = (work.slots, work.ranks * self._most, work.hidden)
        self._y = [torch.randn(shape, device=site.device, dtype=torch.bfloat16) for _ in site.pool]
        self._last: tuple[Any, Any, Any] | None = None

    def dispatch(self, turn: int) -> None:
        i = self._site.pool[turn]
        got, counts, handle, _, _ = self._buffer.dispatch(
            i.x, self._ids[turn], self._most, use_fp8=self._fp8
        )
        self._last = (got, counts, handle)

    def combine(self, turn: int) -> torch.Tensor:
        assert self._last is not None
        i = self._site.pool[turn]
        out, _, _ = self._buffer.combine(
            self._y[turn], self._ids[turn], i.weights, self._last[2], out=self._out
        )
        result: torch.Tensor = out
        return result

    def _order(self) -> list[tuple[int, torch.Tensor]]:
        """For each slot, its rows by source and token."""
        assert self._last is not None
        _, counts, (token_of, ranges, _, _) = self._last
        order = []
        for slot, count in enumerate(counts.tolist()):
            key = torch.full((count,), -1, dtype=torch.int64)
            for source, both in enumerate(ranges[slot].tolist()):
                begin, many = both >> 32, both & 0xFFFFFFFF
                key[begin : begin + many] = source << 32
            key += token_of[slot, :count].cpu().long()
            order.append((slot, key.argsort()))
        return order

    def rows(self) -> torch.Tensor:
        assert self._last is not None
        got = self._last[0]
        parts = []
        for slot, order in self._order():
            at = order.to(self._site.device)
            if self._fp8:
                q, scales = got[0][slot][at], got[1][slot][at]
                parts.append(dequantise(q, scales.contiguous(), torch.bfloat16))
            else:
                parts.append(got[slot][at])
        return torch.cat(parts)

    def put_results(self, turn: int, y: torch.Tensor) -> None:
        begin = 0
        for slot, order in self._order():
            at = order.to(self._site.device)
            self._y[turn][slot, at] = y[begin : begin + len(order)]
            begin += len(order)

    def close(self) -> None:
        torch.cuda.synchronize()
        self._site.gather(None)
        self._buffer.destroy()


class TorchLocal:
    """torch on one rank: the rows of each expert copied together, and the weighted sums."""

    def __init__(self, site: GpuSite) -> None:
        if site.work.ranks > 1:
            raise Unavailable("for several ranks there is nccl")
        self._site = site
        work = site.work
        shape = (work.tokens * work.topk, work.hidden)
        self._y = [torch.randn(shape, device=site.device).to(work.torch_dtype) for _ in site.pool]
        self._slots = torch.arange(work.slots + 1, device=site.device)
        self._x = self._order = self._offsets = torch.empty(0)

    def dispatch(self, turn: int) -> None:
        i = self._site.pool[turn]
        experts, self._order = i.expert_ids.flatten().sort(stable=True)
        self._x = i.x[self._order // self._site.work.topk]
        self._offsets = torch.searchsorted(experts, self._slots)

    def combine(self, turn: int) -> torch.Tensor:
        return weighted_sums(self._y[turn], self._order, self._site.pool[turn], self._site.work)

    def rows(self) -> torch.Tensor:
        return self._x

    def put_results(self, turn: int, y: torch.Tensor) -> None:
        self._y[turn].copy_(y)

    def close(self) -> None:
        pass


def inverse(order: torch.Tensor) -> torch.Tensor:
    """[n] int64: where each of a permutation's entries has gone."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    return place


def weighted_sums(y: torch.Tensor, order: torch.Tensor, i: Input, work: Workload) -> torch.Tensor:
    """[tokens, hidden], summed in float32. y: [pairs, hidden], the order-th pair each."""
    rows = y[inverse(order)].view(work.tokens, work.topk, work.hidden)
    return (rows.float() * i.weights[..., None]).sum(1).to(work.torch_dtype)


class TorchCollectives:
    """all_to_all_single of one row a (token, expert), by NCCL (gloo on a CPU).

    How many rows each rank has for each other is known before the first exchange, which no
    exchange of a model knows: a host that waits for that is not timed.
    """

    def __init__(self, site: GpuSite) -> None:
        work = site.work
        if work.ranks == 1:
            raise Unavailable("one rank has nobody to send to")
        cuda = site.device.type == "cuda"
        if cuda and torch.cuda.device_count() < work.ranks:
            raise Unavailable("NCCL needs a GPU for each rank")
        self._group = _nccl(site) if cuda else _gloo(site)
        self._site = site
        owner = expert_table(work).rank.to(site.device)
        self._owned = torch.arange(work.slots + 1, device=site.device) + site.rank * work.slots
        self._sent, self._come = list[list[int]](), list[list[int]]()
        for i in site.pool:
            to = torch.bincount(owner[i.expert_ids.flatten()], minlength=work.ranks).tolist()
            self._sent.append(to)
            self._come.append([counts[site.rank] for counts in site.gather(to)])
        self._y = [
            torch.randn((sum(come), work.hidden), device=site.device).to(work.torch_dtype)
            for come in self._come
        ]
        self._x = self._order = self._by_slot = self._offsets = torch.empty(0)

    def dispatch(self, turn: int) -> None:
        i, sent, come = self._site.pool[turn], self._sent[turn], self._come[turn]
        experts, self._order = i.expert_ids.flatten().sort(stable=True)
        rows = i.x[self._order // self._site.work.topk]
        got = rows.new_empty((sum(come), rows.shape[1]))
        self._all_to_all(got, rows, come, sent)
        got_experts = experts.new_empty(sum(come))
        self._all_to_all(got_experts, experts, come, sent)
        here, self._by_slot = got_experts.sort(stable=True)
        self._x = got[self._by_slot]
        self._offsets = torch.searchsorted(here, self._owned)

    def combine(self, turn: int) -> torch.Tensor:
        back = self._y[turn][inverse(self._by_slot)]
        y = back.new_empty((sum(self._sent[turn]), back.shape[1]))
        self._all_to_all(y, back, self._sent[turn], self._come[turn])
        return weighted_sums(y, self._order, self._site.pool[turn], self._site.work)

    def rows(self) -> torch.Tensor:
        return self._x

    def put_results(self, turn: int, y: torch.Tensor) -> None:
        self._y[turn].copy_(y)

    def close(self) -> None:
        if self._site.device.type == "cuda":
            torch.cuda.synchronize()
        self._site.gather(None)
        self._group.shutdown()

    def _all_to_all(
        self, got: torch.Tensor, given: torch.Tensor, come: list[int], sent: list[int]
    ) -> None:
        self._group.alltoall_base(got, given, come, sent).wait()


def _nccl(site: GpuSite) -> Any:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast, which takes no part in this
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")  # a thread that asks the store
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=site.timeout_s)
    store = dist.PrefixStore("nccl", site.store)  # type: ignore[attr-defined]
    group = dist.ProcessGroupNCCL(store, site.rank, site.work.ranks, options)
    group.eager_connect_single_device(site.device)
    return group


def _gloo(site: GpuSite) -> Any:
    limit = timedelta(seconds=site.timeout_s)
    store = dist.PrefixStore("gloo", site.store)  # type: ignore[attr-defined]
    return dist.ProcessGroupGloo(store, site.rank, site.work.ranks, limit)


@dataclass(frozen=True, slots=True)
class GpuKind:
    """One row of the table; see `baseline.Kind`."""

    name: str
    family: str
    make: Callable[[GpuSite], GpuBaseline]
    time: str
    exact: bool


OURS = "flexpert"
NIXL_EP = "nixl_ep"
INTERFACE = "flexpert as nixl_ep"


def eager_kinds(fp8: Scales | None) -> tuple[GpuKind, ...]:
    """What is launched without a graph. fp8: as in `gpu_kinds`."""
    captured = {kind.name: kind for kind in gpu_kinds(fp8)}
    ours = replace(captured[OURS], make=CudaBufferBaseline)
    return (
        ours,
        replace(
            ours,
            name="flexpert, Triton's launches",
            family="launches",
            make=lambda site: CudaBufferBaseline(site, prepared=False),
            time="the same with each kernel launched by Triton: what prepared launches save",
        ),
        replace(
            ours,
            name="flexpert, kernel by kernel",
            family="launches",
            make=lambda site: CudaBufferBaseline(site, at_once=False),
            time="the same with a launch of the driver for each kernel: what graphs of them save",
        ),
        captured[INTERFACE],
        captured[NIXL_EP],
    )


def gpu_kinds(fp8: Scales | None) -> tuple[GpuKind, ...]:
    """fp8: of the dispatch; None: rows in the dtype of the workload."""
    sent = "fp8 on the way" if fp8 else "rows as they are"
    return (
        GpuKind(
            OURS,
            "ours",
            CudaExchangeBaseline,
            f"{sent}, flags, index by expert; partial sums back",
            not fp8,
        ),
        GpuKind(
            "flexpert, no checks",
            "checks",
            lambda site: CudaExchangeBaseline(site, checks=False),
            "the same without reading masks and epochs: what these cost",
            not fp8,
        ),
        GpuKind(
            INTERFACE,
            "interface",
            lambda site: NixlEp(site, "flexpert.compat.nixl_ep"),
            f"our buffer behind nixl_ep's interface: {sent}, then copied together by expert; "
            "weights, then partial sums back",
            not fp8,
        ),
        GpuKind(NIXL_EP, "nixl_ep", NixlEp, f"{sent}, one row an expert there and back", not fp8),
        GpuKind(
            "torch",
            "torch",
            TorchLocal,
            "sort, gather by expert (no fp8); gather and weighted sum in float32",
            True,
        ),
        GpuKind(
            "NCCL all-to-all",
            "nccl",
            TorchCollectives,
            "sort, gather, all_to_all_single of one row a (token, expert) (no fp8), whose sizes "
            "are known before; the same back, weighted sum in float32",
            True,
        ),
    )
