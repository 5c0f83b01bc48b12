"""Products of one row with its expert's MXFP4 weights, without tensor cores.

With a row or two for an expert, bringing weights into the order of the tensor cores takes longer
than they come from memory. Here a thread multiplies what it has loaded where it lies.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32
BLOCKS = 16
WARPS = 4


@triton.jit
def _value(words, at: tl.constexpr):
    """Of the code at bits 4 * at … of each word, times 2 ** -126: exponent and mantissa of e2m1
    mean the same in a float32, but for that power; what the arithmetic shift spreads is cut off."""
    bits = ((words << (28 - 4 * at)) >> 6) & -2118123520  # 0x81c00000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _blocks_dot(weight, scales, x, first, k, K, lane, word):
    """[columns, blocks] of x · w for the blocks from column k on.

    weight: of int32 words. first: [columns], each row's first block.
    """
    block = k // 32 + lane
    ok = block < K // 32
    at = first[:, None] + block[None, :]
    power = tl.load(scales + at, mask=ok[None, :], other=127).to(tl.int32)
    words = tl.load(
        weight + at[:, :, None] * 4 + word[None, None, :], mask=ok[None, :, None], other=0
    )
    source = x + block[:, None] * 32 + word[None, :] * 8
    total = tl.zeros(words.shape, tl.float32)
    for i in tl.static_range(8):
        along = tl.load(source + i, mask=ok[:, None], other=0.0).to(tl.float32)
        total += _value(words, i) * (along * 1.2676506002282294e30)[None, :, :]
    # x was times 2 ** 100, to stay among the normal numbers; 2 ** 26 is left
    exponent = tl.where(power == 0, 1 << 22, power << 23)
    exponent = tl.where(power == 255, 0x7FC00000, exponent)
    return tl.sum(total, 2) * 67108864.0 * exponent.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["slots"])
def _row_product(
    x,
    index,
    weights,
    scales,
    biases,
    offsets,
    out,
    slots,
    K,
    N,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GATED: tl.constexpr,
    INDEXED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """out[r] = x[index[r]] · W[slot of r]ᵀ; GATED: silu of the first N columns times the rest."""
    slot_lane = tl.arange(0, SLOTS)
    ends = tl.load(offsets + slot_lane + 1, mask=slot_lane < slots, other=2147483647)
    total = tl.load(offsets + slots)
    row = tl.program_id(1)
    while row < total:
        slot = tl.sum((ends <= row).to(tl.int32), 0)
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        column_ok = column < N
        kept = tl.where(column_ok, column, 0)
        source = row.to(tl.int64)
        if INDEXED:
            source = tl.load(index + row).to(tl.int64)
        weight = tl.load(weights + slot).to(tl.pointer_type(tl.int32))
        weight = tl.multiple_of(weight, 16)
        scale = tl.load(scales + slot).to(tl.pointer_type(tl.uint8))
        lane = tl.arange(0, BLOCKS)
        word = tl.arange(0, 4)
        own = x + source * K
        sums = tl.zeros((COLUMNS, BLOCKS), tl.float32)
        raised = tl.zeros((COLUMNS, BLOCKS), tl.float32)
        for k in range(0, K, 32 * BLOCKS):
            sums += _blocks_dot(weight, scale, own, kept * (K // 32), k, K, lane, word)
            if GATED:
                raised += _blocks_dot(weight, scale, own, (kept + N) * (K // 32), k, K, lane, word)
        y = tl.sum(sums, 1)
        z = tl.sum(raised, 1)
        if BIASED:
            bias = tl.load(biases + slot).to(tl.pointer_type(x.dtype.element_ty))
            y += tl.load(bias + kept).to(tl.float32)
            if GATED:
                z += tl.load(bias + N + kept).to(tl.float32)
        if GATED:
            y = y * tl.sigmoid(y) * z
        tl.store(out + row.to(tl.int64) * N + column, y.to(out.dtype.element_ty), mask=column_ok)
        row += tl.num_programs(1)


def row_product(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    index: Tensor | None,
    biases: Tensor | None,
    gated: bool,
    programs: int,
) -> Tensor:
    """As `grouped_product` with MXFP4 weights, for which see its arguments; each row reads its
    expert's weights for itself. programs: take the rows in turn."""
    columns = out.shape[1]
    slots = weights.shape[0]
    _row_product[(triton.cdiv(columns, COLUMNS), programs)](
        x,
        index,
        weights,
        scales,
        biases,
        offsets,
        out,
        slots,
        x.shape[1],
        columns,
        SLOTS=triton.next_power_of_2(slots),
        COLUMNS=COLUMNS,
        BLOCKS=BLOCKS,
        GATED=gated,
        INDEXED=index is not None,
        BIASED=biases is not None,
        num_warps=WARPS,
    )
    return out
