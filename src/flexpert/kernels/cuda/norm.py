"""RMS norm in one kernel, as `flexpert.kernels.cpu.ops.rms_norm` on a CPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.dependents import await_previous, following

_ELEMENTS = 2048  # of a program: short rows share one


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x,
    weight,
    y,
    rows,
    eps,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    await_previous(FOLLOWS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    ok = (row < rows) & (column < N)
    where = row.to(tl.int64) * N + column
    value = tl.load(x + where, mask=ok, other=0.0).to(tl.float32)
    mean = tl.sum(value * value, 1) / N
    value = value * tl.rsqrt(mean + eps)[:, None]
    if EARLY:
        value = value.to(y.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(y + where, (value * scale).to(y.dtype.element_ty), mask=ok)


def aligned(x: Tensor) -> Tensor:
    """x, contiguous, or a copy where it begins at an address for which a kernel would be compiled
    that loads, and so sums, in another order."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, early: bool, follows: bool = False
) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in float32.

    Args:
        x: [..., n]; weight: [n], contiguous; of one dtype, or the weight float32.
        early: round to x's dtype before the multiplication by weight as well as after.
        follows: begin before the kernel in front has ended, see `dependents`.

    Returns:
        [..., n] of x's dtype.
    """
    x = aligned(x)
    y = torch.empty_like(x)
    n = weight.shape[0]
    rows = x.numel() // n
    if rows == 0:
        return y
    columns = triton.next_power_of_2(n)
    # one shape for any number of rows: a row is summed in the same order in any company
    together = max(1, _ELEMENTS // columns)
    _rms_norm[(triton.cdiv(rows, together),)](
        x,
        weight,
        y,
        rows,
        eps,
        N=n,
        COLUMNS=columns,
        ROWS=together,
        EARLY=early,
        num_warps=8 if columns * together > _ELEMENTS else 4,
        **following(x.device, wanted=follows),
    )
    return y
