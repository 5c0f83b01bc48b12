"""A router's choice in one kernel: softmax over the experts, the k likeliest, their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 1024  # of a program


@triton.jit(do_not_specialize=["tokens"])
def _choose(
    logits,
    weights,
    ids,
    tokens,
    EXPERTS: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS_PAD)[None, :]
    there = (row < tokens)[:, None]
    x = tl.load(
        logits + row[:, None].to(tl.int64) * EXPERTS + expert,
        mask=there & (expert < EXPERTS),
        other=float("-inf"),
    ).to(tl.float32)
    x = tl.where(there, x, tl.where(expert < EXPERTS, 0.0, float("-inf")))
    p = tl.exp(x - tl.max(x, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    p = tl.where(expert < EXPERTS, p, -1.0)
    lane = tl.arange(0, TOPK_PAD)[None, :]
    best = tl.zeros((ROWS, TOPK_PAD), tl.float32)
    chosen = tl.zeros((ROWS, TOPK_PAD), tl.int32)
    for k in tl.static_range(TOPK):
        top = tl.max(p, 1)
        # of equal ones the first
        which = tl.min(tl.where(p == top[:, None], expert, EXPERTS_PAD), 1)
        best = tl.where(lane == k, top[:, None], best)
        chosen = tl.where(lane == k, which[:, None], chosen)
        p = tl.where(expert == which[:, None], -1.0, p)
    if NORMED:
        best = best / tl.sum(best, 1)[:, None]
    where = row[:, None].to(tl.int64) * TOPK + lane
    ok = there & (lane < TOPK)
    tl.store(weights + where, best.to(weights.dtype.element_ty), mask=ok)
    tl.store(ids + where, chosen.to(tl.int64), mask=ok)


def choose_experts(
    logits: Tensor,
    topk: int,
    *,
    normalised: bool,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k likeliest experts of each token and their probabilities.

    Args:
        logits: [tokens, experts], contiguous.
        normalised: make each token's weights sum to 1.
        dtype: of the weights.
        deterministic: a token's probabilities are summed in the same order in any company.

    Returns:
        ([tokens, k] dtype, [tokens, k] int64), the likeliest first.
    """
    tokens, experts = logits.shape
    weights = torch.empty((tokens, topk), dtype=dtype, device=logits.device)
    ids = torch.empty((tokens, topk), dtype=torch.int64, device=logits.device)
    if tokens == 0:
        return weights, ids
    pad = triton.next_power_of_2(experts)
    many = tokens >= 1024 and not deterministic
    rows = max(1, _ELEMENTS // pad) if many else 1  # few kernels to compile
    _choose[(triton.cdiv(tokens, rows),)](
        logits,
        weights,
        ids,
        tokens,
        EXPERTS=experts,
        EXPERTS_PAD=pad,
        TOPK=topk,
        TOPK_PAD=triton.next_power_of_2(topk),
        ROWS=rows,
        NORMED=normalised,
        num_warps=1 if rows == 1 else 4,
    )
    return weights, ids
