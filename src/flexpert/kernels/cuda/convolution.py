"""A short causal convolution whose last inputs are kept in a slot; for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve(
    here,
    stride,
    seen_rows,
    weight,
    bias,
    before,
    behind,
    channel,
    ok,
    reads,
    writes,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """silu of the convolution, float32 with values of the inputs' dtype, of channels of one row.

    here: [C] pointers to the row's inputs; stride: to those of the row before. seen_rows: rows of
    the sequence before it in this step; what was before these is in a slot. weight: [all channels,
    WIDTH]; bias: [all channels] or None. before, behind: [all channels, WIDTH] the last inputs up
    to the first row of the sequence in this step, and up to this row. channel: [C] which they are;
    ok: [C] whether they are. reads, writes: whether `before` is there, and `behind` is to be
    written. TAPS: WIDTH, or the next power of two.
    """
    dtype: tl.constexpr = here.dtype.element_ty
    tap = tl.arange(0, TAPS)
    back = WIDTH - 1 - tap  # rows
    inside = ok[:, None] & (back >= 0)[None, :]
    new = back <= seen_rows
    at = channel[:, None] * WIDTH + tap[None, :]
    rows = here[:, None] - (back * stride)[None, :]
    x = tl.load(rows, mask=inside & new[None, :], other=0.0).to(tl.float32)
    kept = before + at + (seen_rows + 1)
    old = tl.load(kept, mask=inside & (~new)[None, :] & reads, other=0.0).to(tl.float32)
    seen = tl.where(new[None, :], x, old)
    tl.store(behind + at, seen.to(behind.dtype.element_ty), mask=inside & writes)
    y = tl.sum(seen * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32), 1)
    if bias is not None:
        y += tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)
    y = y.to(dtype).to(tl.float32)
    return (y * tl.sigmoid(y)).to(dtype).to(tl.float32)


@triton.jit
def softplus(x):
    """log(1 + exp(x)), as torch's with its usual threshold. x: float32."""
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))
