"""The kernels of a combine: send results and flags, wait, and sum. See wait_kernels.py.

Weights are given with the dispatch, or only with the combine. Then each home first writes its own
into the windows of its peers (`share_weights`); who has them sends partial sums, so that one row
comes back from each rank that a token went to, not one for each choice. A rank whose sending half
must not wait for its peers sends a row for each choice all the same: its flag says which, and
`reduce` takes either.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.comm.cuda.wait_kernels import (
    ACTIVE,
    ARRIVED,
    COMBINE_FLAGS,
    COMBINE_FORMATS,
    COUNTERS,
    LANE,
    LANES,
    PEER,
    RETURNED,
    active_of,
    await_combine,
    await_weights,
    part_of,
    raise_weights_flags,
    tag_of,
)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _asked(expert_ids, owner, experts, t, K: tl.constexpr, LANES_K: tl.constexpr):
    """The ids that own experts of an own token, as bits."""
    k = tl.arange(0, LANES_K)
    e = tl.load(expert_ids + t * K + k, mask=k < K, other=-1).to(tl.int32)
    known = (e >= 0) & (e < experts)
    r = tl.load(owner + e, mask=known, other=-1).to(tl.int64)
    one = tl.full((LANES_K,), 1, tl.int64)
    return tl.reduce(tl.where(r >= 0, one << tl.maximum(r, 0), 0), 0, _or)


@triton.jit
def _partial(
    y, position, weights, pair, c, inside, H: tl.constexpr, TOPK: tl.constexpr, SHARED: tl.constexpr
):  # fmt: skip
    """Σ weight · y of one token's pairs here, in float32 and in the order of choices.

    SHARED: the weights are those of the combine; a row whose weight is 0 is not looked at.
    """
    acc = tl.zeros(c.shape, tl.float32)
    for k in tl.static_range(TOPK):
        p = tl.load(position + pair + k)
        w = tl.load(weights + pair + k)
        if SHARED:
            p = tl.where(w == 0.0, -1, p)
        v = tl.load(y + p.to(tl.int64) * H + c, mask=inside & (p >= 0), other=0.0)
        acc += tl.where(p >= 0, w, 0.0) * v.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["tokens", "me"])
def share_weights(
    weights, expert_ids, table, window, tokens, me,
    R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr,
    WEIGHTS_AT: tl.constexpr, CHUNK: tl.constexpr, SEND: tl.constexpr, WAIT: tl.constexpr,
    CHECKS: tl.constexpr, SIM: tl.constexpr,
):  # fmt: skip
    """Weights of the own tokens into all windows, the own one too, and those of the peers here; one
    program. weights, expert_ids: [tokens, K]; an expert that is -1 has weight 0."""
    ids = tl.arange(0, LANES)
    up = active_of(table, ids, R, CHECKS) & (ids != me)
    if SEND:
        i = tokens * 0
        while i < tokens * K:
            at = i + tl.arange(0, CHUNK)
            there = at < tokens * K
            e = tl.load(expert_ids + at, mask=there, other=-1)
            w = tl.load(weights + at, mask=there & (e >= 0), other=0.0)
            for r in range(R):
                if (tl.load(table + ACTIVE + r) != 0) | (r == me):
                    lane = tl.load(table + LANE + r)
                    place = (lane * MAX_TOKENS + at // K) * TOPK + at % K
                    theirs = part_of(tl.load(table + PEER + r), WEIGHTS_AT, tl.float32)
                    tl.store(theirs + place, w, mask=there)
            i += CHUNK
        tl.debug_barrier()
        raise_weights_flags(table, me, up, CHECKS)
    if WAIT:
        await_weights(table, window, up, CHECKS, SIM)


@triton.jit(do_not_specialize=["tokens", "me", "experts"])
def send_combine(
    out, y, position, expert_ids, owner, table, counters, window, tokens, me, experts,
    R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, LANES_K: tl.constexpr,
    MAX_TOKENS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, WEIGHTS_AT: tl.constexpr,
    RESULTS_AT: tl.constexpr, HOME: tl.constexpr, SHARED: tl.constexpr, SOURCE: tl.constexpr,
    FORMAT: tl.constexpr,
    WAIT: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr,
):  # fmt: skip
    """The last program waits if WAIT; the others share (token that came, piece of a row).

    The peers' tokens come first, then the flags, and the own tokens' partial sums last: they are
    made while the peers' flags are on their way. An own token that nobody else has to do with goes
    straight to `out`: where there can be no other rank, that is all.

    y: [rows, H]. position: [R * MAX_TOKENS * TOPK] int32, the row of y of each pair, of index_rows
    or the places of expert_major.py. -1: no row is here; below: its result is zero.
    HOME: peers get a row for each choice. SHARED: weights came by `share_weights`, those of peers
    unless HOME; own rows are summed here in any case. SOURCE: rows between the partial sums of two
    ranks. FORMAT: see `combine_format`.
    """
    pid = tl.program_id(0)
    workers = tl.num_programs(0)
    if WAIT:
        workers -= 1
    if WAIT and pid == workers:
        await_combine(table, window, me, R, CHECKS, SIM)
    else:
        PIECES: tl.constexpr = (H + WIDTH - 1) // WIDTH
        kind: tl.constexpr = y.dtype.element_ty
        ids = tl.arange(0, LANES)
        up = active_of(table, ids, R, CHECKS) & (ids != me)
        arrived = tl.load(table + ARRIVED + ids).to(tl.int32)
        n = tl.where(up, tl.minimum(tl.maximum(arrived, 0), MAX_TOKENS), 0)
        ends = tl.cumsum(n, 0)
        away = tl.sum(n, 0) * PIECES
        weights = part_of(window, WEIGHTS_AT, tl.float32)
        item = pid
        while item < away:
            token = item // PIECES
            home = tl.sum((token >= ends).to(tl.int32), 0)
            t = token - tl.sum(tl.where(ids < home, n, 0), 0)
            pair = (home * MAX_TOKENS + t).to(tl.int64) * TOPK
            c = (item % PIECES) * WIDTH + tl.arange(0, WIDTH)
            inside = c < H
            results = part_of(tl.load(table + PEER + home), RESULTS_AT, kind)
            lane = tl.load(table + LANE + home)
            if HOME:
                back = lane * MAX_TOKENS + t
                for k in tl.static_range(TOPK):
                    p = tl.load(position + pair + k)
                    v = tl.load(y + p.to(tl.int64) * H + c, mask=inside & (p >= 0), other=0.0)
                    tl.store(results + (back * TOPK + k) * H + c, v, mask=inside & (p != -1))
            else:
                acc = _partial(y, position, weights, pair, c, inside, H, TOPK, SHARED)
                back = lane * SOURCE + t
                tl.store(results + back * H + c, acc.to(kind), mask=inside)
            item += workers
        busy = tl.maximum(tl.minimum(away, workers), 1)
        if pid < busy:
            tl.debug_barrier()
            done = tl.atomic_add(counters + COUNTERS, 1, sem="acq_rel", scope="gpu")
            if done == busy - 1:
                tl.store(counters + COUNTERS, 0)
                peers = tl.load(table + PEER + ids, mask=up, other=0)
                flags = (peers + COMBINE_FLAGS).to(tl.pointer_type(tl.int64))
                value = tag_of(table, ids, 0, CHECKS)
                if SHARED and not HOME:
                    value = value | 1
                formats = (peers + COMBINE_FORMATS).to(tl.pointer_type(tl.int64))
                tl.store(formats + me, FORMAT, mask=up)
                tl.atomic_xchg(flags + me, value, mask=up, sem="release", scope="sys")
        if SHARED or not HOME:  # else `reduce` reads own rows from where they are
            item -= away
            while item < tokens * PIECES:
                t = item // PIECES
                c = (item % PIECES) * WIDTH + tl.arange(0, WIDTH)
                inside = c < H
                own = (me * MAX_TOKENS + t).to(tl.int64)
                asked = _asked(expert_ids, owner, experts, t, K, LANES_K)
                acc = _partial(y, position, weights, own * TOPK, c, inside, H, TOPK, SHARED)
                alone = asked == (tl.full((), 1, tl.int64) << me)
                if R == 1:  # a token without experts, too
                    alone = t >= 0
                results = part_of(window, RESULTS_AT, kind)
                mine = (me * SOURCE + t).to(tl.int64)
                tl.store(results + mine * H + c, acc.to(kind), mask=inside & (alone == 0))
                whole = (0.0 + acc.to(kind).to(tl.float32)).to(kind)
                tl.store(out + t.to(tl.int64) * H + c, whole, mask=inside & alone)
                item += workers


@triton.jit(do_not_specialize=["me"])
def wait_combine(table, window, me, R: tl.constexpr, CHECKS: tl.constexpr, SIM: tl.constexpr):
    """The waiting half of a combine that is split."""
    await_combine(table, window, me, R, CHECKS, SIM)


@triton.jit
def _add_rows(
    acc, y, position, expert_ids, weights, owner, table, results, t, c, inside, me, experts,
    R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr,
    H: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """acc + Σ weight · row, in the order of choices, of the peers that sent a row for each; and,
    if OWN, of the rows that are here."""
    own = (me * MAX_TOKENS + t).to(tl.int64) * TOPK
    for k in tl.static_range(K):
        e = tl.load(expert_ids + t * K + k).to(tl.int32)
        known = (e >= 0) & (e < experts)
        r = tl.load(owner + e, mask=known, other=-1)
        back = tl.load(table + RETURNED + r, mask=(r >= 0) & (r < R), other=0) == 1
        back = back & (r != me)
        theirs = ((r * MAX_TOKENS + t).to(tl.int64) * TOPK + k) * H
        v = tl.load(results + theirs + c, mask=inside & back, other=0.0)
        if OWN:
            p = tl.load(position + own + k)
            p = tl.where(known & (r == me), p, -1)
            u = tl.load(y + p.to(tl.int64) * H + c, mask=inside & (p >= 0), other=0.0)
            w = tl.load(weights + t * K + k, mask=back | (p >= 0), other=0.0)
            acc += w * tl.where(back, v, u).to(tl.float32)
        else:
            w = tl.load(weights + t * K + k, mask=back, other=0.0)
            acc += w * v.to(tl.float32)
    return acc


@triton.jit
def _add_sums(
    acc, table, results, asked, t, c, inside, me,
    R: tl.constexpr, SOURCE: tl.constexpr, H: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """acc + the partial sums of the ranks that sent them and the own one, in the order of ranks."""
    for i in tl.static_range(R):
        how = tl.load(table + RETURNED + i)
        if SHARED:
            use = (how == 2) | (i == me)
        else:
            use = (how != 0) | (i == me)
        use = use & (((asked >> i) & 1) != 0)
        theirs = (i * SOURCE + t).to(tl.int64) * H
        v = tl.load(results + theirs + c, mask=inside & use, other=0.0)
        acc += v.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["tokens", "me", "experts"])
def reduce(
    out, y, position, expert_ids, weights, owner, table, window, tokens, me, experts,
    R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, LANES_K: tl.constexpr,
    MAX_TOKENS: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    RESULTS_AT: tl.constexpr, HOME: tl.constexpr, SHARED: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The programs share (own token, piece of a row): its sum.

    "rank": partial sums in the order of ranks, the own one among them; HOME: rows in the order of
    choices, the same whatever the placement. In float32. SHARED: from each source what it chose to
    send, and the own partial sums.
    """
    pid = tl.program_id(0)
    if pid == 0:
        # who returned nothing is not waited for again; no program of this launch reads ACTIVE
        ids = tl.arange(0, LANES)
        active = tl.load(table + ACTIVE + ids)
        returned = tl.load(table + RETURNED + ids)
        tl.store(table + ACTIVE + ids, tl.where((returned == 0) & (ids != me), 0, active))
    lanes = tl.arange(0, LANES)
    how = tl.load(table + RETURNED + lanes)
    chosen = tl.sum(((how == 1) & (lanes != me)).to(tl.int32), 0)  # who sent rows of choices
    PIECES: tl.constexpr = (H + WIDTH - 1) // WIDTH
    kind: tl.constexpr = y.dtype.element_ty
    results = part_of(window, RESULTS_AT, kind)
    item = pid
    while item < tokens * PIECES:
        t = item // PIECES
        c = (item % PIECES) * WIDTH + tl.arange(0, WIDTH)
        inside = c < H
        acc = tl.zeros((WIDTH,), tl.float32)
        if SHARED or not HOME:
            asked = _asked(expert_ids, owner, experts, t, K, LANES_K)
            inside = inside & (asked != (tl.full((), 1, tl.int64) << me))  # else it is there
            acc = _add_sums(acc, table, results, asked, t, c, inside, me, R, SOURCE, H, SHARED)
            if SHARED:
                if chosen > 0:
                    acc = _add_rows(
                        acc, y, position, expert_ids, weights, owner, table, results, t, c,
                        inside, me, experts, R, K, TOPK, MAX_TOKENS, H, False,
                    )  # fmt: skip
        else:
            acc = _add_rows(
                acc, y, position, expert_ids, weights, owner, table, results, t, c,
                inside, me, experts, R, K, TOPK, MAX_TOKENS, H, True,
            )  # fmt: skip
        tl.store(out + t.to(tl.int64) * H + c, acc.to(kind), mask=inside)
        item += tl.num_programs(0)
