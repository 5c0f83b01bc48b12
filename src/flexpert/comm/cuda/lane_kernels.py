"""The kernels that take what came from other machines out of the host's memory into the window.

No call of the host puts it there: while a kernel waits, the driver may hold up any such call until
that kernel ends, be it for a module that another thread loads, and the kernel would wait for just
what is held up. So what came lies in a lane of the host's memory (host_lane.py), the wait looks for
the flag there, and these kernels, launched behind the wait, copy what it stands for. Where all
ranks are on this machine they are not launched.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

import triton
import triton.language as tl

from flexpert.comm.cuda.wait_kernels import (
    ARRIVED,
    INBOX,
    RETURNED,
    SLOTS,
    part_of,
)


@triton.jit
def _copy(source, target, WORDS: tl.constexpr, TILE: tl.constexpr):
    """Words of a row. The host has written the source since it was last read: no cache counts."""
    for begin in tl.static_range(0, WORDS, TILE):
        c = begin + tl.arange(0, TILE)
        v = tl.load(source + c, mask=c < WORDS, cache_modifier=".cv")
        tl.store(target + c, v, mask=c < WORDS)


@triton.jit
def take_dispatch(
    table, window,
    R: tl.constexpr, TOPK: tl.constexpr, LANES_K: tl.constexpr, MAX_TOKENS: tl.constexpr,
    WORDS: tl.constexpr, BYTES: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr,
    SCALES_TILE: tl.constexpr, WEIGHTS_AT: tl.constexpr, SCALES_AT: tl.constexpr,
    ROWS_AT: tl.constexpr,
):  # fmt: skip
    """The programs share the tokens that came. WORDS: of a row, of 1 byte if BYTES, else of 4.
    SCALES: words of 4 bytes a token has of scales."""
    kind: tl.constexpr = tl.uint8 if BYTES else tl.int32
    k = tl.arange(0, LANES_K)
    for p in range(R):
        inbox = tl.load(table + INBOX + p)
        tokens = tl.load(table + ARRIVED + p).to(tl.int32)
        if (inbox != 0) & (inbox != window):
            t = tl.program_id(0)
            while t < tokens:
                place = (t * 0 + p).to(tl.int64) * MAX_TOKENS + t
                here = t.to(tl.int64)
                slots = part_of(inbox, SLOTS, tl.int32) + here * TOPK + k
                s = tl.load(slots, mask=k < TOPK, other=-1, cache_modifier=".cv")
                tl.store(part_of(window, SLOTS, tl.int32) + place * TOPK + k, s, mask=k < TOPK)
                weights = part_of(inbox, WEIGHTS_AT, tl.float32) + here * TOPK + k
                w = tl.load(weights, mask=k < TOPK, other=0.0, cache_modifier=".cv")
                at_weights = part_of(window, WEIGHTS_AT, tl.float32) + place * TOPK + k
                tl.store(at_weights, w, mask=k < TOPK)
                if tl.max(s, 0) >= 0:
                    source = part_of(inbox, ROWS_AT, kind) + here * WORDS
                    _copy(source, part_of(window, ROWS_AT, kind) + place * WORDS, WORDS, TILE)
                    if SCALES > 0:
                        scales = part_of(inbox, SCALES_AT, tl.int32) + here * SCALES
                        target = part_of(window, SCALES_AT, tl.int32) + place * SCALES
                        _copy(scales, target, SCALES, SCALES_TILE)
                t += tl.num_programs(0)


@triton.jit
def take_weights(
    table, window,
    R: tl.constexpr, TOPK: tl.constexpr, MAX_TOKENS: tl.constexpr, WEIGHTS_AT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The programs share the weights that came for a combine."""
    for p in range(R):
        inbox = tl.load(table + INBOX + p)
        count = tl.load(table + ARRIVED + p).to(tl.int32) * TOPK
        if (inbox != 0) & (inbox != window):
            i = tl.program_id(0) * CHUNK
            while i < count:
                at = i + tl.arange(0, CHUNK)
                source = part_of(inbox, WEIGHTS_AT, tl.float32) + at
                w = tl.load(source, mask=at < count, cache_modifier=".cv")
                lane = (i * 0 + p).to(tl.int64) * MAX_TOKENS * TOPK
                tl.store(part_of(window, WEIGHTS_AT, tl.float32) + lane + at, w, mask=at < count)
                i += CHUNK * tl.num_programs(0)


@triton.jit(do_not_specialize=["tokens", "experts"])
def take_combine(
    expert_ids, owner, table, window, tokens, experts,
    R: tl.constexpr, K: tl.constexpr, TOPK: tl.constexpr, LANES_K: tl.constexpr,
    MAX_TOKENS: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, RESULTS_AT: tl.constexpr,
    HOME: tl.constexpr, SHARED: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The programs share the own tokens: their results from each rank of another machine.

    expert_ids: [tokens, K]. owner: [experts] int32. WORDS: of 4 bytes, of a row. SOURCE, SHARED: as
    in `send_combine`.
    """
    k = tl.arange(0, LANES_K)
    for p in range(R):
        inbox = tl.load(table + INBOX + p)
        how = tl.load(table + RETURNED + p)
        if (inbox != 0) & (inbox != window) & (how != 0):
            if SHARED:
                rows = how == 1  # it sent one for each choice
            else:
                rows = how == (1 if HOME else -1)
            came = part_of(inbox, RESULTS_AT, tl.int32)
            results = part_of(window, RESULTS_AT, tl.int32)
            t = tl.program_id(0)
            while t < tokens:
                e = tl.load(expert_ids + t * K + k, mask=k < K, other=-1).to(tl.int32)
                known = (e >= 0) & (e < experts)
                r = tl.load(owner + e, mask=known, other=-1)
                there = ((r == p) & known).to(tl.int32)
                here = t.to(tl.int64)
                lane = (t * 0 + p).to(tl.int64)
                if tl.max(there, 0) > 0:
                    if rows:
                        for choice in tl.static_range(K):
                            if tl.sum(tl.where(k == choice, there, 0), 0) > 0:
                                at = here * TOPK + choice
                                place = lane * MAX_TOKENS * TOPK + at
                                _copy(came + at * WORDS, results + place * WORDS, WORDS, TILE)
                    else:
                        place = lane * SOURCE + here
                        _copy(came + here * WORDS, results + place * WORDS, WORDS, TILE)
                t += tl.num_programs(0)
