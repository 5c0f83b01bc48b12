"""Products of rows with their own expert's weights; a persistent kernel over tiles of any count.

Rows are sorted by slot, and `offsets` on the device says where each slot's rows lie. Every program
finds its tiles from these, so the grid is fixed, no row is padded to a common number, and an expert
without rows costs nothing. Weights are found through a table of addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.cuda.dependents import await_previous, following
from flexpert.kernels.cuda.multiprocessors import multiprocessor_count
from flexpert.kernels.cuda.mxfp4_few import few_rows_product, fits
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat

MOST_FEW_ROWS = 8
"""Rows an expert up to which `mxfp4_few` multiplies, where it can."""


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


@triton.jit
def _mxfp4_scales(scales, at, k, K, EVEN: tl.constexpr, DEPTH: tl.constexpr):
    """[rows, DEPTH / 32] of the blocks from column k on. at: [rows], each row's first block."""
    block = k // 32 + tl.arange(0, DEPTH // 32)
    pointer = scales + at[:, None] + block[None, :]
    if EVEN:
        return tl.load(pointer, mask=k < K, other=127)  # the first of what nobody needs
    return tl.load(pointer, mask=(block < K // 32)[None, :], other=127)


@triton.jit
def _e2m1(code, factor):
    """Values of codes in the low four bits, times a factor, in float32: as exponent and mantissa of
    a float32 the three bits mean what they mean in e2m1, but for a power of two."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor


@triton.jit
def _mxfp4_tile(
    weights,
    scale,
    at,
    k,
    K,
    EVEN: tl.constexpr,
    DEPTH: tl.constexpr,
    element: tl.constexpr,
    PACKED: tl.constexpr,
):
    """[rows, DEPTH] of `element`: a tile of weights from column k on, dequantized.

    scale: those of the tile. PACKED: by instructions for two bf16 at once, some 3 for each weight
    in place of 7; they are of NVIDIA's GPUs, not of the interpreter.
    """
    block = k // 32 + tl.arange(0, DEPTH // 32)
    lane = tl.arange(0, 16)
    pointer = weights + (at[:, None] + block[None, :])[:, :, None] * 16 + lane[None, None, :]
    if EVEN:
        codes = tl.load(pointer)
    else:
        codes = tl.load(pointer, mask=(block < K // 32)[None, :, None], other=0)
    power = scale.to(tl.int32)
    if PACKED:
        # 2 ** 120 and what is left of the scale, each a bf16; beyond 2 ** 121 all is infinite
        power = tl.where(power == 255, 0x7FC0, tl.minimum(power + 6, 255) << 7).to(tl.int16)
        factor = tl.broadcast_to(power.to(tl.bfloat16, bitcast=True)[:, :, None], codes.shape)
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, e, s, m, z;
            mov.b32 m, 0x7b807b80;
            mov.b32 z, 0x80008000;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 e, a, 6;
            and.b32 e, e, 0x01c001c0;
            shl.b32 s, a, 12;
            lop3.b32 e, s, z, e, 0xea;
            fma.rn.bf16x2 e, e, m, z;
            fma.rn.bf16x2 $0, e, $5, z;
            shl.b32 e, b, 6;
            and.b32 e, e, 0x01c001c0;
            shl.b32 s, b, 12;
            lop3.b32 e, s, z, e, 0xea;
            fma.rn.bf16x2 e, e, m, z;
            fma.rn.bf16x2 $1, e, $6, z;
            shl.b32 e, a, 2;
            and.b32 e, e, 0x01c001c0;
            shl.b32 s, a, 8;
            lop3.b32 e, s, z, e, 0xea;
            fma.rn.bf16x2 e, e, m, z;
            fma.rn.bf16x2 $2, e, $5, z;
            shl.b32 e, b, 2;
            and.b32 e, e, 0x01c001c0;
            shl.b32 s, b, 8;
            lop3.b32 e, s, z, e, 0xea;
            fma.rn.bf16x2 e, e, m, z;
            fma.rn.bf16x2 $3, e, $6, z;
            }
            """,
            "=r,=r,=r,=r,r,r,r",
            args=[codes, factor],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        exponent = tl.where(power == 0, 1 << 22, power << 23)
        exponent = tl.where(power == 255, 0x7FC00000, exponent)
        factor = exponent.to(tl.float32, bitcast=True)[:, :, None]
        code = codes.to(tl.int32)
        low, high = _e2m1(code, factor).to(element), _e2m1(code >> 4, factor).to(element)
    return tl.reshape(tl.join(low, high), (codes.shape[0], DEPTH))


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
    FORMAT: tl.constexpr,
    PACKED: tl.constexpr,
    BIASED: tl.constexpr,
    SWAP: tl.constexpr,
    PRECISION: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    """out[r] = x[index[r]] · W[slot of r]ᵀ; GATED: silu of the first N columns times the rest."""
    await_previous(FOLLOWS)
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
        if FORMAT == "fp8":
            kind = tl.float8e4nv
        elif FORMAT == "mxfp4":
            kind = tl.uint8
        else:
            kind = element
        weight = tl.load(weights + slot).to(tl.pointer_type(kind))
        weight = tl.multiple_of(weight, 16)
        depth = tl.arange(0, DEPTH)
        if FORMAT == "fp8":
            scale = tl.load(scales + slot).to(tl.pointer_type(tl.float32))
            across = (K + 127) // 128
            scale_row = scale + kept // 128 * across
            raised_row = scale + (kept + N) // 128 * across
        if FORMAT == "mxfp4":
            scale = tl.load(scales + slot).to(tl.pointer_type(tl.uint8))
            first_block = kept * (K // 32)
            raised_block = (kept + N) * (K // 32)
            # bytes are not fetched ahead by Triton: here, each is a round before it is used
            power = _mxfp4_scales(scale, first_block, 0, K, EVEN, DEPTH)
            raised_power = power
            if GATED:
                raised_power = _mxfp4_scales(scale, raised_block, 0, K, EVEN, DEPTH)
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
            if FORMAT == "mxfp4":
                next_power = _mxfp4_scales(scale, first_block, k + DEPTH, K, EVEN, DEPTH)
                w = _mxfp4_tile(weight, power, first_block, k, K, EVEN, DEPTH, element, PACKED)
                power = next_power
                if SWAP:
                    a = w
                    b = _tile(right, k + depth[:, None], K, EVEN)
                else:
                    a = _tile(left, k + depth[None, :], K, EVEN)
                    b = tl.trans(w)
            else:
                a = _tile(left, k + depth[None, :], K, EVEN)
                b = _tile(right, k + depth[:, None], K, EVEN)
            if FORMAT == "fp8":
                by = tl.load(scale_row + k // 128)
                if SWAP:
                    a = _dequantized(a, by[:, None], element)
                else:
                    b = _dequantized(b, by[None, :], element)
            accumulated = tl.dot(a, b, accumulated, input_precision=PRECISION)
            if GATED:
                if FORMAT == "mxfp4":
                    next_power = _mxfp4_scales(scale, raised_block, k + DEPTH, K, EVEN, DEPTH)
                    c = _mxfp4_tile(
                        weight, raised_power, raised_block, k, K, EVEN, DEPTH, element, PACKED
                    )
                    raised_power = next_power
                    c = c if SWAP else tl.trans(c)
                elif SWAP:
                    c = _tile(left + N * K, k + depth[None, :], K, EVEN)
                else:
                    c = _tile(right + N * K, k + depth[:, None], K, EVEN)
                if FORMAT == "fp8":
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
    rows: int,
    slots: int,
    *,
    gated: bool,
    packed: WeightFormat | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ProductTiling:
    """A tiling for at most `rows` rows over `slots` experts; see tools/gpu/tune_experts.py.

    Up to some fifty rows an expert the product is as fast as the weights come from memory.
    float32, which is for checking, has one tiling: twice the bytes of a tile must fit into a
    multiprocessor's shared memory, and a row's result does not depend on how many rows there are.
    """
    if dtype == torch.float32:
        return ProductTiling(32, 64, 32, warps=4, stages=3, swap=False)
    each = rows / max(1, min(rows, slots))
    if packed is MXFP4:
        if each <= 8:
            return ProductTiling(16, 64, 128, warps=4, stages=5, swap=True)
        if each <= 40:
            return ProductTiling(32, 128, 128, warps=8, stages=4, swap=True)
        if each <= 80 or gated:
            return ProductTiling(64, 128, 64, warps=8, stages=4, swap=True, waves=2)
        return ProductTiling(128, 128, 64, warps=8, stages=4, swap=True, waves=2)
    if packed is not None:
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


def launched_rows(expected: int, most: int) -> int:
    """For so many rows programs are launched. Each takes as many more as there are, but a program
    without any costs as well, and there may be room for a hundred times the rows that come."""
    return min(most, 2 * expected)


DEPTH: Final = 128
"""Of every tile of `choose_fixed`: a row is summed in steps of so many columns."""


def choose_fixed(
    rows: int, slots: int, *, gated: bool, dtype: torch.dtype = torch.bfloat16
) -> ProductTiling:
    """As `choose`, among tilings that give a row the same bits, for weights of any format.

    Weights are the left operand, 64 rows of them an instruction of Hopper's tensor cores (wgmma),
    whatever the number of tokens; a tile is as deep in each, and no sum is cut.
    """
    if dtype == torch.float32:
        return choose(rows, slots, gated=gated, dtype=dtype)
    each = rows / max(1, min(rows, slots))
    if each <= 8:
        return ProductTiling(16, 64, DEPTH, warps=4, stages=4, swap=True)
    if each <= 48:
        return ProductTiling(32, 128, DEPTH, warps=8, stages=3, swap=True, waves=4)
    stages = 2 if gated else 3
    if each <= 128:
        return ProductTiling(64, 128, DEPTH, warps=8, stages=stages, swap=True, waves=1)
    return ProductTiling(128, 128, DEPTH, warps=8, stages=stages, swap=True, waves=1)


def grouped_product(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    index: Tensor | None = None,
    packed: WeightFormat | None = None,
    scales: Tensor | None = None,
    biases: Tensor | None = None,
    gated: bool = False,
    expected: int | None = None,
    tiling: ProductTiling | None = None,
    deterministic: bool = False,
    follows: bool = False,
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
        packed: the format of the weights, fp8 or MXFP4; they are rounded to x's dtype before they
            are multiplied. None: they have x's dtype.
        scales: [slots] int64, addresses of their scales, contiguous, as the format has them for
            [out, in] (with `gated` [2 * out, in]); None if they have none.
        biases: [slots] int64, addresses of [out] (with `gated` [2 * out]), or None.
        gated: return silu(first half) · second half of the results.
        expected: how many rows there will be, about, for the choice of a tiling; None: all.
        deterministic: a row has the same bits whatever number of rows there is.
        follows: begin before the kernel in front has ended, see `dependents`; `mxfp4_few` does not.

    Returns:
        out.
    """
    rows, columns = out.shape
    slots, depth = weights.shape[0], x.shape[1]
    if rows == 0:
        return out
    if packed not in (None, FP8, MXFP4) or (packed is None) != (scales is None):
        raise ValueError("a GPU computes with weights as they are, or fp8 or MXFP4 with scales")
    expected = expected or rows
    launched = launched_rows(expected, rows)
    if tiling is None and packed is MXFP4 and scales is not None and not deterministic:
        if expected <= MOST_FEW_ROWS * min(rows, slots) and fits(x):
            return few_rows_product(
                x, weights, scales, offsets, out,
                index=index, biases=biases, gated=gated, launched=launched,
            )  # fmt: skip
    if tiling is None and deterministic:
        tiling = choose_fixed(expected, slots, gated=gated, dtype=x.dtype)
    elif tiling is None:
        tiling = choose(expected, slots, gated=gated, packed=packed, dtype=x.dtype)
    if packed is FP8 and fp8.BLOCK % tiling.depth:
        raise ValueError(f"a tile {tiling.depth} deep crosses blocks of {fp8.BLOCK} with scales")
    # a tile that is not full belongs to a slot of its own
    bound = launched // tiling.rows + min(slots, launched)
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
        FORMAT=None if packed is None else packed.name,
        PACKED=x.dtype == torch.bfloat16 and x.device.type == "cuda",
        BIASED=biases is not None,
        SWAP=tiling.swap,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **following(x.device, wanted=follows),
        enable_fp_fusion=not deterministic,  # each tiling would fuse what it likes
    )
    return out
