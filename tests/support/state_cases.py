"""Random tokens and states for the kernels of layers that keep a state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights, StateSpaceWeights


@dataclass(frozen=True, slots=True)
class StateCase:
    """convolved, states: [2 · rows + 1, …]; sources, targets: [rows] int64 of their slots."""

    convolved: Tensor
    states: Tensor
    sources: Tensor
    targets: Tensor


def slots_of(
    rows: int, convolved: tuple[int, ...], states: tuple[int, ...], dtype: torch.dtype, device: str
) -> StateCase:
    order = torch.randperm(2 * rows + 1, device=device)
    return StateCase(
        torch.randn((2 * rows + 1, *convolved), dtype=dtype, device=device),
        torch.randn((2 * rows + 1, *states), device=device),
        order[:rows],
        order[rows : 2 * rows],
    )


def delta_case(
    rows: int,
    *,
    heads: int = 16,
    each: int = 2,
    key_dim: int = 128,
    value_dim: int = 128,
    width: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> tuple[DeltaInputs, DeltaWeights, StateCase]:
    """By default of Qwen3-Next's shapes: projections grouped by heads of keys."""

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
    case = slots_of(rows, (channels, width), states, dtype, device)
    return DeltaInputs(q, k, values[0], values[1], b, a), weights, case


def space_case(
    rows: int,
    *,
    heads: int = 128,
    head_dim: int = 64,
    groups: int = 1,
    size: int = 128,
    width: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> tuple[Tensor, StateSpaceWeights, StateCase]:
    """By default of Granite-4.0-H-Small's shapes."""

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
    case = slots_of(rows, (channels, width), (heads, head_dim, size), dtype, device)
    return randn(rows, inner + channels + heads), weights, case
