"""Random tokens and states for the kernels of layers that keep a state, and plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights, StateRows, StateSpaceWeights


@dataclass(frozen=True, slots=True)
class StateCase:
    """convolved, states: [slots, …]; sources, targets: [rows] int64 of their slots."""

    convolved: Tensor
    states: Tensor
    sources: Tensor
    targets: Tensor

    @property
    def rows(self) -> StateRows:
        """Each a sequence that decodes."""
        return StateRows(self.sources, self.targets)

    def clone(self) -> StateCase:
        """With states of its own."""
        return StateCase(self.convolved.clone(), self.states.clone(), self.sources, self.targets)

    def alone(self, slot: int) -> StateCase:
        """One slot of it, which every row reads; -1: zeros."""
        kept = [tensor[max(slot, 0)][None].clone() for tensor in (self.convolved, self.states)]
        if slot < 0:
            kept = [torch.zeros_like(tensor) for tensor in kept]
        return StateCase(kept[0], kept[1], torch.zeros_like(self.sources), self.targets)


def slots_of(
    rows: int,
    slots: int | None,
    convolved: tuple[int, ...],
    states: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
) -> StateCase:
    order = torch.randperm(2 * rows + 1, device=device)
    slots = slots or len(order)
    return StateCase(
        torch.randn((slots, *convolved), dtype=dtype, device=device),
        torch.randn((slots, *states), device=device),
        order[:rows],
        order[rows : 2 * rows],
    )


def delta_case(
    rows: int,
    *,
    slots: int | None = None,
    heads: int = 16,
    each: int = 2,
    key_dim: int = 128,
    value_dim: int = 128,
    width: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> tuple[DeltaInputs, DeltaWeights, StateCase]:
    """By default of Qwen3-Next's shapes: projections grouped by heads of keys. slots: two for each
    row and one more, if it is not said."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    joint = randn(rows, heads, 2 * (key_dim + each * value_dim))
    q, k, v, z = joint.split([key_dim, key_dim, each * value_dim, each * value_dim], dim=-1)
    b, a = randn(rows, heads, 2 * each).split(each, dim=-1)
    values = [part.unflatten(-1, (each, value_dim)) for part in (v, z)]
    channels = heads * (2 * key_dim + each * value_dim)
    weights = DeltaWeights(
        convolution=randn(channels, width) / 2,
        bias=None,
        rate=randn(heads * each),
        shift=randn(heads * each),
        norm=1 + randn(value_dim) / 4,
        eps=1e-6,
    )
    states = (heads * each, key_dim, value_dim)
    case = slots_of(rows, slots, (channels, width), states, dtype, device)
    return DeltaInputs(q, k, values[0], values[1], b, a), weights, case


def space_case(
    rows: int,
    *,
    slots: int | None = None,
    heads: int = 128,
    head_dim: int = 64,
    groups: int = 1,
    size: int = 128,
    width: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> tuple[Tensor, StateSpaceWeights, StateCase]:
    """By default of Granite-4.0-H-Small's shapes. slots: as of `delta_case`."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    inner = heads * head_dim
    channels = inner + 2 * groups * size
    weights = StateSpaceWeights(
        convolution=randn(channels, width) / 2,
        bias=randn(channels),
        rate=randn(heads),
        shift=randn(heads),
        skip=randn(heads),
        norm=1 + randn(inner) / 4,
        eps=1e-5,
        normed=inner // groups,
    )
    case = slots_of(rows, slots, (channels, width), (heads, head_dim, size), dtype, device)
    return randn(rows, inner + channels + heads), weights, case


def delta_result(
    x: DeltaInputs, weights: DeltaWeights, case: StateCase, row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(what a layer reads, what its convolution has seen, the state) behind a row, in float32."""
    (_, heads, each, value_dim), key_dim = x.value.shape, x.key.shape[2]
    channels = torch.cat([part[row].flatten() for part in (x.query, x.key, x.value)])
    y, seen = _convolved(channels, weights.convolution, weights.bias, case, row)
    q, k, v = y.split([heads * key_dim, heads * key_dim, heads * each * value_dim])
    q, k = (part.view(heads, key_dim).repeat_interleave(each, 0) for part in (q, k))
    q, k = (part * torch.rsqrt((part * part).sum(1, keepdim=True) + 1e-6) for part in (q, k))
    step = F.softplus(x.decay[row].flatten().float() + weights.shift.float())
    kept = (-weights.rate.float().exp() * step).exp()
    state = case.states[case.sources[row]] * kept[:, None, None]
    known = torch.einsum("hkv,hk->hv", state, k)
    strength = x.beta[row].flatten().float().sigmoid()
    delta = (v.view(heads * each, value_dim) - known) * strength[:, None]
    state = state + torch.einsum("hk,hv->hkv", k, delta)
    read = torch.einsum("hkv,hk->hv", state, q) / key_dim**0.5
    read = F.rms_norm(read, (value_dim,), weights.norm.float(), weights.eps)
    gate = x.gate[row].reshape(heads * each, value_dim).float()
    return (read * F.silu(gate)).flatten(), seen, state


def space_result(
    projected: Tensor, weights: StateSpaceWeights, case: StateCase, row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `delta_result`."""
    heads, head_dim, size = case.states.shape[1:]
    inner = heads * head_dim
    channels = case.convolved.shape[1]
    groups = (channels - inner) // (2 * size)
    gate, mixed, step = projected[row].split([inner, channels, heads])
    y, seen = _convolved(mixed, weights.convolution, weights.bias, case, row)
    x, b, c = y.split([inner, groups * size, groups * size])
    x = x.view(heads, head_dim)
    b, c = (part.view(groups, size).repeat_interleave(heads // groups, 0) for part in (b, c))
    step = F.softplus(step.float() + weights.shift.float())
    kept = (-weights.rate.float().exp() * step).exp()
    state = case.states[case.sources[row]] * kept[:, None, None]
    state = state + torch.einsum("hd,hn->hdn", x * step[:, None], b)
    read = torch.einsum("hdn,hn->hd", state, c) + x * weights.skip.float()[:, None]
    gated = (read.flatten() * F.silu(gate.float())).view(-1, weights.normed)
    normed = F.rms_norm(gated, (weights.normed,), None, weights.eps)
    return normed.flatten() * weights.norm.float(), seen, state


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, case: StateCase, row: int
) -> tuple[Tensor, Tensor]:
    """x: [channels] → silu of the convolution, and what it has seen then."""
    before = case.convolved[case.sources[row]]
    seen = torch.cat([before[:, 1:], x[:, None]], 1)
    y = (seen.float() * weight.float()).sum(1)
    return F.silu(y if bias is None else y + bias.float()), seen
