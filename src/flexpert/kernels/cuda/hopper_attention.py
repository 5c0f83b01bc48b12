"""Paged attention of prompts for Hopper's tensor cores, scheduled by hand (Gluon).

Triton waits for a tile's scores before it looks at them, and the tensor cores wait meanwhile. Here
the scores of the next tile and the values of this one are multiplied while the exponentials of the
next begin: products are issued together, and only the scores are waited for.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from functools import cache
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.9 has a new name for it
copy_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _queries_of(
    program, query_start, context_len, sequences, SEQUENCES: gl.constexpr, TOKENS: gl.constexpr
):
    """As `attention_parts.queries_of`, and the sequence's context; all after one round of loads,
    and within each warp."""
    WARPS: gl.constexpr = gl.num_warps()
    EACH: gl.constexpr = gl.BlockedLayout([(SEQUENCES + 31) // 32], [32], [WARPS], [0])
    lane = gl.arange(0, SEQUENCES, layout=EACH)
    starts = gl.load(query_start + lane, mask=lane < sequences, other=1 << 30)
    ends = gl.load(query_start + 1 + lane, mask=lane < sequences, other=0)
    contexts = gl.load(context_len + lane, mask=lane < sequences, other=0)
    sequence = gl.sum((starts // TOKENS + lane <= program).to(gl.int32), 0) - 1
    here = lane == sequence
    first = gl.sum(gl.where(here, starts, 0), 0)
    count = gl.sum(gl.where(here, ends, 0), 0) - first
    begin = (program - first // TOKENS - sequence) * TOKENS
    return sequence, first, begin, count, gl.sum(gl.where(here, contexts, 0), 0)


@gluon.jit
def _ids(blocks, tile, end, part, KEYS: gl.constexpr, BLOCK: gl.constexpr, PART: gl.constexpr):
    """[parts] int32: the block of each part of a tile; any for those from `end` on.

    Without a mask: that would be a branch, at which products in flight are waited for.
    """
    n = gl.maximum(gl.minimum(tile * KEYS + part * PART, end - 1), 0)
    return gl.load(blocks + n // BLOCK)


@gluon.jit
def _copy(
    target, source, ids, tile, end, part, inside, column, KEYS: gl.constexpr,
    BLOCK: gl.constexpr, PART: gl.constexpr, STRIDE: gl.constexpr, TILE: gl.constexpr,
    EACH: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile of keys or values to shared memory.

    EACH: none from `end` on, but zeros; else no part that begins there, and anything behind it.
    """
    n = tile * KEYS + part * PART
    place = (ids.to(gl.int64) * BLOCK + n % BLOCK) * STRIDE
    rows = gl.expand_dims(place, 1) + gl.expand_dims(inside * STRIDE, 0)
    keys = gl.expand_dims(n, 1) + gl.expand_dims(inside * (1 if EACH else 0), 0)
    rows = gl.multiple_of(gl.reshape(rows, [KEYS]), 16)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, TILE), assert_trivial=True)
    there = gl.reshape(keys, [KEYS]) < end
    there = gl.convert_layout(there, gl.SliceLayout(1, TILE), assert_trivial=True)
    at = source + gl.expand_dims(rows, 1) + gl.expand_dims(column, 0)
    copy_to_shared(target, at, mask=gl.expand_dims(there, 1))


@gluon.jit
def _first_seen(position, WINDOW: gl.constexpr):
    """As `attention_parts.first_seen`."""
    first = position * 0
    if WINDOW > 0:
        first = gl.maximum(position - WINDOW + 1, 0)
    elif WINDOW < 0:
        CHUNK: gl.constexpr = -WINDOW
        first = gl.maximum(position, 0)
        first -= first % CHUNK
    return first


@gluon.jit
def _weights(
    score, peak, total, n, position, end, scale, softcap, MASKED: gl.constexpr,
    WINDOW: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """(exponentials, their peak, their sum so far, by what earlier ones shrink)."""
    if CAPPED:
        grown = gl.exp2(score * (-2.0 * LOG2_E * scale / softcap))
        score = softcap * LOG2_E * (2.0 / (1.0 + grown) - 1.0)
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        keys = gl.expand_dims(n, 0)
        rows = gl.expand_dims(position, 1)
        seen = (keys <= rows) & (keys < end)
        if WINDOW != 0:
            seen = seen & (keys >= gl.expand_dims(_first_seen(position, WINDOW), 1))
        score = gl.where(seen, score, float("-inf"))
    higher = gl.maximum(peak, gl.max(score, 1) * factor)
    safe = higher
    if MASKED:
        safe = gl.where(higher == float("-inf"), 0.0, higher)
    shrink = gl.exp2(peak - safe)
    p = gl.exp2(score * factor - gl.expand_dims(safe, 1))
    return p, higher, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _advance(
    next, p, accumulated, peak, total, ids_now, ids_next, q, k, v, keys, values, blocks, end, part,
    inside, column, position, scale, softcap, KEYS: gl.constexpr, BLOCK: gl.constexpr,
    PART: gl.constexpr, STRIDE: gl.constexpr, TILE: gl.constexpr, SCORES: gl.constexpr,
    RESULT: gl.constexpr, MASKED: gl.constexpr, WINDOW: gl.constexpr, CAPPED: gl.constexpr,
):  # fmt: skip
    """Multiply the exponentials `p` of the tile before `next`, and find those of `next`.

    ids_now, ids_next: blocks of the tile `next` and of the one behind it.
    """
    ROWS: gl.constexpr = p.shape[0]
    async_copy.wait_group(0)
    nothing = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    score = warpgroup_mma(
        q, k.index(next % 2).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    accumulated = warpgroup_mma(p, v.index((next + 1) % 2), accumulated, is_async=True)
    # nobody reads these buffers any longer: all warps have met since
    _copy(
        v.index(next % 2), values, ids_now, next, end, part, inside, column, KEYS, BLOCK, PART,
        STRIDE, TILE, MASKED,
    )  # fmt: skip
    _copy(
        k.index((next + 1) % 2), keys, ids_next, next + 1, end, part, inside, column, KEYS, BLOCK,
        PART, STRIDE, TILE, False,
    )  # fmt: skip
    async_copy.commit_group()
    ids_now = ids_next
    ids_next = _ids(blocks, next + 2, end, part, KEYS, BLOCK, PART)
    score = warpgroup_mma_wait(1, deps=[score])
    n = next * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
    found, peak, total, shrink = _weights(
        score, peak, total, n, position, end, scale, softcap, MASKED, WINDOW, CAPPED
    )
    following = gl.convert_layout(found.to(q.dtype), gl.DotOperandLayout(0, RESULT, 2))
    # all of them, or else the compiler moves the exponentials behind the wait
    accumulated, _, p = warpgroup_mma_wait(0, deps=[accumulated, p, following])
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, RESULT))
    accumulated = accumulated * gl.expand_dims(shrink, 1)
    return p, accumulated, peak, total, ids_now, ids_next


@gluon.jit(do_not_specialize=["sequences", "max_blocks", "tokens", "splits"])
def attend_prompts_hopper(
    query, key_cache, value_cache, query_start, context_len, block_tables, sinks, out, partial,
    peaks, sums, sequences, max_blocks, tokens, splits, scaling, softcap, query_token, query_head,
    SEQUENCES: gl.constexpr, BLOCK: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    DIM: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    SPLIT: gl.constexpr, WINDOW: gl.constexpr, CAPPED: gl.constexpr, SINKS: gl.constexpr,
    PART: gl.constexpr, PARTS: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    kv_head = gl.program_id(0)
    split = gl.program_id(2)
    # the last tokens of a sequence have the most keys
    program = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence, first, begin, count, context = _queries_of(
        program, query_start, context_len, sequences, SEQUENCES, TOKENS
    )
    if begin < count:
        SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, KEYS, 16])
        RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DIM, 16])
        BY_ROW: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [WARPS, 1], [1, 0])
        STRIDE: gl.constexpr = KV_HEADS * DIM
        SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        element: gl.constexpr = query.dtype.element_ty
        q = gl.allocate_shared_memory(element, [ROWS, DIM], SHARED)
        k = gl.allocate_shared_memory(element, [2, KEYS, DIM], SHARED)
        v = gl.allocate_shared_memory(element, [2, KEYS, DIM], SHARED)

        # the keys that any row of this program sees, and this split's part of them
        last = gl.minimum(context, context - count + begin + TOKENS)
        low = _first_seen(context - count + begin, WINDOW) // KEYS
        high = (last + KEYS - 1) // KEYS
        if SPLIT:
            share = (high - low + splits - 1) // splits
            low = low + split * share
            high = gl.minimum(high, low + share)
        end = gl.minimum(last, high * KEYS)

        blocks = block_tables + sequence * max_blocks
        keys = key_cache + kv_head * DIM
        values = value_cache + kv_head * DIM
        part = gl.arange(0, KEYS // PART, layout=gl.SliceLayout(1, PARTS))
        inside = gl.arange(0, PART, layout=gl.SliceLayout(0, PARTS))
        column = gl.arange(0, DIM, layout=gl.SliceLayout(0, TILE))
        r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
        taken = begin + r // GROUP
        token = (first + taken).to(gl.int64)
        at = token * query_token + (kv_head * GROUP + r % GROUP) * query_head
        across = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, BY_ROW)), 0)
        copy_to_shared(
            q,
            query + gl.expand_dims(at, 1) + across,
            mask=gl.expand_dims((r < TOKENS * GROUP) & (taken < count), 1),
        )
        ids = _ids(blocks, low, end, part, KEYS, BLOCK, PART)
        ids_now = _ids(blocks, low + 1, end, part, KEYS, BLOCK, PART)
        ids_next = _ids(blocks, low + 2, end, part, KEYS, BLOCK, PART)
        _copy(
            k.index(low % 2), keys, ids, low, end, part, inside, column, KEYS, BLOCK, PART, STRIDE,
            TILE, False,
        )  # fmt: skip
        async_copy.commit_group()
        _copy(
            v.index(low % 2), values, ids, low, end, part, inside, column, KEYS, BLOCK, PART,
            STRIDE, TILE, True,
        )  # fmt: skip
        _copy(
            k.index((low + 1) % 2), keys, ids_now, low + 1, end, part, inside, column, KEYS, BLOCK,
            PART, STRIDE, TILE, False,
        )  # fmt: skip
        async_copy.commit_group()

        r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        taken = begin + r // GROUP
        row_ok = (r < TOKENS * GROUP) & (taken < count)
        position = context - count + taken
        head = kv_head * GROUP + r % GROUP
        peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        if SINKS:
            if split == 0:
                sink = gl.load(sinks + head, mask=row_ok, other=0.0).to(gl.float32)
                peak = sink * LOG2_E
                total = total + 1.0
        scale = scaling
        if not CAPPED:
            scale = scaling * LOG2_E
        async_copy.wait_group(1)
        score = warpgroup_mma(
            q,
            k.index(low % 2).permute((1, 0)),
            gl.zeros([ROWS, KEYS], gl.float32, SCORES),
            use_acc=False,
        )
        n = low * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        found, peak, total, _shrink = _weights(
            score, peak, total, n, position, end, scale, softcap, True, WINDOW, CAPPED
        )
        p = gl.convert_layout(found.to(element), gl.DotOperandLayout(0, RESULT, 2))
        accumulated = gl.zeros([ROWS, DIM], gl.float32, RESULT)
        middle = low + 1
        if WINDOW == 0:
            # up to here every row sees every key
            whole = gl.minimum((context - count + begin + 1) // KEYS, high)
            middle = gl.maximum(whole, middle)
            for tile in range(low + 1, middle):
                p, accumulated, peak, total, ids_now, ids_next = _advance(
                    tile, p, accumulated, peak, total, ids_now, ids_next, q, k, v, keys, values,
                    blocks, end, part, inside, column, position, scale, softcap, KEYS, BLOCK, PART,
                    STRIDE, TILE, SCORES, RESULT, False, WINDOW, CAPPED,
                )  # fmt: skip
        for tile in range(middle, high):
            p, accumulated, peak, total, ids_now, ids_next = _advance(
                tile, p, accumulated, peak, total, ids_now, ids_next, q, k, v, keys, values,
                blocks, end, part, inside, column, position, scale, softcap, KEYS, BLOCK, PART,
                STRIDE, TILE, SCORES, RESULT, True, WINDOW, CAPPED,
            )  # fmt: skip
        async_copy.wait_group(0)
        accumulated = warpgroup_mma(p, v.index(gl.maximum(high - 1, low) % 2), accumulated)

        heads = KV_HEADS * GROUP
        whole_total = gl.convert_layout(total, gl.SliceLayout(1, RESULT))
        if not SPLIT:
            # no key at all is a row of padding
            whole_total = gl.where(whole_total == 0.0, 1.0, whole_total)
            result = (accumulated / gl.expand_dims(whole_total, 1)).to(element)
            result = gl.convert_layout(result, BY_ROW)
            r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
            taken = begin + r // GROUP
            ok = (r < TOKENS * GROUP) & (taken < count)
            place = (first + taken).to(gl.int64) * heads + kv_head * GROUP + r % GROUP
            where = out + gl.expand_dims(place * DIM, 1) + across
            gl.store(where, result, mask=gl.expand_dims(ok, 1))
        else:
            place = (split * tokens + first + taken).to(gl.int64) * heads + head
            gl.store(peaks + place, peak, mask=row_ok)
            gl.store(sums + place, total, mask=row_ok)
            r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, RESULT))
            taken = begin + r // GROUP
            ok = (r < TOKENS * GROUP) & (taken < count)
            place = (split * tokens + first + taken).to(gl.int64) * heads
            place = place + kv_head * GROUP + r % GROUP
            column = gl.expand_dims(gl.arange(0, DIM, layout=gl.SliceLayout(0, RESULT)), 0)
            where = partial + gl.expand_dims(place * DIM, 1) + column
            gl.store(where, accumulated, mask=gl.expand_dims(ok, 1))


@cache
def layouts(keys: int, block: int, dim: int, warps: int) -> dict[str, Any]:
    """The constants by which a tile of keys is copied.

    A warp takes rows of one block, if it can, so that a lane asks for one block id. All are powers
    of two; a lane copies 8 numbers at once.
    """
    part = min(block, keys)
    lanes = 256 // dim  # along the rows
    over_parts = min(warps, keys // part)
    blocked = gl.BlockedLayout(
        [1, 1, 8], [1, lanes, dim // 8], [over_parts, warps // over_parts, 1], [2, 1, 0]
    )
    bits = [1 << i for i in range((keys - 1).bit_length())]
    lane_rows = bits[: lanes.bit_length() - 1]
    within = (part - 1).bit_length()
    warp_rows = bits[len(lane_rows) : within][: (warps // over_parts).bit_length() - 1]
    warp_rows += bits[within:][: over_parts.bit_length() - 1]
    register_rows = [bit for bit in bits if bit not in lane_rows + warp_rows]
    across = [1 << i for i in range((dim - 1).bit_length())]
    tile = gl.DistributedLinearLayout(
        reg_bases=[[0, c] for c in across[:3]] + [[r, 0] for r in register_rows],
        lane_bases=[[0, c] for c in across[3:]] + [[r, 0] for r in lane_rows],
        warp_bases=[[r, 0] for r in warp_rows],
        block_bases=[],
        shape=[keys, dim],
    )
    return {"PART": part, "PARTS": gl.SliceLayout(2, blocked), "TILE": tile}
