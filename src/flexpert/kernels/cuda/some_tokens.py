"""A decoder layer of a decode step with more tokens than `few_tokens` takes: products on the tensor
cores, and what stands between them in as few kernels.

Kernels are launched as each other's programmatic dependents (`dependents`): nine for a layer, of
which no one waits for its own launch.

A linear layer's columns are cut among so many programs that all of the GPU reads; the last program
of a tile to end adds the parts up, in their order. A router's rows are cut in the same way, and the
last program of some rows chooses their experts.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.dependents import await_previous, following
from flexpert.kernels.cuda.few_tokens import FewTiling, FewTokens
from flexpert.kernels.cuda.multiprocessors import multiprocessor_count
from flexpert.kernels.cuda.norm import rms_norm
from flexpert.kernels.step_shapes import SOME_TOKENS

MOST_TOKENS: Final = SOME_TOKENS
MOST_ROWS: Final = 64
"""Of a linear layer here. With more, rows are read so often that a library's kernel, which shares
them among multiprocessors, is faster: steps of 96 sequences on an H200 took 4,729 us with it and
4,888 with ours."""
_ROUTED: Final = 16  # rows of a program that routes: the least that tensor cores take
_COUNTERS: Final = 4096


@dataclass(frozen=True, slots=True)
class SomeTiling:
    """Of a linear layer. columns: of a tile, rows of the weight. depth: of a tile. stages: tiles
    that are on their way at once. fill: programs for each multiprocessor, about. routed: elements
    of a router's weight that a program holds.
    """

    columns: int = 64
    depth: int = 128
    warps: int = 4
    stages: int = 6
    fill: float = 1.0
    routed: int = 128 * 256


@triton.jit(do_not_specialize=["rows"])
def _project_some(
    x, weight, bias, residual, out, sums, arrived, rows, N, K, part,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, FOLLOWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < N
    first = tl.program_id(1) * part
    end = tl.minimum(K, first + part)
    element = out.dtype.element_ty
    own = weight + tl.where(column_ok, column, 0).to(tl.int64) * K
    await_previous(FOLLOWS)
    row = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    w = own[:, None]
    v = x + tl.where(row < rows, row, 0)[None, :] * K
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for k in range(first, end, DEPTH):
        at = k + depth
        total = tl.dot(
            tl.load(w + at[None, :]), tl.load(v + at[:, None]), total, input_precision=PRECISION
        )
    ok = (row < rows)[None, :] & column_ok[:, None]
    where = row[None, :] * N + column[:, None]
    last = True
    if PARTS > 1:
        size = rows.to(tl.int64) * N
        tl.store(sums + tl.program_id(1) * size + where, total, mask=ok)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
        if last:
            tl.store(arrived + tile, 0)
            total = tl.zeros((COLUMNS, ROWS), tl.float32)
            for p in tl.static_range(PARTS):  # all are on their way at once
                total += tl.load(sums + p * size + where, mask=ok, other=0.0, cache_modifier=".cg")
    if last:
        if BIASED:
            total += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[:, None]
        if ADDED:
            total = total.to(element).to(tl.float32)
            total += tl.load(residual + where, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + where, total.to(element), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def _route_some(
    x, norm, weight, bias, normed, sums, weights, ids, arrived, rows, eps,
    K: tl.constexpr, EXPERTS: tl.constexpr, EXPERTS_PAD: tl.constexpr, PARTS: tl.constexpr,
    PART: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr, EARLY: tl.constexpr, BIASED: tl.constexpr, NORMALISED: tl.constexpr,
    FOLLOWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    there = (row < rows)[:, None]
    expert = tl.arange(0, EXPERTS_PAD)
    depth = part * PART + tl.arange(0, PART)
    element = normed.dtype.element_ty
    held = (expert < EXPERTS)[:, None] & (depth < K)[None, :]
    w = tl.load(weight + expert[:, None] * K + depth[None, :], mask=held, other=0.0)
    scale = tl.load(norm + depth, mask=depth < K, other=0.0).to(tl.float32)
    await_previous(FOLLOWS)
    given = x + row[:, None] * K
    squares = tl.zeros((ROWS,), tl.float32)
    for begin in tl.static_range(0, K, CHUNK):
        at = begin + tl.arange(0, CHUNK)[None, :]
        value = tl.load(given + at, mask=there & (at < K), other=0.0).to(tl.float32)
        squares += tl.sum(value * value, 1)
    inside = there & (depth < K)[None, :]
    value = tl.load(given + depth[None, :], mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(squares / K + eps)[:, None]
    if EARLY:
        value = value.to(element).to(tl.float32)
    value = (value * scale[None, :]).to(element)
    tl.store(normed + row[:, None] * K + depth[None, :], value, mask=inside)
    result = tl.dot(value, tl.trans(w), input_precision=PRECISION)
    size = tl.num_programs(0) * ROWS * EXPERTS_PAD
    where = row[:, None] * EXPERTS_PAD + expert[None, :]
    tl.store(sums + part * size + where, result)
    tl.debug_barrier()
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1:
        tl.store(arrived + tile, 0)
        total = tl.zeros((ROWS, EXPERTS_PAD), tl.float32)
        for p in tl.static_range(PARTS):
            total += tl.load(sums + p * size + where, cache_modifier=".cg")
        if BIASED:
            total += tl.load(bias + expert, mask=expert < EXPERTS, other=0.0).to(tl.float32)[None]
        score = tl.where(
            (expert < EXPERTS)[None, :], total.to(element).to(tl.float32), -float("inf")
        )
        # in the order of scores, of equal ones the first: one reduction finds the next best
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (bits.to(tl.int64) << 32) | (EXPERTS_PAD - 1 - expert).to(tl.int64)[None, :]
        lane = tl.arange(0, TOPK_PAD)[None, :]
        best = tl.full((ROWS, TOPK_PAD), float("-inf"), tl.float32)
        chosen = tl.zeros((ROWS, TOPK_PAD), tl.int32)
        for k in tl.static_range(TOPK):
            top = tl.max(key, 1)[:, None]
            key = tl.where(key == top, -(2**63), key)
            bits = (top >> 32).to(tl.int32)
            likely = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            best = tl.where(lane == k, likely, best)
            chosen = tl.where(lane == k, EXPERTS_PAD - 1 - top.to(tl.int32), chosen)
        highest = tl.max(best, 1)[:, None]
        p = tl.exp(best - highest)
        if NORMALISED:
            p = p / tl.sum(p, 1)[:, None]
        else:
            p = p / tl.sum(tl.exp(score - highest), 1)[:, None]
        place = row[:, None] * TOPK + lane
        ok = there & (lane < TOPK)
        tl.store(weights + place, p.to(weights.dtype.element_ty), mask=ok)
        tl.store(ids + place, chosen.to(tl.int64), mask=ok)


class SomeTokens:
    """The kernels of a layer, for `MOST_TOKENS` tokens at most, each of another sequence.

    All floating tensors are contiguous, on one device, of one dtype, bf16 or f32. Launches are of
    one stream: what a kernel reads ahead is safe only behind the one before it.

    Attributes:
        most_depth: elements of a row of weights, at most.
    """

    most_depth = 1 << 16

    def __init__(self, device: torch.device, tiling: SomeTiling | None = None) -> None:
        """device: of all tensors; what is needed of its memory is taken now."""
        self._tiling = tiling or SomeTiling()
        self._arrived = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        self._launched = following(device)
        self._processors = multiprocessor_count(device, interpreted=4)
        self._attention = FewTokens(device, FewTiling(keys=64, warps=4))
        self.attend = self._attention.attend

    def project(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float, bool] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `FewTokens.project`: norm(x) · weightᵀ + bias, rounded, + residual.

        Args:
            x: [T, K]; weight: [N, K]; bias: [N]; residual: [T, N].
            norm: ([K] weight, eps, early), see `norm.rms_norm`; None: none.

        Returns:
            [T, N].
        """
        if norm is not None:
            x = rms_norm(x, norm[0], norm[1], early=norm[2], follows=True)
        tokens, depth = x.shape
        columns = weight.shape[0]
        tiling = self._tiling
        tiles = triton.cdiv(columns, tiling.columns)
        if tokens > MOST_ROWS or depth % tiling.depth or tiles > _COUNTERS:
            y = F.linear(x, weight, bias)
            return y if residual is None else y + residual
        part = part_of(tiles, depth, tiling.depth, int(tiling.fill * self._processors))
        parts = triton.cdiv(depth, part)
        out = x.new_empty((tokens, columns))
        sums = out
        if parts > 1:
            sums = torch.empty((parts, tokens, columns), dtype=torch.float32, device=x.device)
        _project_some[(tiles, parts)](
            x, weight, bias, residual, out, sums, self._arrived, tokens, columns, depth, part,
            PARTS=parts, COLUMNS=tiling.columns,
            ROWS=max(16, triton.next_power_of_2(tokens)), DEPTH=tiling.depth,
            BIASED=bias is not None, ADDED=residual is not None,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=tiling.warps, num_stages=tiling.stages, **self._launched,
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
        """As `FewTokens.route`: a norm, and a router's choice of experts for what it gives.

        Args:
            x: [T, K]; norm: as in `project`; weight: [experts, K]; bias: [experts].
            topk, normalised, dtype: see `router.choose_experts`.

        Returns:
            ([T, K] normed, [T, topk] weights of `dtype`, [T, topk] int64 ids).
        """
        tokens, depth = x.shape
        experts = weight.shape[0]
        experts_pad = max(16, triton.next_power_of_2(experts))
        part = max(16, min(triton.next_power_of_2(depth), self._tiling.routed // experts_pad))
        parts = triton.cdiv(depth, part)
        tiles = triton.cdiv(tokens, _ROUTED)
        normed = torch.empty_like(x)
        sums = torch.empty(
            (parts, tiles * _ROUTED, experts_pad), dtype=torch.float32, device=x.device
        )
        weights = torch.empty((tokens, topk), dtype=dtype, device=x.device)
        ids = torch.empty((tokens, topk), dtype=torch.int64, device=x.device)
        scale, eps, early = norm
        _route_some[(tiles, parts)](
            x, scale, weight, bias, normed, sums, weights, ids, self._arrived, tokens, eps,
            K=depth, EXPERTS=experts, EXPERTS_PAD=experts_pad, PARTS=parts, PART=part,
            ROWS=_ROUTED, CHUNK=min(1024, triton.next_power_of_2(depth)), TOPK=topk,
            TOPK_PAD=triton.next_power_of_2(topk), EARLY=early, BIASED=bias is not None,
            NORMALISED=normalised, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=8, **self._launched,
        )  # fmt: skip
        return normed, weights, ids


def part_of(tiles: int, depth: int, tile_depth: int, programs: int) -> int:
    """Of how many of its `depth` elements a program sums a row of a weight, so that there are about
    `programs` of them."""
    most = max(1, programs // tiles)
    steps = depth // tile_depth
    return tile_depth * int(triton.cdiv(steps, min(most, steps)))
