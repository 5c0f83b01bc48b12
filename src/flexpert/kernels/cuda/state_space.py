"""A token of each sequence through a Mamba-2 layer, in three kernels between its projections.

The first is the short causal convolution. A program of the second has some rows of the state of one
head of one sequence, which it loads and stores once; nearly all that moves is these. The third
norms groups of channels of many heads. States are found in their slots and left in others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.convolution import convolve, softplus
from flexpert.kernels.state_steps import StateSpaceWeights

_TILE = 4096  # numbers of a state in a program
_WARPS = 4
_CHANNELS = 128  # that a program convolves


def decode_state_space(
    projected: Tensor,
    weights: StateSpaceWeights,
    convolved: Tensor,
    states: Tensor,
    sources: Tensor,
    targets: Tensor,
) -> Tensor:
    """What a layer gives before its last projection, of one token of each of B sequences.

    Args:
        projected: [B, inner + channels + heads] contiguous: gates, what is convolved (inputs, B
            and C), and steps; inner is heads · head_dim.
        convolved: [slots, channels, width] contiguous: what the convolution has seen last.
        states: [slots, heads, head_dim, size], contiguous.
        sources, targets: [B] int64: slots that are read and written; -1: the row is padding.

    Returns: [B, inner] of the projection's dtype.
    """
    _, heads, head_dim, size = states.shape
    rows, inner, channels, width = projected.shape[0], heads * head_dim, *convolved.shape[1:]
    out = torch.empty((rows, inner), dtype=projected.dtype, device=projected.device)
    mixed = torch.empty((rows, channels), dtype=projected.dtype, device=projected.device)
    _mixed_channels[(triton.cdiv(channels, _CHANNELS), rows)](
        projected,
        weights.convolution,
        weights.bias,
        convolved,
        sources,
        targets,
        mixed,
        projected.shape[1],
        INNER=inner,
        CHANNELS=channels,
        LANES=_CHANNELS,
        WIDTH=width,
        TAPS=triton.next_power_of_2(width),
        num_warps=1,
    )
    sizes = triton.next_power_of_2(size)
    some = max(1, min(triton.next_power_of_2(head_dim), _TILE // sizes))
    _state_space[(heads * triton.cdiv(head_dim, some), rows)](
        projected,
        mixed,
        weights.rate,
        weights.shift,
        weights.skip,
        states,
        sources,
        targets,
        out,
        HEADS=heads,
        EACH=heads * 2 * size // (channels - inner),
        DIM=head_dim,
        SIZE=size,
        SOME=some,
        SIZES=sizes,
        CHANNELS=channels,
        num_warps=_WARPS,
    )
    columns = triton.next_power_of_2(weights.normed)
    _gated_norm[(inner // weights.normed, rows)](
        out,
        projected,
        weights.norm,
        projected.shape[1],
        weights.eps,
        INNER=inner,
        NORMED=weights.normed,
        COLUMNS=columns,
        num_warps=max(1, min(8, columns // 256)),
    )
    return out


@triton.jit
def _mixed_channels(
    projected,
    convolution,
    bias,
    convolved,
    sources,
    targets,
    mixed,
    stride,
    INNER: tl.constexpr,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    source, target = tl.load(sources + row), tl.load(targets + row)
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    ok = channel < CHANNELS
    y = convolve(
        tl.load(projected + row * stride + INNER + channel, mask=ok, other=0.0),
        convolution,
        bias,
        convolved + source * CHANNELS * WIDTH,
        convolved + target * CHANNELS * WIDTH,
        channel,
        ok,
        source >= 0,
        target >= 0,
        WIDTH,
        TAPS,
    )
    tl.store(mixed + row * CHANNELS + channel, y.to(mixed.dtype.element_ty), mask=ok)


@triton.jit
def _state_space(
    projected,
    mixed,
    rate,
    shift,
    skip,
    states,
    sources,
    targets,
    out,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    SOME: tl.constexpr,
    SIZES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    parts: tl.constexpr = (DIM + SOME - 1) // SOME
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = tl.program_id(1).to(tl.int64)
    group = head // EACH  # of heads that share B and C
    source, target = tl.load(sources + row), tl.load(targets + row)
    inner: tl.constexpr = HEADS * DIM
    d_at, n_at = part * SOME + tl.arange(0, SOME), tl.arange(0, SIZES)
    d_ok, n_ok = d_at < DIM, n_at < SIZE
    inside = d_ok[:, None] & n_ok[None, :]
    whole: tl.constexpr = HEADS * DIM * SIZE
    where = head * (DIM * SIZE) + d_at[:, None] * SIZE + n_at[None, :]
    # the longest load first
    state = tl.load(states + source * whole + where, mask=inside & (source >= 0), other=0.0)
    state = state.to(tl.float32)

    here, x_at = mixed + row * CHANNELS, head * DIM + d_at
    b_at = inner + group * SIZE + n_at
    x = tl.load(here + x_at, mask=d_ok, other=0.0).to(tl.float32)
    b = tl.load(here + b_at, mask=n_ok, other=0.0).to(tl.float32)
    c = tl.load(here + HEADS // EACH * SIZE + b_at, mask=n_ok, other=0.0).to(tl.float32)
    steps = projected + row * (inner + CHANNELS + HEADS) + inner + CHANNELS
    step = softplus(tl.load(steps + head).to(tl.float32) + tl.load(shift + head).to(tl.float32))
    kept = tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * step)
    state = state * kept + (x * step)[:, None] * b[None, :]
    made = state.to(states.dtype.element_ty)
    tl.store(states + target * whole + where, made, mask=inside & (target >= 0))
    y = tl.sum(state * c[None, :], 1) + x * tl.load(skip + head).to(tl.float32)
    tl.store(out + row * inner + x_at, y.to(out.dtype.element_ty), mask=d_ok)


@triton.jit
def _gated_norm(
    y,
    projected,
    weight,
    stride,
    eps,
    INNER: tl.constexpr,
    NORMED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    ok = column < NORMED
    at = tl.program_id(0) * NORMED + column
    gate = tl.load(projected + row * stride + at, mask=ok, other=0.0).to(tl.float32)
    here = y + row * INNER + at
    value = tl.load(here, mask=ok, other=0.0).to(tl.float32) * gate * tl.sigmoid(gate)
    value *= tl.rsqrt(tl.sum(value * value, 0) / NORMED + eps)
    value = value.to(y.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(here, value.to(y.dtype.element_ty), mask=ok)
