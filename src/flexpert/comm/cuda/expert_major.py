"""Rows copied together by expert, with room for the same number of rows each, on the GPU.

Kernels of experts that take a [experts, rows, hidden] tensor need the rows so, and so does code
that was written for nixl_ep. All sizes are fixed and nothing waits for the host: a captured graph
fills the same tensors anew. Nothing is copied on the way back: `combine` is told the `places`, and
reads the results where they lie.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flexpert.comm.cuda.cuda_exchange import CudaDispatched, CudaExchange
from flexpert.comm.cuda.kernel_launch import LaunchStep
from flexpert.comm.cuda.wait_kernels import ARRIVED, SLOTS, part_of

NOWHERE = -1  # in `places`: no row here
NO_ROOM = -2  # a row came and could not be kept; its result is zero

_NOWHERE = tl.constexpr(NOWHERE)
_NO_ROOM = tl.constexpr(NO_ROOM)
_CHUNK = 128  # rows that are counted in one go
_BLANKS = 1024  # places that are blanked in one go


@dataclass(slots=True, eq=False)
class ExpertMajor:
    """Where `pack` writes to; only the first `count[s]` rows of slot s count.

    x: [slots, limit, n] in the dtype of the rows; n at most what was sent.
    scales: [slots, limit, columns] of 4 bytes each, column-major in the last two dimensions; None
        for rows without scales.
    count: [slots] int32.
    token: [slots, limit] int32, index of each row's token at its home.
    ranges: [slots, sources] int64, begin << 32 | count of each source's rows in each slot.
    places: [capacity · max_tokens · topk] int32, by pair: slot · limit + row; or `NOWHERE`, or
        `NO_ROOM`: a slot has more rows than `limit`, or its source is not below `sources`.
    packing: how `pack` last did it; tensors but `token` stay as they were then.
    """

    x: torch.Tensor
    scales: torch.Tensor | None
    count: torch.Tensor
    token: torch.Tensor
    ranges: torch.Tensor
    places: torch.Tensor
    packing: Packing | None = None

    @classmethod
    def empty(
        cls, exchange: CudaExchange, sent: CudaDispatched, limit: int, sources: int
    ) -> ExpertMajor:
        """Uninitialised tensors for a dispatch; limit: rows that a slot has room for."""
        slots, at = sent.table.slots, exchange.window.device
        payload, scales = sent.indexed.payload, sent.indexed.scales

        def new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=at)

        return cls(
            x=new((slots, limit, payload.shape[1]), payload.dtype),
            scales=None
            if scales is None
            else new((slots, scales.shape[1], limit), scales.dtype).transpose(1, 2),
            count=new((slots,), torch.int32),
            token=new((slots, limit), torch.int32),
            ranges=new((slots, sources), torch.int64),
            places=torch.empty_like(exchange.position),
        )


@triton.jit
def _describe(
    offsets, rows, count, ranges, s, limit, sources,
    LANES_R: tl.constexpr, MAX_TOKENS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """How many rows of slot s there are, and where those of each source are."""
    lanes = tl.arange(0, LANES_R)
    end = tl.load(offsets + s + 1)
    of = tl.zeros((LANES_R,), tl.int32)
    i = tl.load(offsets + s)
    while i < end:
        at = i + tl.arange(0, CHUNK)
        row = tl.load(rows + at, mask=at < end, other=0)
        source = tl.where(at < end, row // MAX_TOKENS, -1)
        of += tl.sum((source[:, None] == lanes[None, :]).to(tl.int32), 0)
        i += CHUNK
    ends = tl.cumsum(of, 0)
    first = tl.minimum(ends - of, limit)
    last = tl.minimum(ends, limit)
    both = (first.to(tl.int64) << 32) | (last - first).to(tl.int64)
    tl.store(ranges + s * sources + lanes, both, mask=lanes < sources)
    tl.store(count + s, tl.max(tl.where(lanes < sources, last, 0), 0))


@triton.jit
def _blank(
    table, places, worker, workers,
    PAIRS: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr, BLANKS: tl.constexpr,
):  # fmt: skip
    """The places of tokens that did not come."""
    i = worker * BLANKS
    while i < PAIRS:
        pair = i + tl.arange(0, BLANKS)
        there = pair < PAIRS
        token = pair // TOPK
        arrived = tl.load(table + ARRIVED + token // MAX_TOKENS, mask=there, other=0)
        nowhere = tl.full((BLANKS,), _NOWHERE, tl.int32)
        tl.store(places + pair, nowhere, mask=there & (token % MAX_TOKENS >= arrived))
        i += workers * BLANKS


@triton.jit(do_not_specialize=["slots", "limit", "sources"])
def pack_rows(
    window, table, position, offsets, rows, x, scales, count, token, ranges, places,
    slots, limit, sources,
    R: tl.constexpr, LANES_R: tl.constexpr, TOPK: tl.constexpr, LANES_K: tl.constexpr,
    MAX_TOKENS: tl.constexpr, STRIDE: tl.constexpr, WORDS: tl.constexpr, WIDTH: tl.constexpr,
    SCALE_STRIDE: tl.constexpr, SCALES: tl.constexpr, LANES_S: tl.constexpr,
    ROWS_AT: tl.constexpr, SCALES_AT: tl.constexpr, CHUNK: tl.constexpr, BLANKS: tl.constexpr,
):  # fmt: skip
    """Programs below `slots` describe a slot each; the others share (token that came, piece of its
    row), which is read once and written for each slot that wants it.

    position, offsets, rows: of index_rows. All rows and scales are int32 words: STRIDE of a row in
    the window, of which WORDS are kept; SCALE_STRIDE and SCALES (0: none) of its scales.
    """
    pid = tl.program_id(0)
    if pid < slots:
        _describe(offsets, rows, count, ranges, pid, limit, sources, LANES_R, MAX_TOKENS, CHUNK)
    else:
        PIECES: tl.constexpr = (WORDS + WIDTH - 1) // WIDTH
        worker = pid - slots
        workers = tl.num_programs(0) - slots
        _blank(table, places, worker, workers, R * MAX_TOKENS * TOPK, TOPK, MAX_TOKENS, BLANKS)
        lanes = tl.arange(0, LANES_R)
        arrived = tl.load(table + ARRIVED + lanes, mask=lanes < R, other=0).to(tl.int32)
        n = tl.minimum(tl.maximum(arrived, 0), MAX_TOKENS)
        ends = tl.cumsum(n, 0)
        total = tl.max(ends, 0) * PIECES
        k = tl.arange(0, LANES_K)
        at_slots = part_of(window, SLOTS, tl.int32)
        item = worker
        while item < total:
            which = item // PIECES
            piece = item % PIECES
            source = tl.sum((which >= ends).to(tl.int32), 0)
            t = which - tl.sum(tl.where(lanes < source, n, 0), 0)
            arrival = source * MAX_TOKENS + t
            c = piece * WIDTH + tl.arange(0, WIDTH)
            inside = c < WORDS
            from_row = part_of(window, ROWS_AT, tl.int32) + arrival.to(tl.int64) * STRIDE
            v = tl.load(from_row + c, mask=inside)
            p = tl.load(position + arrival * TOPK + k, mask=k < TOPK, other=-1)
            s = tl.load(at_slots + arrival * TOPK + k, mask=p >= 0, other=0)
            row = p - tl.load(offsets + s, mask=p >= 0, other=0)
            fits = (p >= 0) & (row < limit) & (source < sources)
            place = tl.where(fits, s * limit + row, tl.where(p >= 0, _NO_ROOM, _NOWHERE))
            if piece == 0:
                tl.store(places + arrival * TOPK + k, place, mask=k < TOPK)
                tl.store(token + place, tl.zeros((LANES_K,), tl.int32) + t, mask=fits)
            for i in tl.static_range(TOPK):
                at = tl.sum(tl.where(k == i, place, 0), 0)
                tl.store(x + at.to(tl.int64) * WORDS + c, v, mask=inside & (at >= 0))
            if SCALES > 0:
                if piece == 0:
                    b = tl.arange(0, LANES_S)
                    of_row = part_of(window, SCALES_AT, tl.int32)
                    of_row += arrival.to(tl.int64) * SCALE_STRIDE
                    u = tl.load(of_row + b, mask=b < SCALES)
                    for i in tl.static_range(TOPK):
                        at = tl.sum(tl.where(k == i, place, 0), 0)
                        slot = tl.maximum(at, 0) // limit
                        column = (slot * SCALES + b).to(tl.int64) * limit + (at - slot * limit)
                        tl.store(scales + column, u, mask=(b < SCALES) & (at >= 0))
            item += workers


class Packing:
    """The launch that packs what dispatches of one kind brought into the same tensors each time."""

    def __init__(self, exchange: CudaExchange, sent: CudaDispatched, into: ExpertMajor) -> None:
        spec, tuning, indexed = exchange.spec, exchange.tuning, sent.indexed
        self.indexed = indexed
        slots = sent.table.slots
        size = indexed.payload.itemsize
        words = into.x.shape[2] * size // 4
        columns = 0 if into.scales is None else into.scales.shape[2]
        width = min(tuning.pack_width, triton.next_power_of_2(words))
        items = spec.capacity * spec.max_tokens * triton.cdiv(words, width)
        x = into.x.view(torch.int32)
        launch = exchange.prepare(
            pack_rows,
            {
                "window": exchange.window.data_ptr(),
                "table": exchange.table,
                "position": exchange.position,
                "offsets": indexed.offsets,
                "rows": indexed.rows,
                "x": x,
                # scales are in rows of columns there, which is how the kernel counts
                "scales": x
                if into.scales is None
                else into.scales.transpose(1, 2).view(torch.int32),
                "count": into.count,
                "ranges": into.ranges,
                "places": into.places,
                "slots": slots,
                "limit": into.x.shape[1],
                "sources": into.ranges.shape[1],
                "R": spec.capacity,
                "LANES_R": triton.next_power_of_2(spec.capacity),
                "TOPK": sent.stride,
                "LANES_K": triton.next_power_of_2(sent.stride),
                "MAX_TOKENS": spec.max_tokens,
                "STRIDE": indexed.payload.shape[1] * size // 4,
                "WORDS": words,
                "WIDTH": width,
                "SCALE_STRIDE": 0 if indexed.scales is None else indexed.scales.shape[1],
                "SCALES": columns,
                "LANES_S": triton.next_power_of_2(max(columns, 1)),
                "ROWS_AT": exchange.layout.rows_at,
                "SCALES_AT": exchange.layout.scales_at,
                "CHUNK": _CHUNK,
                "BLANKS": _BLANKS,
            },
            num_warps=tuning.pack_warps,
        )
        self.step = LaunchStep(launch, more=slots + min(items, tuning.packers))


def pack(exchange: CudaExchange, sent: CudaDispatched, into: ExpertMajor) -> None:
    """Copy the rows of the last dispatch, which was indexed, into their places.

    Raises: ValueError: tensors that do not fit the dispatch.
    """
    packing = into.packing
    if packing is None or packing.indexed is not sent.indexed:
        _check(exchange, sent, into)
        packing = into.packing = Packing(exchange, sent, into)
    packing.step.start({"token": into.token})


def _check(exchange: CudaExchange, sent: CudaDispatched, into: ExpertMajor) -> None:
    payload, scales, slots = sent.indexed.payload, sent.indexed.scales, sent.table.slots
    x, most = into.x, payload.shape[1]
    if (
        x.dtype is not payload.dtype
        or x.shape[0] != slots
        or x.shape[2] > most
        or x.shape[2] * x.itemsize % 4
        or most * payload.itemsize % 4
    ):
        raise ValueError(
            f"x must be [{slots}, limit, at most {most}] {payload.dtype}, rows of whole 4 bytes; "
            f"is {list(x.shape)} {x.dtype}"
        )
    limit, sources = x.shape[1], into.ranges.shape[1]
    for name, tensor, shape, dtype in (
        ("x", x, x.shape, x.dtype),
        ("count", into.count, (slots,), torch.int32),
        ("token", into.token, (slots, limit), torch.int32),
        ("ranges", into.ranges, (slots, sources), torch.int64),
        ("places", into.places, (exchange.most_rows,), torch.int32),
    ):
        if (
            tensor.shape != shape
            or tensor.dtype is not dtype
            or not tensor.is_contiguous()
            or tensor.device != exchange.window.device
        ):
            raise ValueError(
                f"{name} must be {list(shape)} {dtype}, contiguous, on {exchange.window.device}; "
                f"is {list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    if (scales is None) != (into.scales is None):
        raise ValueError("scales must be given exactly where the rows came with scales")
    if scales is not None and into.scales is not None:
        columns = into.scales.shape[2]
        if (
            into.scales.dtype is not scales.dtype
            or into.scales.shape[:2] != x.shape[:2]
            or columns > scales.shape[1]
            or not into.scales.transpose(1, 2).is_contiguous()
        ):
            raise ValueError(
                f"scales must be [{slots}, {limit}, at most {scales.shape[1]}] {scales.dtype}, "
                f"column-major; are {list(into.scales.shape)} {into.scales.dtype}"
            )
