"""From logits to tokens in one kernel: temperature, min-p, top-k, top-p, and the token of a number.

A program has a row. What top-k and top-p keep is found without sorting: logits are read as whole
numbers in the same order, and the least that is kept is searched for by halves, 16 looks at a row
in bfloat16 and 32 in float32, which find it in the cache. Of tokens that are equally likely at that
border those with the lowest ids are kept, as many as there is room for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SETTINGS = 5
"""Numbers for each row: 1 / temperature (0: the likeliest token), min-p, top-p, top-k, and the
uniform number in [0, 1) that picks."""

_BLOCK = 8192  # logits of one look


@triton.jit
def _logits(words, start, lane, vocab, HALF: tl.constexpr):
    """(float32, whole numbers in their order) of a block; -inf behind the row."""
    there = start + lane < vocab
    if HALF:
        bits = tl.load(words + start + lane, mask=there, other=-128).to(tl.int32) << 16
    else:
        bits = tl.load(words + start + lane, mask=there, other=-8388608)
    bits = tl.where(bits == -2147483648, 0, bits)  # -0 is 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if HALF:
        key = key >> 16
    return bits.to(tl.float32, bitcast=True), key


@triton.jit
def _logit_of(key, HALF: tl.constexpr):
    if HALF:
        key = tl.where(key < 0, (key << 16) | 0xFFFF, key << 16)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, largest, inverse, min_p):
    w = tl.exp((x - largest) * inverse)
    return tl.where(w >= min_p, w, 0.0)


@triton.jit
def _count(words, vocab, least, HALF: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        _, key = _logits(words, start, lane, vocab, HALF)
        count += ((key >= least) & (start + lane < vocab)).to(tl.int32)
    return tl.sum(count, 0)


@triton.jit
def _mass(words, vocab, least, largest, inverse, min_p, HALF: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    mass = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        x, key = _logits(words, start, lane, vocab, HALF)
        mass += tl.where(key >= least, _weight(x, largest, inverse, min_p), 0.0)
    return tl.sum(mass, 0)


@triton.jit
def _middle(low, high):
    """Between them, nearer to high; of int32 whose difference may be more than one holds."""
    return (low.to(tl.int64) + (high.to(tl.int64) - low.to(tl.int64) + 1) // 2).to(tl.int32)


@triton.jit(do_not_specialize=["vocab", "stride", "rows"])
def _choose_tokens(
    words,
    settings,
    tokens,
    possible,
    vocab,
    stride,
    rows,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    words += row.to(tl.int64) * stride
    inverse = tl.load(settings + row).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = lane
    for start in range(0, vocab, BLOCK):
        x, _ = _logits(words, start, lane, vocab, HALF)
        at = tl.where(x > best, start + lane, at)
        best = tl.where(x > best, x, best)
    largest = tl.max(best, 0)
    likeliest = tl.min(tl.where(best == largest, at, vocab), 0)
    likeliest = tl.where(likeliest < vocab, likeliest, 0)
    tl.store(possible + row, largest)
    if inverse == 0:
        tl.store(tokens + row, likeliest.to(tl.int64))
    else:
        min_p = tl.load(settings + rows + row).to(tl.float32)
        top_p = tl.load(settings + 2 * rows + row).to(tl.float32)
        top_k = tl.load(settings + 3 * rows + row).to(tl.int32)
        u = tl.load(settings + 4 * rows + row)
        _, keys = _logits(words, likeliest + lane * 0, 0, vocab, HALF)
        top = tl.max(keys, 0)
        # kept are all above `border`, and the first `room` at it
        border = tl.full((), -32768 if HALF else -2147483648, tl.int32)
        room = vocab
        if top_k < vocab:
            high = top
            while border < high:
                middle = _middle(border, high)
                if _count(words, vocab, middle, HALF, BLOCK) >= top_k:
                    border = middle
                else:
                    high = middle - 1
            room = top_k - _count(words, vocab, border + 1, HALF, BLOCK)
        at_border = _weight(_logit_of(border, HALF), largest, inverse, min_p)
        at_border = tl.where(top_k < vocab, at_border, 0.0)
        mass = _mass(words, vocab, border + 1, largest, inverse, min_p, HALF, BLOCK)
        mass += room * at_border
        if top_p < 1:
            goal = top_p * mass
            low = border
            high = top
            while low < high:
                middle = _middle(low, high)
                if _mass(words, vocab, middle, largest, inverse, min_p, HALF, BLOCK) >= goal:
                    low = middle
                else:
                    high = middle - 1
            above = _mass(words, vocab, low + 1, largest, inverse, min_p, HALF, BLOCK)
            at_border = _weight(_logit_of(low, HALF), largest, inverse, min_p)
            needed = tl.where(at_border > 0, tl.ceil((goal - above) / at_border), 1.0)
            needed = tl.minimum(tl.maximum(needed, 1.0), vocab).to(tl.int32)
            room = tl.where(low == border, tl.minimum(room, needed), needed)
            border = low
            mass = above + room * at_border
        goal_of_pick = u * mass.to(tl.float64)
        before = goal_of_pick * 0
        seen = room * 0
        chosen = vocab
        last = likeliest
        for start in range(0, vocab, BLOCK):
            x, key = _logits(words, start, lane, vocab, HALF)
            w = _weight(x, largest, inverse, min_p)
            tied = ((key == border) & (start + lane < vocab)).to(tl.int32)
            among = tl.sum(tied, 0)
            kept = (key > border) | ((tied > 0) & (seen + among <= room))
            if (among > 0) & (seen < room) & (seen + among > room):
                kept = (key > border) | ((tied > 0) & (seen + tl.cumsum(tied, 0) <= room))
            w = tl.where(kept, w, 0.0)
            here = tl.sum(w, 0).to(tl.float64)
            if (chosen == vocab) & (before + here > goal_of_pick):
                over = (before + tl.cumsum(w, 0).to(tl.float64) > goal_of_pick) & (w > 0)
                chosen = tl.min(tl.where(over, start + lane, vocab), 0)
            last = tl.maximum(last, tl.max(tl.where(w > 0, start + lane, 0), 0))
            before += here
            seen += among
        chosen = tl.where(chosen < vocab, chosen, last)
        tl.store(tokens + row, chosen.to(tl.int64))


def choose_tokens(logits: Tensor, settings: Tensor, tokens: Tensor) -> Tensor:
    """tokens [n] int64 ← of each row of logits.

    Args:
        logits: [n, vocab], a row contiguous.
        settings: [`SETTINGS`, n] float64, contiguous.

    Returns:
        [n] float32, the largest logit of each row; -inf: no token was possible, and 0 was chosen.
    """
    if logits.dtype is not torch.bfloat16:
        logits = logits.float()
    half = logits.dtype is torch.bfloat16
    rows, vocab = logits.shape
    possible = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _choose_tokens[(rows,)](
        logits.view(torch.int16 if half else torch.int32),
        settings,
        tokens,
        possible,
        vocab,
        logits.stride(0),
        rows,
        HALF=half,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=16,
    )
    return possible
