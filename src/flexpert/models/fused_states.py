"""The rows of a step through a layer with a state, all sequences at once: kernels of a GPU.

transformers' modules want a state in a tensor of its own, and read and write it a dozen times. What
looks like a layer that our kernels compute is tried on random numbers, as other modules are
(`fused_modules`): only a layer whose results and states are the same, of steps that decode and of
prompts, is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from flexpert.kernels.kernel_set import StateKernels
from flexpert.kernels.state_steps import DeltaInputs, DeltaWeights, StateRows, StateSpaceWeights
from flexpert.models.state_view import StateKey, StateShape, StateView

States: TypeAlias = Mapping[StateKey, Tensor]
"""A layer's states by key: [slots, *shape]."""

StateFusion: TypeAlias = Callable[[Tensor, States, StateRows], Tensor]
"""(hidden [N, width], states, rows) → what the layer gives, [N, width]."""

CONVOLVED: Final = StateKey("conv")
RECURRENT: Final = StateKey("recurrent")

_ROWS: Final = 5
_MOST_WRONG: Final = 8  # of the dtype's epsilons, relative to the size of a row
_LEAST_WRONG: Final = 1e-3  # is always allowed: a library may multiply in TF32


def state_fusion(
    module: Any, shapes: Sequence[StateShape], kernels: StateKernels
) -> StateFusion | None:
    """What may compute a module, by the names and shapes of its parts.

    `is_right` says whether it does.
    """
    if {shape.key for shape in shapes} != {CONVOLVED, RECURRENT}:
        return None
    try:
        return _delta_rule(module, kernels) or _state_space(module, kernels)
    except (AttributeError, TypeError, RuntimeError):  # it is put together otherwise
        return None


def is_right(
    fused: StateFusion,
    call: Callable[[StateView, Tensor], Any],
    shapes: Sequence[StateShape],
    like: Tensor,
) -> bool:
    """Whether it gives what a module gives, and leaves the same states.

    Args:
        call: (view, hidden [B, n, width]) → what the module gives.
        like: hidden states, [..., width], of the dtype and on the device of others.
    """
    width, dtype = like.shape[-1], like.dtype
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, dtype)

    def view(slot: int | slice | None) -> StateView:
        of = {} if slot is None else {key: state[slot].clone() for key, state in before.items()}
        return StateView(of, {shape.key: shape.dtype for shape in shapes})

    slots = 2 * _ROWS
    before = {shape.key: randn(slots, *shape.shape, dtype=shape.dtype) for shape in shapes}
    hidden = randn(_ROWS, width)

    def agrees(rows: StateRows, expected: Sequence[tuple[Any, StateView, int]]) -> bool:
        """expected: results of some rows in turn, and the states behind the last, by slot."""
        states = {key: state.clone() for key, state in before.items()}
        ours = fused(hidden, states, rows)
        if any(not isinstance(result, Tensor) for result, _, _ in expected):
            return False
        theirs = torch.cat([result.reshape(-1, width) for result, _, _ in expected])
        return theirs.shape == ours.shape and all(
            [
                _same(ours, theirs, dtype),
                *(
                    _same(states[key][slot : slot + len(state)], state, dtype)
                    for _, seen, slot in expected
                    for key, state in seen.states.items()
                ),
            ]
        )

    def numbers(*each: int) -> Tensor:
        return torch.tensor(each, device=like.device)

    decoded = view(slice(_ROWS))
    result = call(decoded, hidden.unsqueeze(1))
    all_slots = torch.arange(slots, device=like.device)
    if not agrees(StateRows(all_slots[:_ROWS], all_slots[_ROWS:]), [(result, decoded, _ROWS)]):
        return False
    # two rows that begin, with a state kept behind the first; then three behind a state
    first, both, others = view(None), view(None), view(slice(3, 4))
    begun = call(first, hidden[None, :1])
    whole = call(both, hidden[None, :2])
    later = call(others, hidden[None, 2:])
    if not isinstance(whole, Tensor):
        return False
    rows = StateRows(
        sources=numbers(-1, -1, 3, 3, 3),
        targets=numbers(5, 6, -1, -1, 7),
        begins=numbers(0, 0, 2, 2, 2),
        starts=numbers(0, 2, _ROWS),
    )
    return agrees(rows, [(begun, first, 5), (whole[:, 1:], both, 6), (later, others, 7)])


def _same(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Row by row, but for rounding to a dtype on the way."""
    difference = (ours.float() - theirs.float()).flatten(1).norm(dim=1)
    size = theirs.float().flatten(1).norm(dim=1)
    most = max(_LEAST_WRONG, _MOST_WRONG * torch.finfo(dtype).eps)
    return bool((difference <= most * size).all())


def _delta_rule(module: Any, kernels: StateKernels) -> StateFusion | None:
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

    def compute(hidden: Tensor, states: States, rows: StateRows) -> Tensor:
        kept = states[CONVOLVED], states[RECURRENT]
        result: Tensor = module.out_proj(kernels.delta_rule(inputs(hidden), weights, *kept, rows))
        return result

    return compute


def _state_space(module: Any, kernels: StateKernels) -> StateFusion | None:
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

    def compute(hidden: Tensor, states: States, rows: StateRows) -> Tensor:
        kept = states[CONVOLVED], states[RECURRENT]
        read = kernels.state_space(module.in_proj(hidden), weights, *kept, rows)
        result: Tensor = module.out_proj(read)
        return result

    return compute


def _taps(convolution: nn.Conv1d) -> Tensor:
    """[channels, width]"""
    return convolution.weight.data.squeeze(1).contiguous()


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.data
