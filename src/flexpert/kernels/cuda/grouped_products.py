"""Products of rows with their own expert's weights; a persistent kernel over tiles of any count.

Rows are sorted by slot, and `offsets` on the device says where each slot's rows lie. Every program
finds its tiles from these, so the grid is fixed, no row is padded to a common number, and an expert
without rows costs nothing. Weights are found through a table of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cuda.multiprocessors import multiprocessor_count


@dataclass(frozen=True, slots=True)
class ProductTiling:
    """How a product is cut. rows, columns, depth: of a tile.

    waves: programs for each multiprocessor, which take several tiles; 0: one for each tile.

    swap: weights are the left operand, whose 64 rows the tensor cores of Hopper take at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swap: bool
    waves: int = 0


@triton.jit
def _tile(pointer, depth, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=depth < K, other=0.0)


@triton.jit
def _dequantized(weight, scale, element: tl.constexpr):
    """As a checkpoint is dequantized: rounded once. Scaling the sums instead takes registers that a
    wide tile does not have (2 to 3 times as long from 32 rows an expert on)."""
    return (weight.to(tl.float32) * scale).to(element)


@triton.jit(do_not_specialize=["slots"])
def _product(
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
    EVEN: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GATED: tl.constexpr,
    INDEXED: tl.constexpr,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[r] = x[index[r]] · W[slot of r]ᵀ; GATED: silu of the first N columns times the rest."""
    lane = tl.arange(0, SLOTS)
    begins = tl.load(offsets + lane, mask=lane < slots, other=0)
    ends = tl.load(offsets + lane + 1, mask=lane < slots, other=0)
    row_tiles = (ends - begins + ROWS - 1) // ROWS
    tiles = row_tiles * ((N + COLUMNS - 1) // COLUMNS)
    past = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        slot = tl.sum((past <= tile).to(tl.int32), 0)
        here = lane == slot
        end = tl.sum(tl.where(here, ends, 0), 0)
        high = tl.sum(tl.where(here, row_tiles, 0), 0)
        place = tile - tl.sum(tl.where(here, past - tiles, 0), 0)
        # tiles of the same weights follow each other, so that the second finds them in the L2
        begin = tl.sum(tl.where(here, begins, 0), 0) + (place % high) * ROWS
        row = begin + tl.arange(0, ROWS)
        column = (place // high) * COLUMNS + tl.arange(0, COLUMNS)
        column_ok = column < N
        kept = tl.where(column_ok, column, 0)
        if INDEXED:
            source = tl.load(index + row, mask=row < end, other=0).to(tl.int64)
        else:
            source = tl.where(row < end, row, begin).to(tl.int64)
        element = x.dtype.element_ty
        kind = tl.float8e4nv if SCALED else element
        weight = tl.load(weights + slot).to(tl.pointer_type(kind))
        weight = tl.multiple_of(weight, 16)
        depth = tl.arange(0, DEPTH)
        if SCALED:
            scale = tl.load(scales + slot).to(tl.pointer_type(tl.float32))
            across = (K + 127) // 128
            scale_row = scale + kept // 128 * across
            raised_row = scale + (kept + N) // 128 * across
        if SWAP:
            accumulated = tl.zeros((COLUMNS, ROWS), tl.float32)
            raised = tl.zeros((COLUMNS, ROWS), tl.float32)
            left = weight + kept[:, None] * K + depth[None, :]
            right = x + source[None, :] * K + depth[:, None]
        else:
            accumulated = tl.zeros((ROWS, COLUMNS), tl.float32)
            raised = tl.zeros((ROWS, COLUMNS), tl.float32)
            left = x + source[:, None] * K + depth[None, :]
            right = weight + kept[None, :] * K + depth[:, None]
        for k in range(0, K, DEPTH):
            a = _tile(left, k + depth[None, :], K, EVEN)
            b = _tile(right, k + depth[:, None], K, EVEN)
            if SCALED:
                by = tl.load(scale_row + k // 128)
                if SWAP:
                    a = _dequantized(a, by[:, None], element)
                else:
                    b = _dequantized(b, by[None, :], element)
            accumulated = tl.dot(a, b, accumulated, input_precision=PRECISION)
            if GATED:
                if SWAP:
                    c = _tile(left + N * K, k + depth[None, :], K, EVEN)
                else:
                    c = _tile(right + N * K, k + depth[:, None], K, EVEN)
                if SCALED:
                    by = tl.load(raised_row + k // 128)
                    if SWAP:
                        c = _dequantized(c, by[:, None], element)
                    else:
                        c = _dequantized(c, by[None, :], element)
                if SWAP:
                    raised = tl.dot(c, b, raised, input_precision=PRECISION)
                else:
                    raised = tl.dot(a, c, raised, input_precision=PRECISION)
            left += DEPTH
            right += DEPTH
        if BIASED:
            bias = tl.load(biases + slot).to(tl.pointer_type(element))
            b = tl.load(bias + kept).to(tl.float32)
            accumulated += b[:, None] if SWAP else b[None, :]
            if GATED:
                b = tl.load(bias + N + kept).to(tl.float32)
                raised += b[:, None] if SWAP else b[None, :]
        if GATED:
            accumulated = accumulated * tl.sigmoid(accumulated) * raised
        if SWAP:
            where = out + row[None, :].to(tl.int64) * N + column[:, None]
            ok = (row < end)[None, :] & column_ok[:, None]
        else:
            where = out + row[:, None].to(tl.int64) * N + column[None, :]
            ok = (row < end)[:, None] & column_ok[None, :]
        tl.store(where, accumulated.to(out.dtype.element_ty), mask=ok)


def choose(
    rows: int, slots: int, *, gated: bool, scaled: bool, dtype: torch.dtype = torch.bfloat16
) -> ProductTiling:
    """A tiling for at most `rows` rows over `slots` experts; see tools/gpu/tune_experts.py.

    Up to some fifty rows an expert the product is as fast as the weights come from memory.
    float32, which is for checking, has one tiling: twice the bytes of a tile must fit into a
    multiprocessor's shared memory, and a row's result does not depend on how many rows there are.
    """
    if dtype == torch.float32:
        return ProductTiling(32, 64, 32, warps=4, stages=3, swap=False)
    each = rows / max(1, min(rows, slots))
    if scaled:
        if each <= 8:
            return ProductTiling(16, 64, 128, warps=4, stages=4, swap=False)
        if each <= 40:
            return ProductTiling(32, 128, 128, warps=4, stages=3, swap=False)
        if each <= 80:
            if gated:
                return ProductTiling(64, 64, 128, warps=4, stages=3, swap=True, waves=2)
            return ProductTiling(64, 128, 64, warps=4, stages=4, swap=False, waves=2)
        if gated:
            return ProductTiling(128, 128, 64, warps=8, stages=3, swap=True, waves=2)
        return ProductTiling(128, 256, 64, warps=8, stages=3, swap=False, waves=2)
    if each <= 8:
        return ProductTiling(16, 64, 128, warps=4, stages=4, swap=True)
    if each <= 48:
        return ProductTiling(32, 128, 128, warps=8, stages=3, swap=True, waves=4)
    if each <= 128:
        return ProductTiling(64, 128, 64, warps=8, stages=4, swap=True, waves=1 if gated else 2)
    if gated:
        return ProductTiling(128, 128, 64, warps=8, stages=4, swap=False, waves=2)
    return ProductTiling(128, 256, 64, warps=8, stages=3, swap=False, waves=1)


def grouped_product(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    index: Tensor | None = None,
    scales: Tensor | None = None,
    biases: Tensor | None = None,
    gated: bool = False,
    expected: int | None = None,
    tiling: ProductTiling | None = None,
) -> Tensor:
    """Each row times its expert's weights, transposed, plus its bias.

    Args:
        x: [any, in] bf16 or f32, contiguous.
        weights: [slots] int64, addresses of [out, in] of x's dtype, contiguous and aligned to 16
            bytes; with `gated` [2 * out, in].
        offsets: [slots + 1] int32; rows of slot s are offsets[s] … offsets[s+1]-1. Not read here:
            any change between two launches, or replays of a graph, counts.
        out: [rows, out] to fill; what lies behind offsets[slots] is not touched.
        index: [rows] int32, the row of x that each row takes; None: its own.
        scales: [slots] int64, addresses of [ceil(out / 128), ceil(in / 128)] float32, contiguous:
            then weights are float8_e4m3fn, each block of 128 x 128 times its scale, and rounded to
            x's dtype; with `gated` [ceil(2 * out / 128), …].
        biases: [slots] int64, addresses of [out] (with `gated` [2 * out]), or None.
        gated: return silu(first half) · second half of the results.
        expected: how many rows there will be, about, for the choice of a tiling; None: all.

    Returns:
        out.
    """
    rows, columns = out.shape
    slots, depth = weights.shape[0], x.shape[1]
    if rows == 0:
        return out
    if tiling is None:
        tiling = choose(
            expected or rows, slots, gated=gated, scaled=scales is not None, dtype=x.dtype
        )
    if scales is not None and fp8.BLOCK % tiling.depth:
        raise ValueError(f"a tile {tiling.depth} deep crosses blocks of {fp8.BLOCK} with scales")
    # a tile that is not full belongs to a slot of its own
    bound = rows // tiling.rows + min(slots, rows)
    programs = bound * triton.cdiv(columns, tiling.columns)
    if tiling.waves:
        programs = min(programs, tiling.waves * multiprocessor_count(x.device, interpreted=2))
    _product[(programs,)](
        x,
        index,
        weights,
        scales,
        biases,
        offsets,
        out,
        slots,
        depth,
        columns,
        EVEN=depth % tiling.depth == 0,
        SLOTS=triton.next_power_of_2(slots),
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        GATED=gated,
        INDEXED=index is not None,
        SCALED=scales is not None,
        BIASED=biases is not None,
        SWAP=tiling.swap,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return out
