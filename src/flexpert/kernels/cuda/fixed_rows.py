"""Sums along a row in an order of its length alone, for what a model leaves to torch.

torch chooses how a sum is cut by the number of sums. Here a program has a row, whatever is beside
it. Rows are those of routers and norms that no fused kernel computes: short, or few.
"""

# Triton reads these functions: constants are in capitals, and nothing is annotated but constants.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, no-any-return"

from __future__ import annotations

from typing import Final, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.norm import aligned

_MOST: Final = 8192  # elements that a program looks at in one go


@triton.jit
def _sum_row(x, y, n, BLOCK: tl.constexpr, MEAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + row * n + start + lane, mask=start + lane < n, other=0.0).to(
            tl.float32
        )
    result = tl.sum(total, 0)
    if MEAN:
        result = result / n
    tl.store(y + row, result.to(y.dtype.element_ty))


@triton.jit
def _softmax_row(x, y, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    value = tl.load(x + row * n + lane, mask=lane < n, other=float("-inf")).to(tl.float32)
    p = tl.exp(value - tl.max(value, 0))
    p = p / tl.sum(p, 0)
    tl.store(y + row * n + lane, p.to(y.dtype.element_ty), mask=lane < n)


@triton.jit
def _layer_norm_row(
    x, weight, bias, y, n, eps, BLOCK: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    ok = lane < n
    value = tl.load(x + row * n + lane, mask=ok, other=0.0).to(tl.float32)
    value = tl.where(ok, value - tl.sum(value, 0) / n, 0.0)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / n + eps)
    if SCALED:
        value = value * tl.load(weight + lane, mask=ok, other=0.0).to(tl.float32)
    if BIASED:
        value = value + tl.load(bias + lane, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + row * n + lane, value.to(y.dtype.element_ty), mask=ok)


def sum_rows(x: Tensor) -> Tensor:
    """[..., n] float → [...]: sums along the last dimension, in float32 and rounded once."""
    return _reduced(x, "sum")


def mean_rows(x: Tensor) -> Tensor:
    """As `sum_rows`, divided by n."""
    return _reduced(x, "mean")


def _reduced(x: Tensor, what: Literal["sum", "mean"]) -> Tensor:
    _check(x)
    x = aligned(x)
    y = x.new_empty(x.shape[:-1])
    n = x.shape[-1]
    if y.numel() and n:
        block = min(_MOST, triton.next_power_of_2(n))
        _sum_row[(y.numel(),)](
            x, y, n, BLOCK=block, MEAN=what == "mean", num_warps=4 if block > 512 else 1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y if n else y.zero_()


def softmax_rows(x: Tensor) -> Tensor:
    """[..., n] float → the same shape and dtype: softmax along the last dimension, in float32.

    Raises: ValueError: a row is longer than one program takes.
    """
    x = _whole(x)
    y = torch.empty_like(x)
    n = x.shape[-1]
    if x.numel():
        block = triton.next_power_of_2(n)
        _softmax_row[(x.numel() // n,)](
            x, y, n, BLOCK=block, num_warps=4 if block > 512 else 1, enable_fp_fusion=False
        )
    return y


def layer_norm_rows(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """[..., n] float → the same shape and dtype: `F.layer_norm` along the last dimension, in
    float32 and rounded once.

    Args:
        weight, bias: [n], contiguous.

    Raises: ValueError: a row is longer than one program takes.
    """
    x = _whole(x)
    y = torch.empty_like(x)
    n = x.shape[-1]
    if x.numel():
        block = triton.next_power_of_2(n)
        _layer_norm_row[(x.numel() // n,)](
            x, weight, bias, y, n, eps, BLOCK=block, SCALED=weight is not None,
            BIASED=bias is not None, num_warps=4 if block > 512 else 1, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _whole(x: Tensor) -> Tensor:
    _check(x)
    if x.shape[-1] > _MOST:
        raise ValueError(f"a row has {x.shape[-1]} numbers, a program takes {_MOST}")
    return aligned(x)


def _check(x: Tensor) -> None:
    if x.dtype is torch.float64 or not x.is_floating_point():
        raise ValueError(f"sums of float32 or 16-bit numbers, not of {x.dtype}")
