"""Products of up to eight rows of an expert with its MXFP4 weights, as fast as these are read.

Each thread keeps what it has loaded: a row's sum does not depend on the order of its columns, so
16 bytes of weights are the left operand of the tensor cores as they lie, if the columns of `x` take
the same order. That is not Triton's way to lay out an operand: the instruction is written out.
A lane holds a block of 32 columns of two rows of weights, and the same block of one row of x.
Several warps of a program share the columns.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flexpert.kernels.cuda.multiprocessors import multiprocessor_count

ROWS = 8
"""Of x, which an instruction takes."""


@dataclass(frozen=True, slots=True)
class FewRowsTiling:
    """warps: of a program, which share the columns. tiles: of 16 rows of weights in a program (with
    a gate, of each half)."""

    warps: int
    tiles: int


def _ordered() -> str:
    """PTX that brings a block of x, 32 bf16 in four times four registers, into the order in which
    `_multiplied` has the codes of a word: 0 and 4, 1 and 5, 2 and 6, 3 and 7."""
    lines = []
    for word in range(4):
        for pair in range(4):
            source = 16 + 4 * word + pair // 2
            halves = "0x7632" if pair % 2 else "0x5410"
            lines.append(f"prmt.b32 ${4 * word + pair}, ${source}, ${source + 2}, {halves};")
    return "\n".join(lines)


def _multiplied() -> str:
    """PTX that adds the product of 16 rows of weights with eight of x to four sums of each lane.

    Registers: $0 … sums, then: four words of the lane's first row, four of its second, the factor
    of each block twice, x in four times four, sums so far.
    """
    first, second, factor, x, sums = 4, 8, 12, 16, 32
    lines = [
        ".reg .b32 e, s, z;",
        ".reg .b32 a0, a1, a2, a3, b0, b1, b2, b3;",
        ".reg .f32 d0, d1, d2, d3;",
        "mov.b32 z, 0x80008000;",
    ]
    lines += [f"mov.f32 d{i}, ${sums + i};" for i in range(4)]
    for word in range(4):
        for name, start, by in (("a", first, factor), ("b", second, factor + 1)):
            lines.append(f"shr.u32 s, ${start + word}, 8;")
            for pair in range(4):
                odd = pair % 2
                source = "s" if pair >= 2 else f"${start + word}"
                # a code's bits are a bf16 that is 2 ** 126 too small, once its sign is shifted by
                # 12 and the rest by 6: both by one product, of which the rest is cut off
                lines.append(f"and.b32 e, {source}, {0x000F000F << 4 * odd:#010x};")
                lines.append(f"mul.lo.u32 e, e, {0x1040 >> 4 * odd:#x};")
                lines.append("and.b32 e, e, 0x81c081c0;")
                lines.append(f"fma.rn.bf16x2 {name}{pair}, e, ${by}, z;")
        for half in range(2):
            p, q = 2 * half, 2 * half + 1
            lines.append(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {d0, d1, d2, d3}, "
                f"{{a{p}, b{p}, a{q}, b{q}}}, {{${x + 4 * word + p}, ${x + 4 * word + q}}}, "
                "{d0, d1, d2, d3};"
            )
    lines += [f"mov.f32 ${i}, d{i};" for i in range(4)]
    return "{\n" + "\n".join(lines) + "\n}"


_ORDERED = gl.constexpr(_ordered())
_ORDERED_REGISTERS = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 16))
_MULTIPLIED = gl.constexpr(_multiplied())
_MULTIPLIED_REGISTERS = gl.constexpr(",".join(["=f"] * 4 + ["r"] * 28 + ["f"] * 4))
_RAISED = gl.constexpr(4294967296.0)  # 2 ** 32


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _factor(power):
    """[lanes, 1] int32, two bf16 of 2 ** (power - 127 + 126 - 32); beyond 2 ** 32 infinite. Sums
    are 2 ** 32 too small, which leaves room for small scales and for large ones."""
    exponent = gl.minimum(power + 94, 255) << 7
    exponent = gl.where(power == 255, 0x7FC0, exponent)
    return exponent * 0x10001


@gluon.jit
def _row(weight, scale, row, BLOCKS, j):
    """([lanes, 4], [lanes]): where a row of weights begins, and where its scales do."""
    at = row * BLOCKS
    return weight + gl.expand_dims(at * 4, 1) + j, scale + at


@gluon.jit
def _words(row, scale_row, block, ok):
    """([lanes, 4] int32, [lanes] int32): a block of a row of weights, and its scale."""
    words = gl.load(row + gl.expand_dims(block * 4, 1), mask=gl.expand_dims(ok, 1), other=0)
    return words, gl.load(scale_row + block, mask=ok, other=0).to(gl.int32)


@gluon.jit
def _weights(a, sa, b, sb, c, sc, d, sd, block, BLOCKS, DOUBLE: gl.constexpr):
    """Of each lane a block of two (DOUBLE: four) rows of weights, each with its scale."""
    ok = block < BLOCKS
    w0, s0 = _words(a, sa, block, ok)
    w1, s1 = _words(b, sb, block, ok)
    w2, s2, w3, s3 = w0, s0, w1, s1
    if DOUBLE:
        w2, s2 = _words(c, sc, block, ok)
        w3, s3 = _words(d, sd, block, ok)
    return w0, s0, w1, s1, w2, s2, w3, s3


@gluon.jit
def _columns(own, block, BLOCKS, row_ok):
    """Of each lane the same block of a row of x, four times [lanes, 4] int32."""
    there = gl.expand_dims((block < BLOCKS) & row_ok, 1)
    at = own + gl.expand_dims(block * 16, 1)
    x0 = gl.load(at, mask=there, other=0)
    x1 = gl.load(at + 4, mask=there, other=0)
    x2 = gl.load(at + 8, mask=there, other=0)
    x3 = gl.load(at + 12, mask=there, other=0)
    return x0, x1, x2, x3


@gluon.jit
def _multiply(sums, w0, s0, w1, s1, x0, x1, x2, x3, j):
    """sums [lanes, 4] float32, and 16 rows of weights times x."""
    factor = gl.where(j % 2 == 0, gl.expand_dims(_factor(s0), 1), gl.expand_dims(_factor(s1), 1))
    return gl.inline_asm_elementwise(
        _MULTIPLIED, _MULTIPLIED_REGISTERS, [w0, w1, factor, x0, x1, x2, x3, sums],
        dtype=gl.float32, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["slots"])
def _few_rows(
    x, index, weights, scales, biases, offsets, out, slots, K, N,
    SLOTS: gl.constexpr, GATED: gl.constexpr, DOUBLE: gl.constexpr, INDEXED: gl.constexpr,
    BIASED: gl.constexpr,
):  # fmt: skip
    """out[r] = x[index[r]] · W[slot of r]ᵀ; GATED: silu of the first N columns times the rest.

    DOUBLE: a program has two tiles of 16 rows of weights: with GATED one of each half.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SEARCH: gl.constexpr = gl.BlockedLayout([(SLOTS + 31) // 32], [32], [WARPS], [0])
    HELD: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    slot_lane = gl.arange(0, SLOTS, layout=SEARCH)
    begins = gl.load(offsets + slot_lane, mask=slot_lane < slots, other=0)
    ends = gl.load(offsets + slot_lane + 1, mask=slot_lane < slots, other=0)
    tiles = (ends - begins + 7) // 8
    past = gl.associative_scan(tiles, 0, _add)
    total = gl.sum(tiles, 0)
    lane = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, HELD))
    j = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, HELD)), 0)
    group = lane % 32 // 4
    inside = lane % 4
    BLOCKS = K // 32
    for tile in range(gl.program_id(1), total, gl.num_programs(1)):
        slot = gl.sum((past <= tile).to(gl.int32), 0)
        here = slot_lane == slot
        end = gl.sum(gl.where(here, ends, 0), 0)
        behind = gl.sum(gl.where(here, past - tiles, 0), 0)
        begin = gl.sum(gl.where(here, begins, 0), 0) + (tile - behind) * 8
        weight = gl.load(weights + slot).to(gl.pointer_type(gl.int32), bitcast=True)
        weight = gl.multiple_of(weight, 16)
        scale = gl.load(scales + slot).to(gl.pointer_type(gl.uint8), bitcast=True)

        row_ok = begin + group < end
        source = gl.where(row_ok, begin + group, begin)
        if INDEXED:
            source = gl.load(index + source)
        own = x.to(gl.pointer_type(gl.int32), bitcast=True)
        own = gl.expand_dims(own + source.to(gl.int64) * (BLOCKS * 16), 1) + j
        EACH: gl.constexpr = 32 if DOUBLE and not GATED else 16
        column = gl.program_id(0) * EACH + group
        first = gl.minimum(column, N - 1)
        second = gl.minimum(column + 8, N - 1)
        if GATED:
            other_first = first + N
            other_second = second + N
        else:
            other_first = gl.minimum(column + 16, N - 1)
            other_second = gl.minimum(column + 24, N - 1)
        a, sa = _row(weight, scale, first, BLOCKS, j)
        b, sb = _row(weight, scale, second, BLOCKS, j)
        c, sc = _row(weight, scale, other_first, BLOCKS, j)
        d, sd = _row(weight, scale, other_second, BLOCKS, j)
        sums = gl.zeros([32 * WARPS, 4], gl.float32, HELD)
        others = gl.zeros([32 * WARPS, 4], gl.float32, HELD)
        # of the results: lane 4 g + t has columns g and g + 8 of the rows 2 t and 2 t + 1
        FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        at = gl.arange(0, 128, layout=FLAT)
        out_row = begin + at // 4 % 4 * 2 + at % 2
        out_column = gl.program_id(0) * EACH + at // 16 + at % 4 // 2 * 8
        y_bias = gl.zeros([128], gl.float32, FLAT)
        z_bias = y_bias
        if BIASED:
            bias = gl.load(biases + slot).to(gl.pointer_type(x.dtype.element_ty), bitcast=True)
            y_bias = gl.load(bias + gl.minimum(out_column, N - 1)).to(gl.float32)
            if GATED:
                z_bias = gl.load(bias + N + gl.minimum(out_column, N - 1)).to(gl.float32)
            elif DOUBLE:
                z_bias = gl.load(bias + gl.minimum(out_column + 16, N - 1)).to(gl.float32)
        block = lane // 32 * 4 + inside
        STEP: gl.constexpr = 4 * WARPS
        w0, s0, w1, s1, w2, s2, w3, s3 = _weights(a, sa, b, sb, c, sc, d, sd, block, BLOCKS, DOUBLE)
        x0, x1, x2, x3 = _columns(own, block, BLOCKS, row_ok)
        for _ in range(0, BLOCKS, STEP):
            u0, r0, u1, r1, u2, r2, u3, r3 = _weights(
                a, sa, b, sb, c, sc, d, sd, block + STEP, BLOCKS, DOUBLE
            )
            block += STEP
            y0, y1, y2, y3 = _columns(own, block, BLOCKS, row_ok)
            x0, x1, x2, x3 = gl.inline_asm_elementwise(
                _ORDERED, _ORDERED_REGISTERS, [x0, x1, x2, x3],
                dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4,
            )  # fmt: skip
            sums = _multiply(sums, w0, s0, w1, s1, x0, x1, x2, x3, j)
            if DOUBLE:
                others = _multiply(others, w2, s2, w3, s3, x0, x1, x2, x3, j)
            w0, s0, w1, s1, w2, s2, w3, s3 = u0, r0, u1, r1, u2, r2, u3, r3
            x0, x1, x2, x3 = y0, y1, y2, y3

        if WARPS > 1:
            sums = gl.sum(gl.reshape(sums, [WARPS, 128]), 0)
            others = gl.sum(gl.reshape(others, [WARPS, 128]), 0)
        else:
            sums = gl.reshape(sums, [128])
            others = gl.reshape(others, [128])
        y = gl.convert_layout(sums, FLAT) * _RAISED + y_bias
        z = gl.convert_layout(others, FLAT) * _RAISED + z_bias
        if GATED:
            y = y * z / (1.0 + gl.exp2(-1.4426950408889634 * y))
        place = out + out_row.to(gl.int64) * N + out_column
        ok = out_row < end
        gl.store(place, y.to(out.dtype.element_ty), mask=ok & (out_column < N))
        if DOUBLE and not GATED:
            gl.store(place + 16, z.to(out.dtype.element_ty), mask=ok & (out_column + 16 < N))


def few_rows_product(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    offsets: Tensor,
    out: Tensor,
    *,
    index: Tensor | None,
    biases: Tensor | None,
    gated: bool,
    launched: int,
    tiling: FewRowsTiling | None = None,
) -> Tensor:
    """As `grouped_product` with MXFP4 weights and bf16 rows, for which see its arguments; more than
    eight rows of an expert read its weights again. launched: rows programs are launched for."""
    columns = out.shape[1]
    slots = weights.shape[0]
    row_tiles = launched // ROWS + min(slots, launched)
    if tiling is None:
        tiling = choose(row_tiles, columns, gated=gated, device=x.device)
    double = gated or tiling.tiles == 2
    each = 32 if double and not gated else 16
    _few_rows[(triton.cdiv(columns, each), row_tiles)](
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
        SLOTS=max(32, triton.next_power_of_2(slots)),
        GATED=gated,
        DOUBLE=double,
        INDEXED=index is not None,
        BIASED=biases is not None,
        num_warps=tiling.warps,
    )
    return out


def choose(row_tiles: int, columns: int, *, gated: bool, device: torch.device) -> FewRowsTiling:
    """Measured on an H200: the more warps share the columns, the sooner a program is done, but two
    do if there are four programs for each multiprocessor."""
    tiles = 1 if gated else 2
    programs = row_tiles * triton.cdiv(columns, 16 * tiles)
    few = programs < 4 * multiprocessor_count(device, interpreted=8)
    return FewRowsTiling(4 if few else 2, tiles)


def fits(x: Tensor) -> bool:
    """Whether rows can be multiplied here: bf16, on a GPU that has its arithmetic."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
