"""A layer of the gated delta rule (Qwen3-Next) between its projections, in three kernels.

The first is the short causal convolution of queries, keys and values, with the norm of the first
two, and the gates; then the update of the state; then the norm of what is read from it. A program
of the second has some columns of the state of one head of one sequence, which it loads and stores
once: for one token nearly all that moves is these, of a prompt it takes the tokens one after the
other. States are found in their slots and left in others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexpert.kernels.cuda.convolution import convolve, softplus
from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights, StateRows

_TILE = 4096  # numbers of a state in a program, if each sequence has one token
_WARPS = 4
_SCANNED = 1024  # else: a warp, which sums without waiting for others
_NORMED = 1024  # numbers that a program of the norm has


def gated_delta_rule(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    convolved: Tensor,
    states: Tensor,
    rows: StateRows,
) -> Tensor:
    """What a layer gives before its last projection, of the N rows of a step.

    Args:
        convolved: [slots, channels, width] contiguous: what the convolution has seen last.
        states: [slots, H · R, key_dim, value_dim] float32, contiguous.
        rows: no slot is read and written.

    Returns: [N, H · R · value_dim] of the inputs' dtype.
    """
    value, one = inputs.value, rows.starts is None
    count, heads, each, value_dim = value.shape
    key_dim = inputs.key.shape[2]
    out = torch.empty((count, heads * each * value_dim), dtype=value.dtype, device=value.device)
    channels, width = convolved.shape[1:]
    mixed = torch.empty((count, channels), dtype=torch.float32, device=value.device)
    gates = torch.empty((count, heads * each, 2), dtype=torch.float32, device=value.device)
    keys, values = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    _mixed_heads[(heads * (2 + each), count)](
        inputs.query,
        inputs.key,
        value,
        inputs.beta,
        inputs.decay,
        weights.convolution,
        weights.bias,
        weights.rate,
        weights.shift,
        convolved,
        rows.sources,
        rows.targets,
        rows.begins,
        mixed,
        gates,
        *inputs.query.stride()[:2],
        *inputs.key.stride()[:2],
        *value.stride()[:3],
        *inputs.beta.stride()[:2],
        *inputs.decay.stride()[:2],
        HEADS=heads,
        EACH=each,
        KEY=key_dim,
        VALUE=value_dim,
        LANES=max(keys, values),
        WIDTH=width,
        TAPS=triton.next_power_of_2(width),
        num_warps=1,
    )
    columns = max(1, min(values, (_TILE if one else _SCANNED) // keys))
    sequences = count if rows.starts is None else rows.starts.shape[0] - 1
    _delta_rule[(heads * each * triton.cdiv(value_dim, columns), sequences)](
        mixed,
        gates,
        states,
        rows.sources,
        rows.targets,
        rows.starts,
        out,
        HEADS=heads,
        EACH=each,
        KEY=key_dim,
        VALUE=value_dim,
        KEYS=keys,
        COLUMNS=columns,
        num_warps=_WARPS if one else 1,
    )
    together = max(1, _NORMED // values)
    _normed_before_gate[(triton.cdiv(heads * each, together), count)](
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
    beta,
    decay,
    convolution,
    bias,
    rate,
    shift,
    convolved,
    sources,
    targets,
    begins,
    mixed,
    gates,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_group,
    value_head,
    beta_row,
    beta_group,
    decay_row,
    decay_group,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """A program has one head of queries, of keys or of values of one row."""
    unit = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    source, target = tl.load(sources + row), tl.load(targets + row)
    seen_rows = row * 0
    if begins is not None:
        seen_rows = row - tl.load(begins + row)
    head = unit - 2 * HEADS  # of values
    group, member = head // EACH, head % EACH
    if unit < HEADS:
        here, stride = query + row * query_row + unit * query_head, query_row
    elif unit < 2 * HEADS:
        here, stride = key + row * key_row + (unit - HEADS) * key_head, key_row
    else:
        here = value + row * value_row + group * value_group + member * value_head
        stride = value_row
    channels: tl.constexpr = 2 * HEADS * KEY + HEADS * EACH * VALUE
    lane = tl.arange(0, LANES)
    ok = lane < tl.where(head < 0, KEY, VALUE)
    channel = tl.where(head < 0, unit * KEY, 2 * HEADS * KEY + head * VALUE) + lane
    y = convolve(
        here + lane,
        stride,
        seen_rows,
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
    if head >= 0:
        strength = tl.load(beta + row * beta_row + group * beta_group + member)
        strength = tl.sigmoid(strength.to(tl.float32)).to(strength.dtype).to(tl.float32)
        step = tl.load(decay + row * decay_row + group * decay_group + member).to(tl.float32)
        step = softplus(step + tl.load(shift + head).to(tl.float32))
        kept = tl.exp(-tl.exp(tl.load(rate + head).to(tl.float32)) * step)
        at = gates + (row * HEADS * EACH + head) * 2
        tl.store(at, strength)
        tl.store(at + 1, kept)


@triton.jit
def _delta_rule(
    mixed,
    gates,
    states,
    sources,
    targets,
    starts,
    out,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    parts: tl.constexpr = (VALUE + COLUMNS - 1) // COLUMNS
    head, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    begin = tl.program_id(1).to(tl.int64)
    end = begin + 1
    if starts is not None:
        end = tl.load(starts + begin + 1)
        begin = tl.load(starts + begin)
    k_at, v_at = tl.arange(0, KEYS), part * COLUMNS + tl.arange(0, COLUMNS)
    k_ok, v_ok = k_at < KEY, v_at < VALUE
    inside = k_ok[:, None] & v_ok[None, :]
    size: tl.constexpr = HEADS * EACH * KEY * VALUE
    where = head * (KEY * VALUE) + k_at[:, None] * VALUE + v_at[None, :]
    source = tl.load(sources + begin)
    state = tl.load(states + source * size + where, mask=inside & (source >= 0), other=0.0)

    channels: tl.constexpr = 2 * HEADS * KEY + HEADS * EACH * VALUE
    q_at = head // EACH * KEY + k_at
    x_at = 2 * HEADS * KEY + head * VALUE + v_at
    wide: tl.constexpr = HEADS * EACH
    q, k, v, strength, kept = _inputs(
        mixed + begin * channels, gates + (begin * wide + head) * 2, q_at, x_at, k_ok, v_ok,
        HEADS * KEY,
    )  # fmt: skip
    if starts is None:
        state, read = _updated(state, q, k, v, strength, kept)
        target = tl.load(targets + begin)
        tl.store(states + target * size + where, state, mask=inside & (target >= 0))
        here = out + (begin * wide + head) * VALUE + v_at
        tl.store(here, read.to(out.dtype.element_ty), mask=v_ok)
    else:
        for row in range(begin, end):
            after = tl.minimum(row + 1, end - 1)  # is loaded before this one is computed
            next_q, next_k, next_v, next_strength, next_kept = _inputs(
                mixed + after * channels, gates + (after * wide + head) * 2, q_at, x_at, k_ok, v_ok,
                HEADS * KEY,
            )  # fmt: skip
            target = tl.load(targets + row)
            state, read = _updated(state, q, k, v, strength, kept)
            tl.store(states + target * size + where, state, mask=inside & (target >= 0))
            here = out + (row * wide + head) * VALUE + v_at
            tl.store(here, read.to(out.dtype.element_ty), mask=v_ok)
            q, k, v, strength, kept = next_q, next_k, next_v, next_strength, next_kept


@triton.jit
def _inputs(mixed, gates, q_at, v_at, k_ok, v_ok, KEYS_AT: tl.constexpr):
    """What `_updated` takes of a row, from where its numbers and its head's gates begin."""
    q = tl.load(mixed + q_at, mask=k_ok, other=0.0)
    k = tl.load(mixed + KEYS_AT + q_at, mask=k_ok, other=0.0)
    v = tl.load(mixed + v_at, mask=v_ok, other=0.0)
    return q, k, v, tl.load(gates), tl.load(gates + 1)


@triton.jit
def _updated(state, q, k, v, strength, kept):
    """The state behind a token, and what its query reads of it."""
    state *= kept
    delta = (v - tl.sum(state * k[:, None], 0)) * strength
    state += k[:, None] * delta[None, :]
    return state, tl.sum(state * q[:, None], 0)


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
