"""A Mamba-2 layer between its projections, in three kernels.

The first is the short causal convolution. A program of the second has some rows of the state of one
head of one sequence, which it loads and stores once: for one token nearly all that moves is these,
of a prompt it takes the tokens one after the other. The third norms groups of channels of many
heads. States are found in their slots and left in others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.convolution import convolve, softplus
from flexpert.kernels.state_steps import StateRows, StateSpaceWeights

_TILE = 4096  # numbers of a state in a program, if each sequence has one token
_WARPS = 4
_SCANNED = 1024  # else: a warp, which sums without waiting for others
_CHANNELS = 128  # that a program convolves


def state_space(
    projected: Tensor,
    weights: StateSpaceWeights,
    convolved: Tensor,
    states: Tensor,
    rows: StateRows,
) -> Tensor:
    """What a layer gives before its last projection, of the N rows of a step.

    Args:
        projected: [N, inner + channels + heads] contiguous: gates, what is convolved (inputs, B
            and C), and steps; inner is heads · head_dim.
        convolved: [slots, channels, width] contiguous: what the convolution has seen last.
        states: [slots, heads, head_dim, size], contiguous.
        rows: no slot is read and written.

    Returns: [N, inner] of the projection's dtype.
    """
    _, heads, head_dim, size = states.shape
    count, inner, channels, width = projected.shape[0], heads * head_dim, *convolved.shape[1:]
    one = rows.starts is None
    out = torch.empty((count, inner), dtype=projected.dtype, device=projected.device)
    mixed = torch.empty((count, channels), dtype=projected.dtype, device=projected.device)
    _mixed_channels[(triton.cdiv(channels, _CHANNELS), count)](
        projected,
        weights.convolution,
        weights.bias,
        convolved,
        rows.sources,
        rows.targets,
        rows.begins,
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
    some = max(1, min(triton.next_power_of_2(head_dim), (_TILE if one else _SCANNED) // sizes))
    sequences = count if rows.starts is None else rows.starts.shape[0] - 1
    _state_space[(heads * triton.cdiv(head_dim, some), sequences)](
        projected,
        mixed,
        weights.rate,
        weights.shift,
        weights.skip,
        states,
        rows.sources,
        rows.targets,
        rows.starts,
        out,
        HEADS=heads,
        EACH=heads * 2 * size // (channels - inner),
        DIM=head_dim,
        SIZE=size,
        SOME=some,
        SIZES=sizes,
        CHANNELS=channels,
        num_warps=_WARPS if one else 1,
    )
    columns = triton.next_power_of_2(weights.normed)
    _gated_norm[(inner // weights.normed, count)](
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
    begins,
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
    seen_rows = row * 0
    if begins is not None:
        seen_rows = row - tl.load(begins + row)
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    ok = channel < CHANNELS
    y = convolve(
        projected + row * stride + INNER + channel,
        stride,
        seen_rows,
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
    starts,
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
    begin = tl.program_id(1).to(tl.int64)
    end = begin + 1
    if starts is not None:
        end = tl.load(starts + begin + 1)
        begin = tl.load(starts + begin)
    inner: tl.constexpr = HEADS * DIM
    wide: tl.constexpr = inner + CHANNELS + HEADS
    d_at, n_at = part * SOME + tl.arange(0, SOME), tl.arange(0, SIZES)
    d_ok, n_ok = d_at < DIM, n_at < SIZE
    inside = d_ok[:, None] & n_ok[None, :]
    whole: tl.constexpr = HEADS * DIM * SIZE
    where = head * (DIM * SIZE) + d_at[:, None] * SIZE + n_at[None, :]
    source = tl.load(sources + begin)
    state = tl.load(states + source * whole + where, mask=inside & (source >= 0), other=0.0)
    state = state.to(tl.float32)

    x_at = head * DIM + d_at
    b_at = inner + head // EACH * SIZE + n_at  # EACH heads share B and C
    c_at = HEADS // EACH * SIZE + b_at
    speed = -tl.exp(tl.load(rate + head).to(tl.float32))
    more = tl.load(shift + head).to(tl.float32)
    d = tl.load(skip + head).to(tl.float32)
    steps = projected + inner + CHANNELS + head
    x, b, c, step = _inputs(
        mixed + begin * CHANNELS, steps + begin * wide, x_at, b_at, c_at, d_ok, n_ok
    )
    if starts is None:
        state, y = _updated(state, x, b, c, softplus(step + more), speed, d)
        made, target = state.to(states.dtype.element_ty), tl.load(targets + begin)
        tl.store(states + target * whole + where, made, mask=inside & (target >= 0))
        tl.store(out + begin * inner + x_at, y.to(out.dtype.element_ty), mask=d_ok)
    else:
        for row in range(begin, end):
            after = tl.minimum(row + 1, end - 1)  # is loaded before this one is computed
            next_x, next_b, next_c, next_step = _inputs(
                mixed + after * CHANNELS, steps + after * wide, x_at, b_at, c_at, d_ok, n_ok
            )
            target = tl.load(targets + row)
            state, y = _updated(state, x, b, c, softplus(step + more), speed, d)
            made = state.to(states.dtype.element_ty)
            tl.store(states + target * whole + where, made, mask=inside & (target >= 0))
            tl.store(out + row * inner + x_at, y.to(out.dtype.element_ty), mask=d_ok)
            x, b, c, step = next_x, next_b, next_c, next_step


@triton.jit
def _inputs(mixed, step, x_at, b_at, c_at, d_ok, n_ok):
    """What `_updated` takes of a row, from where its numbers begin and its head's step is."""
    x = tl.load(mixed + x_at, mask=d_ok, other=0.0).to(tl.float32)
    b = tl.load(mixed + b_at, mask=n_ok, other=0.0).to(tl.float32)
    c = tl.load(mixed + c_at, mask=n_ok, other=0.0).to(tl.float32)
    return x, b, c, tl.load(step).to(tl.float32)


@triton.jit
def _updated(state, x, b, c, step, speed, skip):
    """The state behind a token, and what is read of it."""
    state = state * tl.exp(speed * step) + (x * step)[:, None] * b[None, :]
    return state, tl.sum(state * c[None, :], 1) + x * skip


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
