"""One token of each sequence through a layer with a state, where it stands: kernels of a GPU.

transformers' modules want a state in a tensor of its own, and read and write it a dozen times. What
looks like a layer that a kernel computes is tried on random numbers, as other fusions are
(`fused_modules`): only a layer whose results and states are the same is replaced, for steps that
decode. Prompts stay the module's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from flexpert.kernels.kernel_set import StateKernels
from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights, StateSpaceWeights
from flexpert.models.state_view import StateKey, StateShape, StateView

States: TypeAlias = Mapping[StateKey, Tensor]
"""A layer's states by key: [slots, *shape]."""

StateDecoder: TypeAlias = Callable[[Tensor, States, Tensor, Tensor], Tensor]
"""(hidden [B, width], states, sources [B], targets [B] int64) → what the layer gives, [B, width];
slots are read and written as in `kernels.cuda.delta_rule`."""

CONVOLVED: Final = StateKey("conv")
RECURRENT: Final = StateKey("recurrent")

_ROWS: Final = 5
_MOST_WRONG: Final = 8  # of the dtype's epsilons, relative to the size of a row
_LEAST_WRONG: Final = 1e-3  # is always allowed: a library may multiply in TF32


def find_decoder(
    module: Any, shapes: Sequence[StateShape], kernels: StateKernels
) -> StateDecoder | None:
    """What may compute a module's decode steps, by the names and shapes of its parts.

    `is_right` says whether it does.
    """
    if {shape.key for shape in shapes} != {CONVOLVED, RECURRENT}:
        return None
    try:
        return _delta_rule(module, kernels) or _state_space(module, kernels)
    except (AttributeError, TypeError, RuntimeError):  # it is put together otherwise
        return None


def is_right(
    decoder: StateDecoder,
    call: Callable[[StateView, Tensor], Any],
    shapes: Sequence[StateShape],
    like: Tensor,
) -> bool:
    """Whether a decoder gives what a module gives, and leaves the same states.

    Args:
        call: (view, hidden [B, 1, width]) → what the module gives.
        like: hidden states, [..., width], of the dtype and on the device of others.
    """
    width = like.shape[-1]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, dtype)

    hidden = randn(_ROWS, width)
    slots = 2 * _ROWS + 1
    states = {shape.key: randn(slots, *shape.shape, dtype=shape.dtype) for shape in shapes}
    order = torch.randperm(slots, generator=generator).to(like.device)
    sources, targets = order[:_ROWS], order[_ROWS : 2 * _ROWS]
    view = StateView(
        {key: state[sources].clone() for key, state in states.items()},
        {shape.key: shape.dtype for shape in shapes},
    )
    theirs = call(view, hidden.unsqueeze(1))
    if not isinstance(theirs, Tensor) or theirs.shape != (_ROWS, 1, width):
        return False
    ours = decoder(hidden, states, sources, targets)
    pairs = [(ours, theirs[:, 0])]
    pairs += [(states[key][targets], view.states[key]) for key in states]
    return all(_same(a, b, like.dtype) for a, b in pairs)


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Row by row, but for rounding to a dtype on the way."""
    difference = (ours.float() - theirs.float()).flatten(1).norm(dim=1)
    size = theirs.float().flatten(1).norm(dim=1)
    most = max(_LEAST_WRONG, _MOST_WRONG * torch.finfo(dtype).eps)
    return bool((difference <= most * size).all())


def _delta_rule(module: Any, kernels: StateKernels) -> StateDecoder | None:
    """Qwen3-Next's GatedDeltaNet, whose projections are grouped by heads of keys, and Qwen3.5's,
    which has one for each."""
    if not hasattr(module, "head_k_dim"):
        return None
    heads, key_dim, value_dim = module.num_k_heads, module.head_k_dim, module.head_v_dim
    each = module.num_v_heads // heads
    weights = DeltaWeights(
        _taps(module.conv1d),
        _vector(module.conv1d.bias),
        module.A_log.data,
        module.dt_bias.data,
        module.norm.weight.data,
        module.norm.variance_epsilon,
    )
    if hasattr(module, "in_proj_qkvz"):

        def inputs(x: Tensor) -> DeltaInputs:
            joint = module.in_proj_qkvz(x).view(x.shape[0], heads, -1)
            sizes = [key_dim, key_dim, each * value_dim, each * value_dim]
            q, k, v, z = joint.split(sizes, dim=-1)
            b, a = module.in_proj_ba(x).view(x.shape[0], heads, 2 * each).split(each, dim=-1)
            return DeltaInputs(
                query=q,
                key=k,
                value=v.unflatten(-1, (each, value_dim)),
                gate=z.unflatten(-1, (each, value_dim)),
                beta=b,
                decay=a,
            )
    else:

        def inputs(x: Tensor) -> DeltaInputs:
            sizes = [heads * key_dim, heads * key_dim, heads * each * value_dim]
            q, k, v = module.in_proj_qkv(x).split(sizes, dim=-1)
            z, b, a = module.in_proj_z(x), module.in_proj_b(x), module.in_proj_a(x)
            return DeltaInputs(
                query=q.unflatten(-1, (heads, key_dim)),
                key=k.unflatten(-1, (heads, key_dim)),
                value=v.unflatten(-1, (heads, each, value_dim)),
                gate=z.unflatten(-1, (heads, each, value_dim)),
                beta=b.unflatten(-1, (heads, each)),
                decay=a.unflatten(-1, (heads, each)),
            )

    def decode(hidden: Tensor, states: States, sources: Tensor, targets: Tensor) -> Tensor:
        read = kernels.delta_rule(
            inputs(hidden), weights, states[CONVOLVED], states[RECURRENT], sources, targets
        )
        result: Tensor = module.out_proj(read)
        return result

    return decode


def _state_space(module: Any, kernels: StateKernels) -> StateDecoder | None:
    """Mamba-2, as Granite-4 and Nemotron-H have it."""
    if not hasattr(module, "ssm_state_size") or not hasattr(module, "in_proj"):
        return None
    weights = StateSpaceWeights(
        _taps(module.conv1d),
        _vector(module.conv1d.bias),
        module.A_log.data,
        module.dt_bias.data,
        module.D.data,
        module.norm.weight.data,
        module.norm.variance_epsilon,
        module.norm.group_size,
    )

    def decode(hidden: Tensor, states: States, sources: Tensor, targets: Tensor) -> Tensor:
        read = kernels.state_space(
            module.in_proj(hidden),
            weights,
            states[CONVOLVED],
            states[RECURRENT],
            sources,
            targets,
        )
        result: Tensor = module.out_proj(read)
        return result

    return decode


def _taps(convolution: nn.Conv1d) -> Tensor:
    """[channels, width]"""
    return convolution.weight.data.squeeze(1).contiguous()


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.data
