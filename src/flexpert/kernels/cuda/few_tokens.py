"""A decoder layer of a decode step with very few tokens, as six kernels close behind each other.

With one token a layer is a chain of products that read each weight once, and of small things
between them; what a launch costs, and the time until memory delivers at its full rate, is as long
as the reading. So what stands between two products is computed by the programs of the next one,
each for itself, and the kernels are launched as each other's programmatic dependents: a program
asks for its weights first and only then waits for the kernel before.

What may be read ahead of that wait was written at the latest by the kernel before the one before:
each kernel lets the next one begin only after its own wait.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flexpert.comm.interpreter import INTERPRETED
from flexpert.kernels.cuda.attention_parts import LOG2_E, first_seen, splits_of
from flexpert.kernels.step_shapes import FEW_TOKENS

MOST_TOKENS: Final = FEW_TOKENS
"""With more, tokens share experts, and kernels that read those once are faster."""
_COUNTERS: Final = 4096
MOST_DEPTH: Final = 8192
"""Elements of a weight that a warp must hold at least, all along what is summed: 128 registers of
bf16 in each lane."""
CHUNK: Final = tl.constexpr(256)  # what the lanes of a warp load at once, 16 bytes of bf16 each


@dataclass(frozen=True, slots=True)
class FewTiling:
    """elements: of a weight that a program of a product takes, about; it is one warp. keys: of
    attention that a program looks at in one go; warps: of such a program."""

    elements: int = 4096
    keys: int = 128
    warps: int = 8

    def columns(self, depth: int) -> int:
        """Rows of a weight, of so many elements each, that a warp takes; a power of two."""
        fitting = max(1, self.elements // depth)
        return 1 << fitting.bit_length() - 1


@triton.jit
def _begin(FOLLOWS: tl.constexpr):
    """What the kernel before has written may be read, and the next kernel may begin."""
    if FOLLOWS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def _chunks(row, ok, K: tl.constexpr):
    """Rows of K elements, as many to a tile as a warp loads at once: a tuple of [rows, CHUNK].

    row: pointers [rows, 1]; ok: [rows, 1].
    """
    lane = tl.arange(0, CHUNK)[None, :]
    found = ()
    for begin in tl.static_range(0, K, CHUNK):
        if begin + CHUNK <= K:
            found = found + (tl.load(row + begin + lane, mask=ok, other=0.0),)  # noqa: RUF005
        else:
            inside = begin + lane < K
            found = found + (tl.load(row + begin + lane, mask=ok & inside, other=0.0),)  # noqa: RUF005
    return found


@triton.jit
def _normed(x, scale, eps, K: tl.constexpr, EARLY: tl.constexpr):
    """A row, normed as `norm.rms_norm` does; all of them as `_chunks` gives them."""
    element = x[0].dtype
    squares = x[0].to(tl.float32) * x[0].to(tl.float32)
    for at in tl.static_range(1, len(x)):
        value = x[at].to(tl.float32)
        squares += value * value
    factor = tl.rsqrt(tl.sum(squares, 1) / K + eps)[:, None]
    found = ()
    for at in tl.static_range(len(x)):
        value = x[at].to(tl.float32) * factor
        if EARLY:
            value = value.to(element).to(tl.float32)
        found = found + ((value * scale[at].to(tl.float32)).to(element),)  # noqa: RUF005
    return found


@triton.jit
def _dot(w, x):
    """[rows] float32: of each row of w with that of x, or with its one row. See `_chunks`."""
    total = w[0].to(tl.float32) * x[0].to(tl.float32)
    for at in tl.static_range(1, len(w)):
        total += w[at].to(tl.float32) * x[at].to(tl.float32)
    return tl.sum(total, 1)


@triton.jit
def _project(
    x, norm, weight, bias, residual, out, N, eps,
    K: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < N
    element = out.dtype.element_ty
    one = tl.zeros((1, 1), tl.int32)
    w = _chunks(weight + column.to(tl.int64)[:, None] * K, there[:, None], K)
    if NORMED:
        scale = _chunks(norm + one, one == 0, K)
    _begin(FOLLOWS)
    for token in tl.static_range(TOKENS):
        row = _chunks(x + token * K + one, one == 0, K)
        if NORMED:
            row = _normed(row, scale, eps, K, EARLY)
        result = _dot(w, row)
        if BIASED:
            result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
        if ADDED:
            result = result.to(element).to(tl.float32)
            result += tl.load(residual + token * N + column, mask=there, other=0.0).to(tl.float32)
        tl.store(out + token * N + column, result.to(element), mask=there)


@triton.jit
def _turned(
    row, weight, cos, sin, eps, head_ok,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ANGLES: tl.constexpr, NORMED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Heads [rows, DIM_PAD] at `row` [rows, 1], normed and rotated, in float32; see `rotary`."""
    element = row.dtype.element_ty
    d = tl.arange(0, DIM_PAD)[None, :]
    other = (d + DIM // 2) % DIM
    ok = head_ok & (d < DIM)
    x = tl.load(row + d, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(row + other, mask=ok, other=0.0).to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)[:, None]
        x = x * scale
        y = y * scale
        if EARLY:
            x = x.to(element).to(tl.float32)
            y = y.to(element).to(tl.float32)
        x = (x * tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)).to(element)
        y = (y * tl.load(weight + other, mask=d < DIM, other=0.0).to(tl.float32)).to(element)
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    c = tl.load(cos + d % ANGLES, mask=d < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + d % ANGLES, mask=d < DIM, other=0.0).to(tl.float32)
    turned = tl.where(d < DIM // 2, -y, y)
    return (x * c).to(element).to(tl.float32) + (turned * s).to(element).to(tl.float32)


@triton.jit
def _fold(
    accumulated, peak, total, q, k, v, ok, scaling, PRECISION: tl.constexpr
):  # fmt: skip
    """The sums so far with a tile of keys and values [KEYS, DIM_PAD]; ok: [KEYS], those seen."""
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scaling * LOG2_E)
    score = tl.where(ok[None, :], score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(peak - safe)
    p = tl.exp2(score - safe[:, None])
    total = total * shrink + tl.sum(p, 1)
    accumulated = tl.dot(p.to(v.dtype), v, accumulated * shrink[:, None], input_precision=PRECISION)
    return accumulated, higher, total


@triton.jit
def _merged(
    partial, peaks, sums, row, rows, used, row_ok,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """[ROWS, DIM_PAD]: what `used` splits have found, the others before this program. row: [ROWS],
    of `rows`."""
    s = tl.arange(0, SPLITS)[:, None]
    at = s * rows + row[None, :]
    ok = (s < used) & row_ok[None, :]
    peak = tl.load(peaks + at, mask=ok, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(sums + at, mask=ok, other=0.0, cache_modifier=".cg")
    highest = tl.max(peak, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    whole = tl.sum(tl.exp2(peak - highest[None, :]) * total, 0)
    d = tl.arange(0, DIM_PAD)[None, :]
    accumulated = tl.zeros((ROWS, DIM_PAD), tl.float32)
    for split in tl.range(0, used, loop_unroll_factor=4):
        one = split * rows + row
        factor = tl.load(peaks + one, mask=row_ok, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial + one[:, None] * DIM + d,
            mask=row_ok[:, None] & (d < DIM),
            other=0.0,
            cache_modifier=".cg",
        )
        accumulated += tl.exp2(factor - highest)[:, None] * part
    return accumulated / tl.where(whole == 0.0, 1.0, whole)[:, None]


@triton.jit(do_not_specialize=["max_blocks", "splits"])
def _attend(
    qkv, cos, sin, query_norm, key_norm, slot_mapping, key_cache, value_cache, context_len,
    block_tables, sinks, out, partial, peaks, sums, arrived, max_blocks, splits, scaling, eps,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ANGLES: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(context_len + token)
    blocks = block_tables + token * max_blocks
    # keys before the token's own, which is not in the cache yet
    low = first_seen(context - 1, WINDOW) // KEYS
    high = (context - 1 + KEYS - 1) // KEYS
    tiles = tl.maximum(high - low, 0)
    share = tl.maximum((tiles + splits - 1) // splits, 1)
    used = tl.maximum((tiles + share - 1) // share, 1)  # splits that have keys, or the first
    if split < used:
        _attend_split(
            qkv, cos, sin, query_norm, key_norm, slot_mapping, key_cache, value_cache, sinks, out,
            partial, peaks, sums, arrived, blocks, context, low + split * share,
            tl.minimum(high, low + split * share + share), used, scaling, eps, BLOCK, KV_HEADS,
            GROUP, DIM, DIM_PAD, ROWS, KEYS, SPLITS, ANGLES, NORMED, EARLY, WINDOW, SINKS,
            PRECISION, FOLLOWS,
        )  # fmt: skip
    else:
        _begin(FOLLOWS)


@triton.jit
def _attend_split(
    qkv, cos, sin, query_norm, key_norm, slot_mapping, key_cache, value_cache, sinks, out, partial,
    peaks, sums, arrived, blocks, context, low, high, used, scaling, eps,
    BLOCK: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    DIM_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
    ANGLES: tl.constexpr, NORMED: tl.constexpr, EARLY: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, PRECISION: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from low to high, and the token's own with the first; `used`: programs that
    have some."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    element = qkv.dtype.element_ty
    heads = KV_HEADS * GROUP

    d = tl.arange(0, DIM_PAD)
    lane = tl.arange(0, KEYS)
    n = low * KEYS + lane
    ok = (n < context - 1) & (low < high)
    if WINDOW != 0:
        ok = ok & (n >= first_seen(context - 1, WINDOW))
    block = tl.load(blocks + n // BLOCK, mask=ok, other=0).to(tl.int64)
    place = ((block * BLOCK + n % BLOCK) * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
    seen = ok[:, None] & (d < DIM)[None, :]
    k = tl.load(key_cache + place, mask=seen, other=0.0)
    v = tl.load(value_cache + place, mask=seen, other=0.0)
    _begin(FOLLOWS)

    r = tl.arange(0, ROWS)
    head = kv_head * GROUP + r
    row_ok = r < GROUP
    first = qkv + token * (heads + 2 * KV_HEADS) * DIM
    cos += token * ANGLES
    sin += token * ANGLES
    q = _turned(
        first + head[:, None] * DIM, query_norm, cos, sin, eps, row_ok[:, None], DIM, DIM_PAD,
        ANGLES, NORMED, EARLY,
    ).to(element)  # fmt: skip
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    accumulated = tl.zeros((ROWS, DIM_PAD), tl.float32)
    if split == 0:
        one = tl.arange(0, 1)[:, None]
        key = _turned(
            first + (heads + kv_head + one) * DIM, key_norm, cos, sin, eps, one == 0, DIM, DIM_PAD,
            ANGLES, NORMED, EARLY,
        ).to(element)  # fmt: skip
        across = d[None, :]
        value = tl.load(
            first + (heads + KV_HEADS + kv_head) * DIM + across, mask=across < DIM, other=0.0
        )
        slot = tl.load(slot_mapping + token)
        if slot >= 0:
            where = (slot * KV_HEADS + kv_head) * DIM + across
            tl.store(key_cache + where, key, mask=across < DIM)
            tl.store(value_cache + where, value, mask=across < DIM)
        if context > 0:
            peak = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * (scaling * LOG2_E)
            total = tl.full((ROWS,), 1.0, tl.float32)
            accumulated += value.to(tl.float32)
        if SINKS:
            sink = tl.load(sinks + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2_E
            higher = tl.maximum(peak, sink)
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.exp2(sink - higher)
            accumulated = accumulated * shrink[:, None]
            peak = higher
    if low < high:
        accumulated, peak, total = _fold(accumulated, peak, total, q, k, v, ok, scaling, PRECISION)
    for tile in range(low + 1, high):
        n = tile * KEYS + lane
        ok = n < context - 1
        block = tl.load(blocks + n // BLOCK, mask=ok, other=0).to(tl.int64)
        place = ((block * BLOCK + n % BLOCK) * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
        seen = ok[:, None] & (d < DIM)[None, :]
        k = tl.load(key_cache + place, mask=seen, other=0.0)
        v = tl.load(value_cache + place, mask=seen, other=0.0)
        accumulated, peak, total = _fold(accumulated, peak, total, q, k, v, ok, scaling, PRECISION)

    wide = row_ok[:, None] & (d < DIM)[None, :]
    row = token * heads + head
    where = row[:, None] * DIM + d[None, :]
    if used == 1:
        result = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + where, result.to(element), mask=wide)
    else:
        rows = tl.num_programs(0) * heads
        at = split * rows + row
        tl.store(partial + at[:, None] * DIM + d[None, :], accumulated, mask=wide)
        tl.store(peaks + at, peak, mask=row_ok)
        tl.store(sums + at, total, mask=row_ok)
        tl.debug_barrier()
        counter = arrived + token * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
            tl.store(counter, 0)
            merged = _merged(
                partial, peaks, sums, row, rows, used, row_ok, DIM, DIM_PAD, ROWS, SPLITS
            )
            tl.store(out + where, merged.to(element), mask=wide)


@triton.jit
def _route(
    x, norm, weight, bias, normed, logits, weights, ids, arrived, eps,
    K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr, TOPK: tl.constexpr, TOPK_PAD: tl.constexpr, EARLY: tl.constexpr,
    BIASED: tl.constexpr, NORMALISED: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    there = column < EXPERTS
    element = normed.dtype.element_ty
    one = tl.zeros((1, 1), tl.int32)
    w = _chunks(weight + column[:, None] * K, there[:, None], K)
    scale = _chunks(norm + one, one == 0, K)
    _begin(FOLLOWS)
    for token in tl.static_range(TOKENS):
        row = _normed(_chunks(x + token * K + one, one == 0, K), scale, eps, K, EARLY)
        if program == 0:
            lane = tl.arange(0, CHUNK)[None, :]
            for at in tl.static_range(len(row)):
                k = at * CHUNK + lane
                tl.store(normed + token * K + k, row[at], mask=k < K)
        result = _dot(w, row)
        if BIASED:
            result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
        tl.store(logits + token * EXPERTS + column, result.to(element), mask=there)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        expert = tl.arange(0, EXPERTS_PAD)
        for token in tl.static_range(TOKENS):
            score = tl.load(
                logits + token * EXPERTS + expert,
                mask=expert < EXPERTS,
                other=float("-inf"),
                cache_modifier=".cg",
            ).to(tl.float32)
            # in the order of scores, of equal ones the first: one reduction finds the next best
            bits = score.to(tl.int32, bitcast=True)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            key = (bits.to(tl.int64) << 32) | (EXPERTS_PAD - 1 - expert)
            lane = tl.arange(0, TOPK_PAD)
            best = tl.full((TOPK_PAD,), float("-inf"), tl.float32)
            chosen = tl.zeros((TOPK_PAD,), tl.int32)
            for k in tl.static_range(TOPK):
                top = tl.max(key, 0)
                key = tl.where(key == top, -(2**63), key)
                bits = (top >> 32).to(tl.int32)
                value = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
                best = tl.where(lane == k, value, best)
                chosen = tl.where(lane == k, EXPERTS_PAD - 1 - top.to(tl.int32), chosen)
            highest = tl.max(best, 0)
            p = tl.exp(best - highest)
            if NORMALISED:
                p = p / tl.sum(p, 0)
            else:
                p = p / tl.sum(tl.exp(score - highest), 0)
            place = token * TOPK + lane
            tl.store(weights + place, p.to(weights.dtype.element_ty), mask=lane < TOPK)
            tl.store(ids + place, chosen.to(tl.int64), mask=lane < TOPK)


@triton.jit
def _expert_of(ids, slot_of, valid, token, pair, EXPERTS: tl.constexpr):
    """Slots of pairs; -1: of a row of padding."""
    expert = tl.load(ids + pair)
    ok = (expert >= 0) & (expert < EXPERTS) & (token < tl.load(valid))
    return tl.load(slot_of + tl.where(ok, expert, 0), mask=ok, other=-1)


@triton.jit
def _raise(
    x, ids, slot_of, valid, table, out, N,
    K: tl.constexpr, COLUMNS: tl.constexpr, TOPK: tl.constexpr,
    EXPERTS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    token = pair // TOPK
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < N
    element = x.dtype.element_ty
    one = tl.zeros((1, 1), tl.int32)
    _begin(FOLLOWS)
    slot = _expert_of(ids, slot_of, valid, token, pair, EXPERTS)
    if slot >= 0:
        weight = tl.multiple_of(tl.load(table + slot).to(tl.pointer_type(element)), 16)
        at = weight + column[:, None] * K
        gate = _chunks(at, there[:, None], K)
        raised = _chunks(at + N * K, there[:, None], K)
        row = _chunks(x + token * K + one, one == 0, K)
        a = _dot(gate, row)
        b = _dot(raised, row)
        tl.store(out + pair * N + column, (a * tl.sigmoid(a) * b).to(element), mask=there)


@triton.jit
def _lower(
    hidden, ids, slot_of, valid, table, weights, residual, out, N,
    K: tl.constexpr, COLUMNS: tl.constexpr, TOPK: tl.constexpr, TOPK_PAD: tl.constexpr,
    EXPERTS: tl.constexpr, FOLLOWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    element = out.dtype.element_ty
    # a row for each column and choice
    lane = tl.arange(0, TOPK_PAD * COLUMNS)
    choice = lane % TOPK_PAD
    column = tl.program_id(0) * COLUMNS + lane // TOPK_PAD
    pair = token * TOPK + choice
    # the choices are older than the kernel before
    counts = (choice < TOPK) & (token < tl.load(valid))
    expert = tl.load(ids + pair, mask=counts, other=-1)
    counts = counts & (expert >= 0) & (expert < EXPERTS)
    slot = tl.load(slot_of + expert, mask=counts, other=-1)
    counts = counts & (slot >= 0)
    weight = tl.load(table + slot, mask=counts, other=0).to(tl.pointer_type(element))
    at = tl.multiple_of(weight, 16) + column * K
    w = _chunks(at[:, None], (counts & (column < N))[:, None], K)
    factor = tl.load(weights + pair, mask=counts, other=0.0).to(tl.float32)
    _begin(FOLLOWS)
    row = _chunks((hidden + pair * K)[:, None], counts[:, None], K)
    y = _dot(w, row).to(element).to(tl.float32) * factor
    total = tl.sum(tl.reshape(y, (COLUMNS, TOPK_PAD)), 1).to(element).to(tl.float32)
    across = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    where = token * N + across
    total += tl.load(residual + where, mask=across < N, other=0.0).to(tl.float32)
    tl.store(out + where, total.to(element), mask=across < N)


class FewTokens:
    """The kernels of a layer, for `MOST_TOKENS` tokens at most, each of another sequence.

    All floating tensors are contiguous, on one device, of one dtype, bf16 or f32. Launches are of
    one stream: what a kernel reads ahead is safe only behind the one before it.

    Attributes:
        most_depth: elements of a row of weights, at most.
    """

    most_depth = MOST_DEPTH

    def __init__(self, device: torch.device, tiling: FewTiling | None = None) -> None:
        """device: of all tensors; what is needed of its memory is taken now."""
        self._tiling = tiling or FewTiling()
        self._arrived = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._follows = device.type == "cuda" and follows(torch.cuda.get_device_capability(device))

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float, bool] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """norm(x) · weightᵀ + bias, rounded, + residual.

        Args:
            x: [T, K]; weight: [N, K]; bias: [N]; residual: [T, N].
            norm: ([K] weight, eps, early), see `norm.rms_norm`; None: none.

        Returns:
            [T, N].
        """
        tokens, depth = x.shape
        out = x.new_empty((tokens, weight.shape[0]))
        scale, eps, early = norm or (x, 0.0, False)
        columns = self._tiling.columns(depth)
        self._launch(
            _project, (triton.cdiv(weight.shape[0], columns),),
            x, scale, weight, bias, residual, out, weight.shape[0], eps,
            K=depth, COLUMNS=columns, TOKENS=tokens,
            NORMED=norm is not None, EARLY=early, BIASED=bias is not None,
            ADDED=residual is not None,
        )  # fmt: skip
        return out

    def attend(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slot_mapping: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        *,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        early: bool,
        scaling: float,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`rotary.rotate_and_store`, then `attention.attend`, of one token for each sequence.

        Returns:
            [T, heads * dim].
        """
        tokens, every, dim = qkv.shape
        block, kv_heads = key_cache.shape[1:3]
        heads = every - 2 * kv_heads
        keys = self._tiling.keys
        longest = block_tables.shape[1] * block
        if window:
            longest = min(longest, abs(window) + 1 + keys)
        splits = splits_of(tokens * kv_heads, longest // keys, 2, qkv.device)
        out = qkv.new_empty((tokens, heads * dim))
        shape = (splits, tokens, heads)
        partial = torch.empty((*shape, dim), dtype=torch.float32, device=qkv.device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=qkv.device)
        query_norm, key_norm = norms or (cos, cos)
        self._launch(
            _attend, (tokens, kv_heads, splits),
            qkv, cos, sin, query_norm, key_norm, slot_mapping, key_cache, value_cache, context_len,
            block_tables, sinks, out, partial, peaks, sums, self._arrived[1:],
            block_tables.shape[1], splits, scaling, eps,
            BLOCK=block, KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim,
            DIM_PAD=max(16, triton.next_power_of_2(dim)),
            ROWS=max(16, triton.next_power_of_2(heads // kv_heads)), KEYS=keys, SPLITS=splits,
            ANGLES=cos.shape[1], NORMED=norms is not None, EARLY=early, WINDOW=window,
            SINKS=sinks is not None, PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            warps=self._tiling.warps,
        )  # fmt: skip
        return out

    def route(
        self,
        x: Tensor,
        norm: tuple[Tensor, float, bool],
        weight: Tensor,
        bias: Tensor | None,
        topk: int,
        *,
        normalised: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A norm, and a router's choice of experts for what it gives.

        Args:
            x: [T, K]; norm: as in `project`; weight: [experts, K]; bias: [experts].
            topk, normalised, dtype: see `router.choose_experts`.

        Returns:
            ([T, K] normed, [T, topk] weights of `dtype`, [T, topk] int64 ids).
        """
        tokens, depth = x.shape
        experts = weight.shape[0]
        normed = torch.empty_like(x)
        logits = x.new_empty((tokens, experts))
        weights = torch.empty((tokens, topk), dtype=dtype, device=x.device)
        ids = torch.empty((tokens, topk), dtype=torch.int64, device=x.device)
        columns = self._tiling.columns(depth)
        scale, eps, early = norm
        self._launch(
            _route, (triton.cdiv(experts, columns),),
            x, scale, weight, bias, normed, logits, weights, ids, self._arrived, eps,
            K=depth, EXPERTS=experts,
            EXPERTS_PAD=max(32, triton.next_power_of_2(experts)), COLUMNS=columns, TOKENS=tokens,
            TOPK=topk, TOPK_PAD=triton.next_power_of_2(topk), EARLY=early,
            BIASED=bias is not None, NORMALISED=normalised,
        )  # fmt: skip
        return normed, weights, ids

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        slot_of: Tensor,
        valid: Tensor,
        up: Tensor,
        down: Tensor,
        inter: int,
        residual: Tensor,
    ) -> Tensor:
        """What the chosen experts give, a SwiGLU each, + residual.

        The router's choice is that of `route`, launched just before.

        Args:
            x, residual: [T, hidden].
            ids: [T, k] int64; weights: [T, k] float.
            slot_of: [experts] int32; up, down: [slots] int64, addresses of weights [2 * inter,
                hidden] and [hidden, inter] of x's dtype.
            valid: [1] int32, tokens that count; of others residual is left.

        Returns:
            [T, hidden].
        """
        tokens, hidden = x.shape
        topk = ids.shape[1]
        raised = x.new_empty((tokens * topk, inter))
        columns = self._tiling.columns(2 * hidden)
        self._launch(
            _raise, (triton.cdiv(inter, columns), tokens * topk),
            x, ids, slot_of, valid, up, raised, inter,
            K=hidden, COLUMNS=columns, TOPK=topk, EXPERTS=slot_of.shape[0],
        )  # fmt: skip
        out = torch.empty_like(x)
        topk_pad = triton.next_power_of_2(topk)
        columns = self._tiling.columns(topk_pad * inter)
        self._launch(
            _lower, (triton.cdiv(hidden, columns), tokens),
            raised, ids, slot_of, valid, down, weights, residual, out, hidden,
            K=inter, COLUMNS=columns, TOPK=topk, TOPK_PAD=topk_pad, EXPERTS=slot_of.shape[0],
        )  # fmt: skip
        return out

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 1, **constants: Any
    ) -> None:
        """warps: of a program. One needs no other's sums, and no barrier."""
        options = {} if INTERPRETED else {"launch_pdl": self._follows}
        kernel[grid](*args, **constants, FOLLOWS=self._follows, num_warps=warps, **options)


def fits(hidden: int, inter: int, topk: int) -> bool:
    """Whether `FewTokens.experts` has experts of this size: a warp takes a column of all that a
    token has chosen."""
    return hidden <= MOST_DEPTH and int(triton.next_power_of_2(topk)) * inter <= MOST_DEPTH


def follows(capability: tuple[int, int]) -> bool:
    """Whether a GPU launches kernels as each other's programmatic dependents."""
    return capability >= (9, 0)
