"""One rank's exchange on its GPU: the tensors the kernels work on, and their launches.

Everything here can be captured into a CUDA graph: launches have fixed arguments, what changes lies
in the table. `CudaBuffer` adds what concerns other processes and the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import triton

from flexpert.comm import quant
from flexpert.comm.buffer import BufferSpec, ExpertTable, Reduce, Scales
from flexpert.comm.cuda import combine_kernels as combine
from flexpert.comm.cuda import dispatch_kernels as dispatch
from flexpert.comm.cuda import lane_kernels as lanes
from flexpert.comm.cuda import wait_kernels as waiting
from flexpert.comm.cuda.cuda_layout import (
    HOST_WORDS,
    LANES,
    SIM_NS,
    TABLE_WORDS,
    Page,
    Word,
    check,
    combine_format,
    dispatch_format,
    fp8_kind,
    layout,
    scale_bytes,
)
from flexpert.comm.interpreter import INTERPRETED

_FOREVER_NS = 2**62
_WEIGHTS_CHUNK = 2048  # weights that share_weights writes in one go
_SIM_POLLS = 3  # the limit in Triton's interpreter, where a kernel of one process waits for none


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the kernels are launched; found by measuring on an H100, see docs/performance.md.

    send_width: elements of a row that one program of dispatch sends.
    width: elements of a row that one program of combine sums.
    workers: programs of send_combine, at most.
    reducers: programs of reduce, at most.
    chunk: slots that one program of index_rows looks at in one go.
    pack_width: words of 4 bytes of a row that one program of pack_rows copies. Not measured yet,
        nor the other two.
    packers: programs of pack_rows that copy, at most.
    takers: programs that take what came from other machines; take_width: words of 4 bytes that one
        copies at once.
    checks: read masks and epochs; False only to measure what they cost.

    In Triton's interpreter, where a program takes a millisecond, the default is `FEW`.
    """

    send_width: int = 8192
    send_warps: int = 16
    index_warps: int = 16
    width: int = 1024
    combine_warps: int = 4
    workers: int = 528
    reducers: int = 4096
    chunk: int = 2048
    pack_width: int = 1024
    pack_warps: int = 4
    packers: int = 1056
    takers: int = 64
    take_width: int = 2048
    take_warps: int = 8
    checks: bool = True


FEW = Tuning(workers=4, reducers=8, packers=4, takers=2)


@dataclass(frozen=True, slots=True)
class CudaIndexed:
    """Where the rows of the last dispatch lie. Static tensors: each replay fills them anew.

    Rows are (token, local expert) pairs, by slot, then source rank, token and choice.

    offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1.
    rows: [most rows] int32: row of `payload` for each; places beyond offsets[-1] hold nothing.
    pairs: [most rows] int32: source · max_tokens · topk + token · topk + choice.
    payload: [capacity · max_tokens, n]: where tokens arrived: hidden in spec.dtype or
        float8_e4m3fn, or bytes.
    scales: [capacity · max_tokens, hidden / 128] float32, or [.., hidden / 512] int32, or None.
    weights: [capacity · max_tokens · topk] float32, by pair.
    """

    offsets: torch.Tensor
    rows: torch.Tensor
    pairs: torch.Tensor
    payload: torch.Tensor
    scales: torch.Tensor | None
    weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class CudaDispatched:
    """What a dispatch was called with, for its combine.

    stride: by how many choices two tokens are apart; see `CudaExchange`.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    table: ExpertTable
    tokens: int
    payload: str
    indexed: CudaIndexed
    stride: int


class CudaExchange:
    """The kernels of one rank over a window that peers can write.

    window: [size of layout] uint8 on the device, zeroed.
    page: [PAGE_WORDS] int64 in pinned host memory (or host memory, in the interpreter).
    choices: see `layout`; "home" takes tokens of at most so many.
    same_k: all ranks dispatch with the same k, idle ones too: choices are packed by it, and the
        kernels look at no others. Else there is room for `spec.topk` of each token.
    several_machines: peers may be on other machines, whose rows are taken out of the host's memory.
    """

    def __init__(
        self,
        rank: int,
        spec: BufferSpec,
        window: torch.Tensor,
        page: torch.Tensor,
        *,
        choices: int | None = None,
        same_k: bool = False,
        several_machines: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        check(spec)
        self.rank, self.spec, self.window, self.page = rank, spec, window, page
        self.tuning = tuning or (FEW if INTERPRETED else Tuning())
        self.layout = layout(spec, choices=choices)
        self.choices = min(choices or spec.topk, spec.topk)
        self._same_k = same_k
        self._far = several_machines
        device = window.device
        self.table = torch.zeros(TABLE_WORDS, dtype=torch.int64, device=device)
        # rewritten as one piece; what it is copied from must stay as it is until the copy is done
        self._host = torch.zeros(HOST_WORDS, dtype=torch.int64, device="cpu")
        if device.type == "cuda":
            self._host = self._host.pin_memory()
        self._counters = torch.zeros((LANES, LANES), dtype=torch.int32, device=device)
        places = spec.capacity * spec.max_tokens
        self.most_rows = places * spec.topk
        self.rows = torch.zeros(self.most_rows, dtype=torch.int32, device=device)
        self.pairs = torch.zeros_like(self.rows)
        self.position = torch.full_like(self.rows, -1)
        self._offsets: dict[int, torch.Tensor] = {}
        at = self.layout.weights_at
        self.weights = window[at : at + self.most_rows * 4].view(torch.float32)
        self._lanes = triton.next_power_of_2(spec.capacity)
        self._sim = INTERPRETED

    # ---- what the host rewrites ---------------------------------------------------------------

    def configure(
        self,
        peers: Mapping[int, int],
        tags: Mapping[int, int],
        *,
        inboxes: Mapping[int, int] = MappingProxyType({}),
        limit_ns: int = _FOREVER_NS,
        elsewhere: bool = False,
        restart: tuple[int, ...] | None = None,
        ended: Mapping[int, int] | None = None,
    ) -> None:
        """Write membership into the table, in the order of the current stream.

        Args:
            peers: id → address of the window of every connected rank, own id included.
            tags: id → what flags of the link carry, of those that take part; own id among them.
            inboxes: id on another machine, whose address is that of a mirror → where what it sends
                comes.
            limit_ns: of every wait.
            elsewhere: a peer is another process; only the interpreter needs to know.
            restart: ids whose numbering begins anew; None: all.
            ended: id → tag of a link that broke: what is launched after this waits until the peer
                has called `release` for it, or is left out.
        """
        if self._host.is_pinned():
            torch.cuda.current_stream(self.window.device).synchronize()
        host = self._host
        host.zero_()
        for peer, address in peers.items():
            host[Word.PEER + peer] = address
            host[Word.LANE + peer] = 0 if peer in inboxes else self.rank
            host[Word.INBOX + peer] = inboxes.get(peer, self.window.data_ptr())
        for peer, tag in tags.items():
            host[Word.ACTIVE + peer] = 1
            host[Word.TAG + peer] = tag
        for peer, tag in (ended or {}).items():
            host[Word.ENDED + peer] = tag
        looks = limit_ns // SIM_NS if elsewhere else _SIM_POLLS
        host[Word.LIMIT] = looks if self._sim else limit_ns
        host[Word.LIMIT + 1] = self.page.data_ptr()
        self.table[:HOST_WORDS].copy_(host, non_blocking=True)
        if restart is None:
            self.table[HOST_WORDS:].zero_()
            self._counters.zero_()
        else:
            for peer in restart:
                self.table[Word.SEQUENCE + peer] = 0
                self.table[Word.MEETINGS + peer] = 0
        self.page[Page.REPORT : Page.REPORT + LANES] = 0
        if ended:
            waiting.await_release[(1,)](
                self.table, self.window.data_ptr(), SIM=self._sim, num_warps=1
            )

    def release(self, ids: Iterable[int]) -> None:
        """Tell peers that this rank reads nothing more of what they sent over the links that the
        table has; before `configure` changes them."""
        bits = sum(1 << peer for peer in ids)
        if bits:
            waiting.release[(1,)](self.table, bits, self.rank, num_warps=1)

    @property
    def exchanges(self) -> int:
        """How many there were since all numbering began anew; waits for the device."""
        return int(self.table[Word.SEQUENCE + self.rank])

    def waited(self, word: Literal[Word.WAITED_DISPATCH, Word.WAITED_COMBINE]) -> torch.Tensor:
        """[capacity] int64, a copy: nanoseconds for each peer, of all exchanges so far."""
        return self.table[word : word + self.spec.capacity].clone()

    # ---- launches -----------------------------------------------------------------------------

    def send_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
        wait: bool,
    ) -> CudaDispatched:
        """The sending half; with `wait` the peers' flags are waited for in the same launch.

        x: [tokens, hidden] spec.dtype, or uint8 [tokens, n]; expert_ids: [tokens, k] int32 or
        int64; weights: [tokens, k] float32; table on the same device.
        """
        spec, where, tuning = self.spec, self.layout, self.tuning
        tokens, k = expert_ids.shape
        stride = max(k, 1) if self._same_k else spec.topk
        indexed = self._indexed(x, table.slots, fp8)
        words = x
        if fp8 is None:
            row = x.shape[1] * x.itemsize
            unit = torch.int32 if row % 4 == 0 else torch.uint8
            words = x.view(unit)
        tile = min(tuning.send_width, max(quant.BLOCK, triton.next_power_of_2(words.shape[1])))
        dispatch.send_dispatch[(max(tokens, 1) * triton.cdiv(words.shape[1], tile) + wait,)](
            words, expert_ids, weights, table.rank, table.slot, self.table, self._counters,
            self.window.data_ptr(), tokens, self.rank, table.rank.shape[0],
            R=spec.capacity, LANES_R=self._lanes, K=k, TOPK=stride,
            LANES_K=triton.next_power_of_2(stride),
            MAX_TOKENS=spec.max_tokens, KIND=fp8_kind(fp8), WORDS=words.shape[1],
            TILE=tile,
            WEIGHTS_AT=where.weights_at, SCALES_AT=where.scales_at, ROWS_AT=where.rows_at,
            FORMAT=dispatch_format(stride, x.shape[1] * (x.itemsize if fp8 is None else 1), fp8),
            WAIT=wait, CHECKS=tuning.checks, SIM=self._sim, num_warps=tuning.send_warps,
        )  # fmt: skip
        return CudaDispatched(
            expert_ids, weights, table, tokens, str(fp8 or x.dtype), indexed, stride
        )

    def wait_dispatch(self, sent: CudaDispatched) -> None:
        dispatch.wait_dispatch[(1,)](
            self.table, self.window.data_ptr(), sent.tokens, self.rank,
            R=self.spec.capacity, CHECKS=self.tuning.checks, SIM=self._sim, num_warps=1,
        )  # fmt: skip

    def index(self, sent: CudaDispatched) -> CudaIndexed:
        """What came, by slot; the exchange has its number from here on."""
        spec = self.spec
        if self._far:
            self._take_dispatch(sent)
        chunk = min(triton.next_power_of_2(self.most_rows), self.tuning.chunk)
        dispatch.index_rows[(sent.table.slots + 1,)](
            self.window.data_ptr(), self.table, sent.indexed.offsets, self.rows, self.pairs,
            self.position, sent.table.slots,
            R=spec.capacity, LANES_R=self._lanes, TOPK=sent.stride, MAX_TOKENS=spec.max_tokens,
            CHUNK=chunk, num_warps=self.tuning.index_warps,
        )  # fmt: skip
        return sent.indexed

    def _take_dispatch(self, sent: CudaDispatched) -> None:
        spec, where, tuning = self.spec, self.layout, self.tuning
        row, scales = sent.indexed.payload, sent.indexed.scales
        size = row.shape[1] * row.itemsize
        whole = size % 4 == 0
        words = size // 4 if whole else size
        of_scales = 0 if scales is None else scales.shape[1] * scales.itemsize // 4
        lanes.take_dispatch[(tuning.takers,)](
            self.table, self.window.data_ptr(),
            R=spec.capacity, TOPK=sent.stride, LANES_K=triton.next_power_of_2(sent.stride),
            MAX_TOKENS=spec.max_tokens, WORDS=words, BYTES=not whole,
            TILE=min(tuning.take_width, triton.next_power_of_2(max(words, 1))), SCALES=of_scales,
            SCALES_TILE=triton.next_power_of_2(max(of_scales, 1)),
            WEIGHTS_AT=where.weights_at, SCALES_AT=where.scales_at, ROWS_AT=where.rows_at,
            num_warps=tuning.take_warps,
        )  # fmt: skip

    def _take_combine(self, sent: CudaDispatched, *, reduce: Reduce, shared: bool) -> None:
        spec, tuning = self.spec, self.tuning
        words = spec.hidden * spec.dtype.itemsize // 4
        lanes.take_combine[(tuning.takers,)](
            sent.expert_ids, sent.table.rank, self.table, self.window.data_ptr(), sent.tokens,
            sent.table.rank.shape[0],
            R=spec.capacity, K=sent.expert_ids.shape[1], TOPK=sent.stride,
            LANES_K=triton.next_power_of_2(sent.stride), MAX_TOKENS=spec.max_tokens, WORDS=words,
            TILE=min(tuning.take_width, triton.next_power_of_2(words)),
            RESULTS_AT=self.layout.results_at, HOME=reduce == "home", SHARED=shared,
            SOURCE=self._source(sent, shared), num_warps=tuning.take_warps,
        )  # fmt: skip

    def send_combine(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        sent: CudaDispatched,
        *,
        reduce: Reduce,
        wait: bool,
        places: torch.Tensor | None = None,
        shared: bool = False,
    ) -> None:
        """y: [rows, hidden] spec.dtype, in the order of `CudaIndexed.rows`, or with `places` (see
        expert_major.py) as these say; out: see `reduce`. shared: the weights are those of
        `share_weights`, which has been waited for if reduce is "rank"; y is not read afterwards."""
        spec, tuning = self.spec, self.tuning
        pieces = triton.cdiv(spec.hidden, tuning.width)
        most = spec.capacity * spec.max_tokens * pieces
        combine.send_combine[(min(most, tuning.workers) + wait,)](
            out, y, self.position if places is None else places, sent.expert_ids,
            sent.table.rank, self.table, self._counters,
            self.window.data_ptr(), sent.tokens, self.rank, sent.table.rank.shape[0],
            R=spec.capacity, K=sent.expert_ids.shape[1], TOPK=sent.stride,
            LANES_K=triton.next_power_of_2(sent.stride), MAX_TOKENS=spec.max_tokens, H=spec.hidden,
            WIDTH=tuning.width, WEIGHTS_AT=self.layout.weights_at,
            RESULTS_AT=self.layout.results_at, HOME=reduce == "home",
            SHARED=shared, SOURCE=self._source(sent, shared),
            FORMAT=combine_format(sent.stride, home=reduce == "home"), WAIT=wait,
            CHECKS=tuning.checks, SIM=self._sim, num_warps=tuning.combine_warps,
            enable_fp_fusion=False,
        )  # fmt: skip

    def share_weights(
        self, weights: torch.Tensor, sent: CudaDispatched, *, send: bool = True, wait: bool = True
    ) -> None:
        """Before a combine whose weights are not those of the dispatch: tell all peers the own
        ones, and wait for theirs. Every rank must send, whatever its `reduce`.

        weights: [tokens, k] float32; an expert that is -1 in `sent` counts with 0.
        """
        spec, k = self.spec, sent.expert_ids.shape[1]
        chunk = min(triton.next_power_of_2(max(spec.max_tokens * k, 1)), _WEIGHTS_CHUNK)
        combine.share_weights[(1,)](
            weights, sent.expert_ids, self.table, self.window.data_ptr(), sent.tokens, self.rank,
            R=spec.capacity, K=k, TOPK=sent.stride, MAX_TOKENS=spec.max_tokens,
            WEIGHTS_AT=self.layout.weights_at, CHUNK=chunk, SEND=send, WAIT=wait,
            CHECKS=self.tuning.checks, SIM=self._sim, num_warps=8,
        )  # fmt: skip
        if wait and self._far:
            lanes.take_weights[(self.tuning.takers,)](
                self.table, self.window.data_ptr(),
                R=spec.capacity, TOPK=sent.stride, MAX_TOKENS=spec.max_tokens,
                WEIGHTS_AT=self.layout.weights_at, CHUNK=1024,
            )  # fmt: skip

    def wait_combine(self) -> None:
        combine.wait_combine[(1,)](
            self.table, self.window.data_ptr(), self.rank,
            R=self.spec.capacity, CHECKS=self.tuning.checks, SIM=self._sim, num_warps=1,
        )  # fmt: skip

    def reduce(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        sent: CudaDispatched,
        *,
        reduce: Reduce,
        weights: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        shared: bool = False,
    ) -> torch.Tensor:
        """out: [tokens, hidden] spec.dtype ← the sums of the own tokens; returned."""
        spec, tuning = self.spec, self.tuning
        if self._far:
            self._take_combine(sent, reduce=reduce, shared=shared)
        pieces = triton.cdiv(spec.hidden, tuning.width)
        combine.reduce[(max(1, min(sent.tokens * pieces, tuning.reducers)),)](
            out, y, self.position if places is None else places, sent.expert_ids,
            sent.weights if weights is None else weights,
            sent.table.rank, self.table, self.window.data_ptr(), sent.tokens, self.rank,
            sent.table.rank.shape[0],
            R=spec.capacity, K=sent.expert_ids.shape[1], TOPK=sent.stride,
            LANES_K=triton.next_power_of_2(sent.stride), MAX_TOKENS=spec.max_tokens, H=spec.hidden,
            WIDTH=tuning.width, RESULTS_AT=self.layout.results_at, HOME=reduce == "home",
            SHARED=shared, SOURCE=self._source(sent, shared),
            num_warps=tuning.combine_warps, enable_fp_fusion=False,
        )  # fmt: skip
        return out

    def meet(self, *, send: bool = True, wait: bool = True) -> None:
        """A barrier on the device of all active ranks."""
        waiting.meet[(1,)](
            self.table, self.window.data_ptr(), self.rank,
            SEND=send, WAIT=wait, SIM=self._sim, num_warps=1,
        )  # fmt: skip

    # ---- whole phases -------------------------------------------------------------------------

    def dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
    ) -> CudaDispatched:
        """Send, wait and index: two launches."""
        sent = self.send_dispatch(x, expert_ids, weights, table, fp8=fp8, wait=True)
        self.index(sent)
        return sent

    def combine(
        self,
        y: torch.Tensor,
        sent: CudaDispatched,
        out: torch.Tensor,
        *,
        reduce: Reduce = "rank",
        weights: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        shared: bool = False,
    ) -> torch.Tensor:
        """Send, wait and sum: two launches, or one where there is nobody else; and one before
        where weights are shared."""
        alone = self.spec.capacity == 1 and reduce == "rank"
        if shared:
            assert weights is not None
            self.share_weights(weights, sent)
        self.send_combine(out, y, sent, reduce=reduce, wait=not alone, places=places, shared=shared)
        if not alone:
            self.reduce(out, y, sent, reduce=reduce, weights=weights, places=places, shared=shared)
        return out

    def _source(self, sent: CudaDispatched, shared: bool) -> int:
        """Rows between the partial sums of two ranks; where a rank may also send rows of choices,
        these have the same begin."""
        return self.spec.max_tokens * (min(sent.stride, self.choices) if shared else 1)

    # ---- views --------------------------------------------------------------------------------

    def _indexed(self, x: torch.Tensor, slots: int, fp8: Scales | None) -> CudaIndexed:
        spec, where = self.spec, self.layout
        places = spec.capacity * spec.max_tokens
        if slots not in self._offsets:
            self._offsets[slots] = torch.zeros(
                slots + 1, dtype=torch.int32, device=self.window.device
            )
        dtype = x.dtype if fp8 is None else torch.float8_e4m3fn
        row = x.shape[1] * dtype.itemsize
        raw = self.window[where.rows_at : where.rows_at + places * row]
        scales: torch.Tensor | None = None
        if fp8 is not None:
            size = scale_bytes(spec.hidden, fp8)
            packed = self.window[where.scales_at : where.scales_at + places * size]
            kind = torch.int32 if fp8 == "ue8m0" else torch.float32
            scales = packed.view(kind).view(places, -1)
        return CudaIndexed(
            self._offsets[slots],
            self.rows,
            self.pairs,
            raw.view(dtype).view(places, -1),
            scales,
            self.weights,
        )
