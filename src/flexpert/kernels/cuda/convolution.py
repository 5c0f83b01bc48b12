"""A short causal convolution of one token, whose last inputs are kept in a slot; for kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve(
    x,
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
    """silu of the convolution, float32 with values of x's dtype, of some channels of a sequence.

    x: [C] the new inputs. weight: [all channels, WIDTH]; bias: [all channels] or None. before,
    behind: [all channels, WIDTH] the last inputs up to the token before, and up to this one.
    channel: [C] which they are; ok: [C] whether they are. reads, writes: whether `before` is there,
    and `behind` is to be written. TAPS: WIDTH, or the next power of two.
    """
    dtype: tl.constexpr = x.dtype
    tap = tl.arange(0, TAPS)
    at = channel[:, None] * WIDTH + tap[None, :]
    known = ok[:, None] & (tap < WIDTH - 1)[None, :]
    seen = tl.load(before + at + 1, mask=known & reads, other=0.0).to(tl.float32)
    seen = tl.where((tap == WIDTH - 1)[None, :], x.to(tl.float32)[:, None], seen)
    inside = ok[:, None] & (tap < WIDTH)[None, :]
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
