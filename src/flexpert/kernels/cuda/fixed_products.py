"""A linear layer whose rows have the same bits in any company, for `--deterministic`.

A library chooses its kernel, and so the order of its sums, by the number of rows. Here the order
is one of the weight's shape. Its columns are cut into parts of a fixed length; within a part they
are summed from the first to the last, by the same instruction for any number of rows (weights are
the left operand, 64 rows of them an instruction of Hopper's tensor cores), and the parts' sums are
added in their order, in float32. With few rows each part is a program's, so that all of the GPU
reads weights, and the last program of a tile to end adds the parts up; with many, one program
computes all parts of a tile, one after the other.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

PART_PROGRAMS: Final = 128
"""Parts of all tiles of a weight together, at most: enough for a GPU to read at its full speed. No
GPU is asked: the bits of an answer must not depend on it."""
LEAST_PART: Final = 512
"""Columns of a part."""
FILLED: Final = 120
"""Tiles of 128 columns from which on they fill a GPU; fewer have their parts computed by programs
of their own, in tiles of 64 columns."""
MOST_TILES: Final = 2 * FILLED
"""Of which parts are programs of their own."""


@dataclass(frozen=True, slots=True)
class LinearTiling:
    """columns: of the result, rows of the weight. rows: of the result. depth: of a tile.

    parted: each part is a program's.
    """

    columns: int
    rows: int
    depth: int
    warps: int
    stages: int
    parted: bool


@triton.jit
def _sum_of_part(
    total, weight, x, begin, end, depth, EVEN: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + the sum of columns [begin, end). weight: [columns, 1], x: [1, rows] pointers."""
    acc = tl.zeros(total.shape, tl.float32)
    for k in range(begin, end, DEPTH):
        at = k + depth
        if EVEN:
            w = tl.load(weight + at[None, :])
            v = tl.load(x + at[:, None])
        else:
            w = tl.load(weight + at[None, :], mask=(at < end)[None, :], other=0.0)
            v = tl.load(x + at[:, None], mask=(at < end)[:, None], other=0.0)
        acc = tl.dot(w, v, acc, input_precision=PRECISION)
    return total + acc


@triton.jit
def _write(out, total, bias, row, column, rows, N, BIASED: tl.constexpr):
    if BIASED:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    where = out + row[None, :].to(tl.int64) * N + column[:, None]
    ok = (row < rows)[None, :] & (column < N)[:, None]
    tl.store(where, total.to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows", "parts"])
def _linear(
    x, weight, bias, out, sums, arrived, rows, N, K, part, parts,
    EVEN: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    PARTED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PARTED: parts that are programs of their own; 0: none is."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    w = weight + tl.where(column < N, column, 0)[:, None].to(tl.int64) * K
    v = x + tl.where(row < rows, row, 0)[None, :].to(tl.int64) * K
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    if PARTED:
        p = tl.program_id(2)
        total = _sum_of_part(
            total, w, v, p * part, tl.minimum(K, p * part + part), depth, EVEN, DEPTH, PRECISION
        )
        ok = (row < rows)[None, :] & (column < N)[:, None]
        place = sums + row[None, :].to(tl.int64) * N + column[:, None]
        size = rows.to(tl.int64) * N
        tl.store(place + p * size, total, mask=ok)
        tl.debug_barrier()
        tile = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
        done = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if done == PARTED - 1:
            tl.store(arrived + tile, 0)
            total = tl.zeros((COLUMNS, ROWS), tl.float32)
            for q in tl.static_range(PARTED):  # all are on their way at once
                total += tl.load(place + q * size, mask=ok, other=0.0, cache_modifier=".cg")
            _write(out, total, bias, row, column, rows, N, BIASED)
    else:
        for q in range(parts):
            total = _sum_of_part(
                total, w, v, q * part, tl.minimum(K, q * part + part), depth, EVEN, DEPTH, PRECISION
            )
        _write(out, total, bias, row, column, rows, N, BIASED)


def part_of(columns: int, depth: int, tile_depth: int) -> int:
    """Into parts of how many columns a weight [columns, depth] is cut: its shape alone says so."""
    most = max(1, min(PART_PROGRAMS // triton.cdiv(columns, 64), depth // LEAST_PART))
    return int(triton.cdiv(triton.cdiv(depth, most), tile_depth) * tile_depth)


def choose(rows: int, columns: int, parts: int, dtype: torch.dtype) -> LinearTiling:
    """A tiling for so many rows. What it decides changes no bits, but by `depth`, which is one for
    a dtype. float32, which is for checking, has one shape of tile."""
    tile = 32 if dtype == torch.float32 else max(16, min(128, int(triton.next_power_of_2(rows))))
    filled = triton.cdiv(columns, 128) * triton.cdiv(rows, tile) >= FILLED
    parted = parts > 1 and not filled
    if dtype == torch.float32:
        return LinearTiling(64, tile, depth_of(dtype), warps=4, stages=2, parted=parted)
    wide = 128 if filled else 64
    return LinearTiling(
        wide,
        tile,
        depth_of(dtype),
        warps=wide // 16,
        stages=6 if wide + tile <= 160 else 4,  # so that two programs fit into a multiprocessor
        parted=parted,
    )


def depth_of(dtype: torch.dtype) -> int:
    """Columns of a weight that a tile has."""
    return 32 if dtype == torch.float32 else 64


class FixedProducts:
    """Linear layers on one device, all launched on one stream after the other.

    It keeps a count for each tile, which is 0 between two launches.
    """

    def __init__(self, device: torch.device) -> None:
        self._arrived = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        tiling: LinearTiling | None = None,
    ) -> Tensor:
        """As `F.linear`: x · weightᵀ + bias, summed in float32 and rounded once.

        Args:
            x: [..., in] bf16, f16 or f32.
            weight: [out, in] of x's dtype. bias: [out], or None.
            tiling: default: `choose`'s.

        Returns:
            [..., out] of x's dtype.
        """
        x, weight = x.contiguous(), weight.contiguous()
        columns, depth = weight.shape
        out = x.new_empty((*x.shape[:-1], columns))
        rows = x.numel() // depth
        if rows == 0:
            return out
        part = part_of(columns, depth, depth_of(x.dtype))
        parts = int(triton.cdiv(depth, part))
        if tiling is None:
            tiling = choose(rows, columns, parts, x.dtype)
        sums = arrived = out
        if tiling.parted:
            sums = torch.empty((parts, rows, columns), dtype=torch.float32, device=x.device)
            arrived = self._arrived
        _linear[
            (
                triton.cdiv(columns, tiling.columns),
                triton.cdiv(rows, tiling.rows),
                parts if tiling.parted else 1,
            )
        ](
            x,
            weight,
            bias,
            out,
            sums,
            arrived,
            rows,
            columns,
            depth,
            part,
            parts,
            EVEN=depth % tiling.depth == 0,
            COLUMNS=tiling.columns,
            ROWS=tiling.rows,
            DEPTH=tiling.depth,
            PARTED=parts if tiling.parted else 0,
            BIASED=bias is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            enable_fp_fusion=False,
        )
        return out
