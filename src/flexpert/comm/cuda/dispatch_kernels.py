"""The kernels of a dispatch: send rows and flags, wait, and index what came. See waiting.py."""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.comm.cuda.wait_kernels import (
    ACTIVE,
    ARRIVED,
    DISPATCH_FLAGS,
    DISPATCH_FORMATS,
    LANE,
    PEER,
    SEQUENCE,
    SLOTS,
    active_of,
    await_dispatch,
    part_of,
    tag_of,
)

_AMAX = tl.constexpr(1e-4)
_LARGEST = tl.constexpr(448.0)


@triton.jit
def _quantise(v, KIND: tl.constexpr):
    """v: [blocks, 128] float32 → float32 values to round to e4m3, and the scale of each block.

    The same bits as comm/quant.py.
    """
    finite = tl.abs(v) < float("inf")
    amax = tl.maximum(tl.max(tl.where(finite, tl.abs(v), 0.0), 1), _AMAX)
    scale = tl.math.div_rn(amax, _LARGEST + amax * 0)
    inverse = tl.math.div_rn(_LARGEST + amax * 0, amax)
    if KIND != 1:
        bits = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    return tl.where(finite, v * inverse[:, None], float("nan")), scale


@triton.jit(do_not_specialize=["tokens", "me", "experts"])
def send_dispatch(
    x, expert_ids, weights, owner, slot, table, counters, window, tokens, me, experts,
    R: tl.constexpr, LANES_R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr,
    LANES_K: tl.constexpr, MAX_TOKENS: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr,
    TILE: tl.constexpr, WEIGHTS_AT: tl.constexpr, SCALES_AT: tl.constexpr, ROWS_AT: tl.constexpr,
    FORMAT: tl.constexpr,
    WAIT: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr,
):  # fmt: skip
    """The last program waits if WAIT; each other sends a piece of a token to the ids that want it.

    x: [tokens, WORDS], float to be quantised (KIND > 0), or words of any kind to be copied.
    owner, slot: [experts] int32. counters: [LANES, LANES] int32, zero between launches. FORMAT: see
    `dispatch_format`.
    """
    pid = tl.program_id(0)
    if WAIT and pid == tl.num_programs(0) - 1:
        await_dispatch(table, window, tokens, me, R, CHECKS, SIM)
    else:
        PIECES: tl.constexpr = (WORDS + TILE - 1) // TILE
        t = pid // PIECES
        piece = pid % PIECES
        real = t < tokens  # without tokens there is one, to raise the flags
        if KIND == 0:
            b = tl.arange(0, TILE)
            c = piece * TILE + b
        else:
            b = piece * (TILE // 128) + tl.arange(0, TILE // 128)
            c = b[:, None] * 128 + tl.arange(0, 128)[None, :]
        inside = real
        if WORDS % TILE:
            inside = (c < WORDS) & real
        v = tl.load(x + t.to(tl.int64) * WORDS + c, mask=inside)
        tl.debug_barrier()  # else the compiler has this load wait for those below
        k = tl.arange(0, LANES_K)
        r = tl.arange(0, LANES_R)
        e = tl.load(expert_ids + t * K + k, mask=(k < K) & real, other=-1).to(tl.int32)
        peers = tl.load(table + PEER + r, mask=r < R, other=0)
        lane = tl.load(table + LANE + r, mask=r < R, other=0)
        up = active_of(table, r, R, CHECKS) & (r < R)
        known = (e >= 0) & (e < experts)
        own = tl.load(owner + e, mask=known, other=-1)
        there = (own[None, :] == r[:, None]) & up[:, None]
        desired = tl.max(there.to(tl.int32), 1)
        if piece == 0:
            w = tl.load(weights + t * K + k, mask=(k < K) & real, other=0.0)
            s = tl.load(slot + e, mask=known, other=-1)
            meta = (lane * MAX_TOKENS + t)[:, None] * TOPK + k[None, :]
            some = (k < TOPK)[None, :] & up[:, None] & real
            at_slots = (peers + SLOTS).to(tl.pointer_type(tl.int32))[:, None] + meta
            tl.store(at_slots, tl.where(there, s[None, :], -1), mask=some)
            at_weights = (peers + WEIGHTS_AT).to(tl.pointer_type(tl.float32))[:, None] + meta
            tl.store(at_weights, tl.broadcast_to(w[None, :], (LANES_R, LANES_K)), mask=some)
        if KIND > 0:
            v, scale = _quantise(v.to(tl.float32), KIND)
            v = v.to(tl.float8e4nv)
        for i in range(R):
            if tl.sum(tl.where(r == i, desired, 0), 0) > 0:
                peer = tl.load(table + PEER + i)
                place = tl.load(table + LANE + i) * MAX_TOKENS + t
                rows = part_of(peer, ROWS_AT, v.dtype)
                tl.store(rows + place * WORDS + c, v, mask=inside)
                if KIND > 0:
                    scale_at = place * (WORDS // 128) + b
                    if KIND == 3:
                        exponent = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
                        scales = part_of(peer, SCALES_AT, tl.uint8)
                        tl.store(scales + scale_at, exponent, mask=b * 128 < WORDS)
                    else:
                        scales = part_of(peer, SCALES_AT, tl.float32)
                        tl.store(scales + scale_at, scale, mask=b * 128 < WORDS)
        tl.debug_barrier()
        total = tl.maximum(tokens, 1) * PIECES
        done = tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu")
        if done == total - 1:
            tl.store(counters, 0)
            flags = (peers + DISPATCH_FLAGS).to(tl.pointer_type(tl.int64))
            value = tag_of(table, r, 1, CHECKS) | tokens
            formats = (peers + DISPATCH_FORMATS).to(tl.pointer_type(tl.int64))
            tl.store(formats + me, FORMAT, mask=up & (r != me))
            tl.atomic_xchg(flags + me, value, mask=up & (r != me), sem="release", scope="sys")


@triton.jit(do_not_specialize=["tokens", "me"])
def wait_dispatch(
    table, window, tokens, me,
    R: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr,
):  # fmt: skip
    """The waiting half of a dispatch that is split."""
    await_dispatch(table, window, tokens, me, R, CHECKS, SIM)


@triton.jit
def _slots_of(
    slots, ends, p,
    LANES_R: tl.constexpr, R: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr,
):  # fmt: skip
    """Where the p-th of all pairs that came lies, and its slot. ends: [LANES_R] running totals."""
    lanes = tl.arange(0, LANES_R)
    pair = p
    for i in tl.static_range(R):
        end = tl.sum(tl.where(lanes == i, ends, 0), 0)
        begin = tl.sum(tl.where(lanes == i - 1, ends, 0), 0)
        pair += tl.where(p >= end, MAX_TOKENS * TOPK - (end - begin), 0)
    here = p < tl.max(ends, 0)
    return pair, here, tl.load(slots + pair, mask=here, other=-1)


@triton.jit(do_not_specialize=["slots"])
def index_rows(
    window, table, offsets, rows, pairs, position, slots,
    R: tl.constexpr, LANES_R: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Program s < slots: the rows of slot s; program `slots`: what belongs to no row, the counts.

    offsets: [slots + 1] int32. rows: int32, place of each row, source * MAX_TOKENS + token.
    pairs: int32, place * TOPK + choice. position: [R * MAX_TOKENS * TOPK] int32, row of each pair
    or -1. Rows of a slot are in the order of (source, token, choice).
    """
    s = tl.program_id(0)
    src = tl.arange(0, LANES_R)
    arrived = tl.load(table + ARRIVED + src, mask=src < R, other=0).to(tl.int32)
    ends = tl.cumsum(tl.minimum(tl.maximum(arrived, 0), MAX_TOKENS) * TOPK, 0)
    total = tl.max(ends, 0)
    at_slots = part_of(window, SLOTS, tl.int32)
    lanes = tl.arange(0, CHUNK)
    # loops are written with while: the interpreter's range takes no tensors
    pair, here, v = _slots_of(at_slots, ends, lanes, LANES_R, R, TOPK, MAX_TOKENS)
    base = tl.sum(((v >= 0) & (v < s)).to(tl.int32), 0)
    i = total * 0 + CHUNK
    while i < total:
        _, _, v = _slots_of(at_slots, ends, i + lanes, LANES_R, R, TOPK, MAX_TOKENS)
        base += tl.sum(((v >= 0) & (v < s)).to(tl.int32), 0)
        i += CHUNK
    tl.store(offsets + s, base)
    i = total * 0
    if s < slots:
        while i < total:
            if total > CHUNK:  # else all of them are at hand
                pair, _, v = _slots_of(at_slots, ends, i + lanes, LANES_R, R, TOPK, MAX_TOKENS)
            hit = (v == s).to(tl.int32)
            order = base + tl.cumsum(hit, 0) - 1
            tl.store(rows + order, pair // TOPK, mask=hit != 0)
            tl.store(pairs + order, pair, mask=hit != 0)
            tl.store(position + pair, order, mask=hit != 0)
            base += tl.sum(hit, 0)
            i += CHUNK
    else:
        while i < total:
            pair, here, v = _slots_of(at_slots, ends, i + lanes, LANES_R, R, TOPK, MAX_TOKENS)
            nowhere = tl.full((CHUNK,), -1, tl.int32)
            tl.store(position + pair, nowhere, mask=here & ((v < 0) | (v >= slots)))
            i += CHUNK
        # this exchange has a number now; who did not come is not waited for again
        active = tl.load(table + ACTIVE + src, mask=src < R, other=0)
        count = tl.load(table + SEQUENCE + src, mask=src < R, other=0)
        tl.store(table + SEQUENCE + src, count + active, mask=src < R)
        tl.store(table + ACTIVE + src, tl.where(arrived < 0, 0, active), mask=src < R)
