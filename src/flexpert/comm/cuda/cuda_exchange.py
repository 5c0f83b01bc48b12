"""One rank's exchange on its GPU: the tensors the kernels work on, and their launches.

Everything here can be captured into a CUDA graph: launches have fixed arguments, what changes lies
in the table. `CudaBuffer` adds what concerns other processes and the host.

What launches of one kind have in common is found once and kept (kernel_launch.py): a dispatch and a
combine make no tensors, and ask nothing of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

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
from flexpert.comm.cuda.kernel_launch import (
    ROWS,
    TOKENS,
    KernelLaunch,
    LaunchStep,
    launch_at_once,
    make_call,
)
from flexpert.comm.interpreter import INTERPRETED

if TYPE_CHECKING:
    from flexpert.comm.cuda._launches import Call

Part = Literal["whole", "send", "receive"]  # of a combine

_FOREVER_NS = 2**62
_WAIT_DISPATCH, _WAIT_COMBINE = "wait_dispatch", "wait_combine"  # kinds of launches
_SEND_COMBINE, _REDUCE, _SHARE_WEIGHTS = "send_combine", "reduce", "share_weights"
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
    prepared: launches of a kind share what the first found out; False only to measure what that
        saves.
    at_once: kernels of a phase outside of a CUDA graph are launched as one; False only to measure
        what that saves.

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
    prepared: bool = True
    at_once: bool = True


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


@dataclass(frozen=True, slots=True, eq=False)
class DispatchKind:
    """What dispatches of one kind have in common.

    send, index: their launches. waits: `send` waits for the peers, too.
    k: choices of a token. stride: by how many two tokens are apart; see `CudaExchange`.
    """

    send: LaunchStep
    waits: bool
    index: LaunchStep
    indexed: CudaIndexed
    k: int
    stride: int


@dataclass(slots=True, eq=False)
class ExchangeCalls:
    """Exchanges with one table whose phases are one call of C each; see `Call.run`.

    dispatch: of `CudaExchange.dispatch_call`; receive: of `receive_call`, if that is a half.
    combine: of `combine_call`, by `reduce`, whether there are no weights, expert_ids and places,
    and the part. made: how many of these were, replaced ones included.
    """

    table: ExpertTable
    kind: DispatchKind
    dispatch: Callable[..., int]
    receive: Callable[..., int] | None
    combine: dict[tuple[Reduce, bool, bool, bool, Part], Callable[..., int]]
    made: int = 0


@dataclass(slots=True, eq=False)
class CudaDispatched:
    """What a dispatch was called with, for its combine. calls: that it may take."""

    expert_ids: torch.Tensor
    weights: torch.Tensor
    table: ExpertTable
    tokens: int
    kind: DispatchKind
    calls: ExchangeCalls | None = None

    @property
    def indexed(self) -> CudaIndexed:
        return self.kind.indexed

    @property
    def stride(self) -> int:
        """See `DispatchKind`."""
        return self.kind.stride

    @property
    def ids(self) -> torch.dtype:
        """Of expert_ids."""
        return self.expert_ids.dtype

    def with_ids(self, expert_ids: torch.Tensor) -> CudaDispatched:
        """The same dispatch with other choices of its tokens."""
        return CudaDispatched(
            expert_ids, self.weights, self.table, self.tokens, self.kind, self.calls
        )


def _known(sent: CudaDispatched) -> dict[str, Any]:
    """What launches of a dispatch and its combine are told, by the names that kernels have."""
    table = sent.table
    return {
        "expert_ids": sent.expert_ids,
        "owner": table.rank,
        "slot": table.slot,
        "tokens": sent.tokens,
        "experts": table.experts,
    }


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
        self._pieces = triton.cdiv(spec.hidden, self.tuning.width)  # programs that sum a row
        self._senders = min(places * self._pieces, self.tuning.workers)
        self._kinds: dict[tuple[object, ...], DispatchKind] = {}
        self._steps: dict[tuple[object, ...], LaunchStep] = {}

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

    def kind_of(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        slots: int,
        fp8: Scales | None,
        *,
        wait: bool,
    ) -> DispatchKind:
        """Of dispatches with such arguments, of any number of tokens. slots: of their table."""
        k = expert_ids.shape[1]
        key = (x.dtype, x.shape[1], expert_ids.dtype, k, slots, fp8, wait)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = self._new_kind(x, k, slots, fp8, wait)
        return kind

    def send_dispatch(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        table: ExpertTable,
        *,
        fp8: Scales | None = None,
        wait: bool,
        kind: DispatchKind | None = None,
    ) -> CudaDispatched:
        """The sending half; with `wait` the peers' flags are waited for in the same launch.

        x: [tokens, hidden] spec.dtype, or uint8 [tokens, n]; expert_ids: [tokens, k] int32 or
        int64; weights: [tokens, k] float32; table on the same device; all contiguous. kind: of
        `kind_of`, where the caller has it.
        """
        if kind is None:
            kind = self.kind_of(x, expert_ids, table.slots, fp8, wait=wait)
        sent = CudaDispatched(expert_ids, weights, table, expert_ids.shape[0], kind)
        kind.send.start({"x": x, "weights": weights} | _known(sent), sent.tokens)
        return sent

    def wait_dispatch(self, sent: CudaDispatched) -> None:
        self._wait_dispatch().start({"tokens": sent.tokens})

    def _wait_dispatch(self) -> LaunchStep:
        return self._steps.get((_WAIT_DISPATCH,)) or self._one(
            (_WAIT_DISPATCH,), dispatch.wait_dispatch, self._waits(), num_warps=1
        )

    def index(self, sent: CudaDispatched) -> CudaIndexed:
        """What came, by slot; the exchange has its number from here on."""
        for step in self._index_steps(sent):
            step.start({})
        return sent.kind.indexed

    def _index_steps(self, sent: CudaDispatched) -> list[LaunchStep]:
        return [*([self._take_dispatch(sent)] if self._far else ()), sent.kind.index]

    def _take_dispatch(self, sent: CudaDispatched) -> LaunchStep:
        key = ("take_dispatch", sent.kind)
        step = self._steps.get(key)
        if step is None:
            spec, where, tuning = self.spec, self.layout, self.tuning
            row, scales = sent.indexed.payload, sent.indexed.scales
            size = row.shape[1] * row.itemsize
            whole = size % 4 == 0
            words = size // 4 if whole else size
            of_scales = 0 if scales is None else scales.shape[1] * scales.itemsize // 4
            fixed = (
                self._here()
                | self._choices(sent.stride)
                | {
                    "WORDS": words,
                    "BYTES": not whole,
                    "TILE": min(tuning.take_width, triton.next_power_of_2(max(words, 1))),
                    "SCALES": of_scales,
                    "SCALES_TILE": triton.next_power_of_2(max(of_scales, 1)),
                    "WEIGHTS_AT": where.weights_at,
                    "SCALES_AT": where.scales_at,
                    "ROWS_AT": where.rows_at,
                    "R": spec.capacity,
                    "MAX_TOKENS": spec.max_tokens,
                }
            )
            step = self._takes(key, lanes.take_dispatch, fixed, num_warps=tuning.take_warps)
        return step

    def _take_combine(self, sent: CudaDispatched, *, reduce: Reduce, shared: bool) -> LaunchStep:
        key = ("take_combine", sent.kind, sent.ids, reduce, shared)
        step = self._steps.get(key)
        if step is None:
            spec, tuning = self.spec, self.tuning
            words = spec.hidden * spec.dtype.itemsize // 4
            fixed = (
                self._here()
                | self._choices(sent.stride)
                | {
                    "R": spec.capacity,
                    "K": sent.kind.k,
                    "MAX_TOKENS": spec.max_tokens,
                    "WORDS": words,
                    "TILE": min(tuning.take_width, triton.next_power_of_2(words)),
                    "RESULTS_AT": self.layout.results_at,
                    "HOME": reduce == "home",
                    "SHARED": shared,
                    "SOURCE": self._source(sent, shared),
                }
            )
            step = self._takes(key, lanes.take_combine, fixed, num_warps=tuning.take_warps)
        return step

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
        arguments = {"out": out, "y": y, "position": self.position if places is None else places}
        step = self._send_combine(sent, reduce=reduce, wait=wait, shared=shared)
        step.start(arguments | _known(sent))

    def _send_combine(
        self, sent: CudaDispatched, *, reduce: Reduce, wait: bool, shared: bool
    ) -> LaunchStep:
        key = (_SEND_COMBINE, sent.kind, sent.ids, reduce, shared, wait)
        step = self._steps.get(key)
        if step is None:
            fixed = (
                self._here()
                | self._sums(sent, reduce, shared)
                | {
                    "counters": self._counters,
                    "WEIGHTS_AT": self.layout.weights_at,
                    "FORMAT": combine_format(sent.stride, home=reduce == "home"),
                    "WAIT": wait,
                    "CHECKS": self.tuning.checks,
                    "SIM": self._sim,
                }
            )
            launch = self.prepare(
                combine.send_combine, fixed,
                num_warps=self.tuning.combine_warps, enable_fp_fusion=False,
            )  # fmt: skip
            step = self._steps[key] = LaunchStep(launch, more=self._senders + wait)
        return step

    def share_weights(
        self, weights: torch.Tensor, sent: CudaDispatched, *, send: bool = True, wait: bool = True
    ) -> None:
        """Before a combine whose weights are not those of the dispatch: tell all peers the own
        ones, and wait for theirs. Every rank must send, whatever its `reduce`.

        weights: [tokens, k] float32; an expert that is -1 in `sent` counts with 0.
        """
        for step in self._share_weights(sent, send=send, wait=wait):
            step.start({"weights": weights} | _known(sent))

    def _share_weights(self, sent: CudaDispatched, *, send: bool, wait: bool) -> list[LaunchStep]:
        key = (_SHARE_WEIGHTS, sent.kind, sent.ids, send, wait)
        step = self._steps.get(key)
        if step is None:
            spec, k = self.spec, sent.kind.k
            chunk = min(triton.next_power_of_2(max(spec.max_tokens * k, 1)), _WEIGHTS_CHUNK)
            fixed = self._waits() | {
                "K": k,
                "TOPK": sent.stride,
                "MAX_TOKENS": spec.max_tokens,
                "WEIGHTS_AT": self.layout.weights_at,
                "CHUNK": chunk,
                "SEND": send,
                "WAIT": wait,
            }
            step = self._one(key, combine.share_weights, fixed, num_warps=8)
        return [step, *([self._take_weights(sent)] if wait and self._far else ())]

    def _take_weights(self, sent: CudaDispatched) -> LaunchStep:
        key = ("take_weights", sent.stride)
        step = self._steps.get(key)
        if step is None:
            fixed = self._here() | {
                "R": self.spec.capacity,
                "TOPK": sent.stride,
                "MAX_TOKENS": self.spec.max_tokens,
                "WEIGHTS_AT": self.layout.weights_at,
                "CHUNK": 1024,
            }
            step = self._takes(key, lanes.take_weights, fixed)
        return step

    def wait_combine(self) -> None:
        self._wait_combine().start({})

    def _wait_combine(self) -> LaunchStep:
        return self._steps.get((_WAIT_COMBINE,)) or self._one(
            (_WAIT_COMBINE,), combine.wait_combine, self._waits(), num_warps=1
        )

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
        arguments = {
            "out": out,
            "y": y,
            "position": self.position if places is None else places,
            "weights": sent.weights if weights is None else weights,
        }
        for step in self._reduce(sent, reduce=reduce, shared=shared):
            step.start(arguments | _known(sent), sent.tokens)
        return out

    def _reduce(self, sent: CudaDispatched, *, reduce: Reduce, shared: bool) -> list[LaunchStep]:
        key = (_REDUCE, sent.kind, sent.ids, reduce, shared)
        step = self._steps.get(key)
        if step is None:
            launch = self.prepare(
                combine.reduce, self._here() | self._sums(sent, reduce, shared),
                num_warps=self.tuning.combine_warps, enable_fp_fusion=False,
            )  # fmt: skip
            step = self._steps[key] = LaunchStep(launch, self._pieces, self.tuning.reducers)
        takes = [self._take_combine(sent, reduce=reduce, shared=shared)] if self._far else ()
        return [*takes, step]

    def meet(self, *, send: bool = True, wait: bool = True) -> None:
        """A barrier on the device of all active ranks."""
        waiting.meet[(1,)](
            self.table, self.window.data_ptr(), self.rank,
            SEND=send, WAIT=wait, SIM=self._sim, num_warps=1,
        )  # fmt: skip

    # ---- what launches of one kind have in common ---------------------------------------------

    def prepare(
        self,
        kernel: Any,
        fixed: Mapping[str, Any],
        views: Mapping[str, torch.dtype] = MappingProxyType({}),
        **options: Any,
    ) -> KernelLaunch:
        """Launches of `kernel` on this device; see `KernelLaunch`. Of `fixed` it takes what it has
        parameters for."""
        names = set(kernel.arg_names)
        return KernelLaunch(
            kernel,
            self.window.device,
            {name: value for name, value in fixed.items() if name in names},
            views=views,
            prepared=self.tuning.prepared,
            **options,
        )

    def _one(
        self, key: tuple[object, ...], kernel: Any, fixed: Mapping[str, Any], **o: Any
    ) -> LaunchStep:
        """Of one program; o: of Triton."""
        step = self._steps[key] = LaunchStep(self.prepare(kernel, fixed, **o), more=1)
        return step

    def _takes(
        self, key: tuple[object, ...], kernel: Any, fixed: Mapping[str, Any], **o: Any
    ) -> LaunchStep:
        """Of the programs that take what came from other machines; o: of Triton."""
        step = self._steps[key] = LaunchStep(
            self.prepare(kernel, fixed, **o), more=self.tuning.takers
        )
        return step

    def _here(self) -> dict[str, Any]:
        return {"table": self.table, "window": self.window.data_ptr(), "me": self.rank}

    def _waits(self) -> dict[str, Any]:
        return self._here() | {
            "R": self.spec.capacity,
            "CHECKS": self.tuning.checks,
            "SIM": self._sim,
        }

    def _choices(self, stride: int) -> dict[str, Any]:
        return {"TOPK": stride, "LANES_K": triton.next_power_of_2(stride)}

    def _sums(self, sent: CudaDispatched, reduce: Reduce, shared: bool) -> dict[str, Any]:
        spec = self.spec
        return self._choices(sent.stride) | {
            "R": spec.capacity,
            "K": sent.kind.k,
            "MAX_TOKENS": spec.max_tokens,
            "H": spec.hidden,
            "WIDTH": self.tuning.width,
            "RESULTS_AT": self.layout.results_at,
            "HOME": reduce == "home",
            "SHARED": shared,
            "SOURCE": self._source(sent, shared),
        }

    def _new_kind(
        self, x: torch.Tensor, k: int, slots: int, fp8: Scales | None, wait: bool
    ) -> DispatchKind:
        spec, where, tuning = self.spec, self.layout, self.tuning
        stride = max(k, 1) if self._same_k else spec.topk
        row = x.shape[1] * x.itemsize
        views, words = dict[str, torch.dtype](), x.shape[1]
        if fp8 is None:  # words of any kind are copied
            views["x"] = torch.int32 if row % 4 == 0 else torch.uint8
            words = row // views["x"].itemsize
        tile = min(tuning.send_width, max(quant.BLOCK, triton.next_power_of_2(words)))
        fixed = (
            self._waits()
            | self._choices(stride)
            | {
                "counters": self._counters,
                "LANES_R": self._lanes,
                "K": k,
                "MAX_TOKENS": spec.max_tokens,
                "KIND": fp8_kind(fp8),
                "WORDS": words,
                "TILE": tile,
                "WEIGHTS_AT": where.weights_at,
                "SCALES_AT": where.scales_at,
                "ROWS_AT": where.rows_at,
                "WAIT": wait,
                "FORMAT": dispatch_format(
                    stride, x.shape[1] * (x.itemsize if fp8 is None else 1), fp8
                ),
            }
        )
        indexed = self._indexed(x, slots, fp8)
        launch = self.prepare(dispatch.send_dispatch, fixed, views, num_warps=tuning.send_warps)
        return DispatchKind(
            LaunchStep(launch, triton.cdiv(words, tile), more=int(wait)),
            wait,
            self._index_step(indexed, slots, stride),
            indexed,
            k,
            stride,
        )

    def _index_step(self, indexed: CudaIndexed, slots: int, stride: int) -> LaunchStep:
        key = ("index_rows", slots, stride)
        step = self._steps.get(key)
        if step is None:
            fixed = self._here() | {
                "offsets": indexed.offsets,
                "rows": self.rows,
                "pairs": self.pairs,
                "position": self.position,
                "slots": slots,
                "R": self.spec.capacity,
                "LANES_R": self._lanes,
                "TOPK": stride,
                "MAX_TOKENS": self.spec.max_tokens,
                "CHUNK": min(triton.next_power_of_2(self.most_rows), self.tuning.chunk),
            }
            launch = self.prepare(dispatch.index_rows, fixed, num_warps=self.tuning.index_warps)
            step = self._steps[key] = LaunchStep(launch, more=slots + 1)
        return step

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
        """Send, wait and index: two kernels."""
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
        """Send, wait and sum: two kernels, or one where there is nobody else; and one before
        where weights are shared."""
        alone = self._alone(reduce)
        if shared:
            assert weights is not None
            self.share_weights(weights, sent)
        self.send_combine(out, y, sent, reduce=reduce, wait=not alone, places=places, shared=shared)
        if not alone:
            self.reduce(out, y, sent, reduce=reduce, weights=weights, places=places, shared=shared)
        return out

    def _alone(self, reduce: Reduce) -> bool:
        """Whether the sending half of a combine is all of it."""
        return self.spec.capacity == 1 and reduce == "rank"

    # ---- whole phases in one call of C ----------------------------------------------------------

    def dispatch_call(
        self,
        x: torch.Tensor,
        sent: CudaDispatched,
        most_tokens: int,
        then: LaunchStep | None = None,
        **more: torch.Tensor,
    ) -> Call | None:
        """`dispatch` of others like x and `sent`, which was one, or its sending half if that does
        not wait: a call of (x, expert_ids, weights, *more); None: it must be launched step by step.

        then: what is launched besides; more: what it takes.
        """
        choices, waits = (TOKENS, sent.kind.k), sent.kind.waits
        return self._call(
            [
                sent.kind.send,
                *(self._index_steps(sent) if waits else ()),
                *(() if then is None else (then,)),
            ],
            {
                "x": (x, (TOKENS, x.shape[1])),
                "expert_ids": (sent.expert_ids, choices),
                "weights": (sent.weights, choices),
            }
            | {name: (tensor, tuple(tensor.shape)) for name, tensor in more.items()},
            _known(sent),
            most_tokens,
        )

    def receive_call(self, sent: CudaDispatched) -> Call | None:
        """The other half: a call of nothing but the number of tokens."""
        steps = [self._wait_dispatch(), *self._index_steps(sent)]
        return self._call(steps, {}, _known(sent), self.spec.max_tokens)

    def combine_call(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        sent: CudaDispatched,
        *,
        reduce: Reduce,
        places: torch.Tensor | None,
        shared: bool,
        part: Part = "whole",
    ) -> Call | None:
        """`combine` of others like these, or a half of it: a call of (out, y, expert_ids, weights),
        and of places if there are any; None: it must be launched step by step."""
        whole, choices = part == "whole", (TOKENS, sent.kind.k)
        waits = whole and not self._alone(reduce)
        steps = list[LaunchStep]()
        if part != "receive":
            if shared:
                for_weights = whole or reduce == "rank"
                steps += self._share_weights(sent, send=True, wait=for_weights)
            steps.append(self._send_combine(sent, reduce=reduce, wait=waits, shared=shared))
        if part == "receive":
            steps.append(self._wait_combine())
        if waits or part == "receive":
            steps += self._reduce(sent, reduce=reduce, shared=shared)
        tensors = {
            "out": (out, (TOKENS, self.spec.hidden)),
            "y": (y, (ROWS, self.spec.hidden) if places is None else tuple(y.shape)),
            "expert_ids": (sent.expert_ids, choices),
            "weights": (sent.weights, choices),
        }
        if places is not None:
            tensors["position"] = places, tuple(places.shape)
        return self._call(
            steps,
            tensors,
            _known(sent) | {"position": self.position},
            self.spec.max_tokens,
        )

    def _call(
        self,
        steps: list[LaunchStep],
        tensors: Mapping[str, tuple[torch.Tensor, tuple[int, ...]]],
        fixed: Mapping[str, Any],
        most_tokens: int,
    ) -> Call | None:
        """See `make_call`. Not while this thread captures."""
        call = make_call(
            steps, tensors, fixed,
            page=self.page, most_tokens=most_tokens, most_rows=self.most_rows,
        )  # fmt: skip
        if call is not None and self.tuning.at_once:
            launch_at_once(call, steps)
        return call

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
