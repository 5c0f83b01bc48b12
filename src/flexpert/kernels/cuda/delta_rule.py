"""A token of each sequence through a layer of the gated delta rule (Qwen3-Next), in three kernels.

Between the layer's projections: the short causal convolution of queries, keys and values, and the
norm of the first two; then the gates and the update of the state; then the norm of what is read
from it. A program of the second has some columns of the state of one head of one sequence, which it
loads and stores once; nearly all that moves is these. States are found in their slots and left in
others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.convolution import convolve, softplus
from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights

_TILE = 4096  # numbers of a state in a program
_WARPS = 4
_NORMED = 1024  # numbers that a program of the norm has


def decode_delta_rule(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    convolved: Tensor,
    states: Tensor,
    sources: Tensor,
    targets: Tensor,
) -> Tensor:
    """What a layer gives before its last projection, of one token of each of B sequences.

    Args:
        convolved: [slots, channels, width] contiguous: what the convolution has seen last.
        states: [slots, H · R, key_dim, value_dim] float32, contiguous.
        sources, targets: [B] int64: slots that are read and written; -1: the row is padding.

    Returns: [B, H · R · value_dim] of the inputs' dtype.
    """
    value = inputs.value
    rows, heads, each, value_dim = value.shape
    key_dim = inputs.key.shape[2]
    out = torch.empty((rows, heads * each * value_dim), dtype=value.dtype, device=value.device)
    channels, width = convolved.shape[1:]
    mixed = torch.empty((rows, channels), dtype=torch.float32, device=value.device)
    keys, values = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _mixed_heads[(heads * (2 + each), rows)](
        inputs.query,
        inputs.key,
        value,
        weights.convolution,
        weights.bias,
        convolved,
        sources,
        targets,
        mixed,
        *inputs.query.stride()[:2],
        *inputs.key.stride()[:2],
        *value.stride()[:3],
        HEADS=heads,
        EACH=each,
        KEY=key_dim,
        VALUE=value_dim,
        LANES=max(keys, values),
        WIDTH=width,
        TAPS=triton.next_power_of_2(width),
        num_warps=1,
    )
    columns = max(1, min(values, _TILE // keys))
    _delta_rule[(heads * each * triton.cdiv(value_dim, columns), rows)](
        mixed,
        inputs.beta,
        inputs.decay,
        weights.rate,
        weights.shift,
        states,
        sources,
        targets,
        out,
        *inputs.beta.stride()[:2],
        *inputs.decay.stride()[:2],
        HEADS=heads,
        EACH=each,
        KEY=key_dim,
        VALUE=value_dim,
        KEYS=keys,
        COLUMNS=columns,
        num_warps=_WARPS,
    )
    together = max(1, _NORMED // values)
    _normed_before_gate[(triton.cdiv(heads * each, together), rows)](
        out,
        inputs.gate,
        weights.norm,
        *inputs.gate.stride()[:3],
        weights.eps,
        HEADS=heads * each,
        EACH=each,
        VALUE=value_dim,
        VALUES=values,
        TOGETHER=together,
    )
    return out


@triton.jit
def _mixed_heads(
    query,
    key,
    value,
    convolution,
    bias,
    convolved,
    sources,
    targets,
    mixed,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_group,
    value_head,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """A program has one head of queries, of keys or of values of one sequence."""
    unit = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    source, target = tl.load(sources + row), tl.load(targets + row)
    head = unit - 2 * HEADS  # of values
    if unit < HEADS:
        here = query + row * query_row + unit * query_head
    elif unit < 2 * HEADS:
        here = key + row * key_row + (unit - HEADS) * key_head
    else:
        here = value + row * value_row + head // EACH * value_group + head % EACH * value_head
    channels: tl.constexpr = 2 * HEADS * KEY + HEADS * EACH * VALUE
    lane = tl.arange(0, LANES)
    ok = lane < tl.where(head < 0, KEY, VALUE)
    channel = tl.where(head < 0, unit * KEY, 2 * HEADS * KEY + head * VALUE) + lane
    y = convolve(
        tl.load(here + lane, mask=ok, other=0.0),
        convolution,
        bias,
        convolved + source * channels * WIDTH,
        convolved + target * channels * WIDTH,
        channel,
        ok,
        source >= 0,
        target >= 0,
        WIDTH,
        TAPS,
    )
    scale = tl.rsqrt(tl.sum(y * y, 0) + 1e-6)
    scale = tl.where(unit < HEADS, scale / tl.sqrt(KEY * 1.0), scale)
    y *= tl.where(head < 0, scale, 1.0)
    tl.store(mixed + row * channels + channel, y, mask=ok)


@triton.jit
def _delta_rule(
    mixed,
    beta,
    decay,
    rate,
    shift,
    states,
    sources,
    targets,
    out,
    beta_row,
    beta_group,
    decay_row,
    decay_group,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts: tl.constexpr = (VALUE + COLUMNS - 1) // COLUMNS
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row = tl.program_id(1).to(tl.int64)
    group, member = head // EACH, head % EACH
    source, target = tl.load(sources + row), tl.load(targets + row)
    k_at, v_at = tl.arange(0, KEYS), part * COLUMNS + tl.arange(0, COLUMNS)
    k_ok, v_ok = k_at < KEY, v_at < VALUE
    inside = k_ok[:, None] & v_ok[None, :]
    size: tl.constexpr = HEADS * EACH * KEY * VALUE
    where = head * (KEY * VALUE) + k_at[:, None] * VALUE + v_at[None, :]
    # the longest load first
    state = tl.load(states + source * size + where, mask=inside & (source >= 0), other=0.0)

    channels: tl.constexpr = 2 * HEADS * KEY + HEADS * EACH * VALUE
    here = mixed + row * channels
    q = tl.load(here + group * KEY + k_at, mask=k_ok, other=0.0)
    k = tl.load(here + (HEADS + group) * KEY + k_at, mask=k_ok, other=0.0)
    v = tl.load(here + 2 * HEADS * KEY + head * VALUE + v_at, mask=v_ok, other=0.0)
    dtype: tl.constexpr = out.dtype.element_ty
    strength = tl.load(beta + row * beta_row + group * beta_group + member).to(tl.float32)
    strength = tl.sigmoid(strength).to(dtype).to(tl.float32)
    step = tl.load(decay + row * decay_row + group * decay_group + member).to(tl.float32)
    step = softplus(step + tl.load(shift + head).to(tl.float32))
    kept = tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * step)

    state *= kept
    delta = (v - tl.sum(state * k[:, None], 0)) * strength
    state += k[:, None] * delta[None, :]
    tl.store(states + target * size + where, state, mask=inside & (target >= 0))
    read = tl.sum(state * q[:, None], 0)
    tl.store(out + row * (HEADS * EACH * VALUE) + head * VALUE + v_at, read.to(dtype), mask=v_ok)


@triton.jit
def _normed_before_gate(
    y,
    gate,
    weight,
    gate_row,
    gate_group,
    gate_head,
    eps,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    VALUE: tl.constexpr,
    VALUES: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    head = (tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
    column = tl.arange(0, VALUES)[None, :]
    ok = (head < HEADS) & (column < VALUE)
    here = y + row * (HEADS * VALUE) + head * VALUE + column
    value = tl.load(here, mask=ok, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, 1) / VALUE + eps)[:, None]
    value = value.to(y.dtype.element_ty).to(tl.float32)
    value *= tl.load(weight + column, mask=column < VALUE, other=0.0).to(tl.float32)
    at = row * gate_row + (head // EACH) * gate_group + (head % EACH) * gate_head + column
    open_ = tl.load(gate + at, mask=ok, other=0.0).to(tl.float32)
    value = value.to(y.dtype.element_ty).to(tl.float32) * open_ * tl.sigmoid(open_)
    tl.store(here, value.to(y.dtype.element_ty), mask=ok)
