"""Puts a few kernels where a model's attention and router modules launch a dozen each.

A decode step on a GPU is a chain of short kernels, and starting each costs as much as it computes.
As with norms (`fused`), what a module computes is found out by trying it on random data, whatever
its class: one that does something else is left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.kernels.kernel_set import Fusions
from flexpert.models import registrations
from flexpert.models.fused import epsilon

_ROWS: Final = 24
_BLOCK: Final = 8  # of the trial's cache
_MOST_EQUAL: Final = 0.95  # choices of a router: where two are equally likely, either is right


def fuse_modules(model: nn.Module, kernels: Fusions) -> None:
    """Replace the forward of the modules of a bound model that our kernels compute as well."""
    for module in model.modules():
        if (front := _front(module)) is not None:
            _try_attention(module, front, kernels)
        elif _looks_like_router(module):
            _try_router(module, kernels)


# ---- attention ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Front:
    """What comes before attention. weight: [(heads + 2 * kv_heads) * dim, hidden]: q, k, v."""

    weight: Tensor
    bias: Tensor | None
    heads: int
    kv_heads: int
    dim: int
    norms: tuple[Tensor, Tensor] | None
    eps: float

    def __call__(
        self,
        kernels: Fusions,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        slots: Tensor,
        caches: tuple[Tensor, Tensor],
        early: bool,
    ) -> Tensor:
        """[N, heads, dim] queries of [N, hidden]."""
        every = self.heads + 2 * self.kv_heads
        qkv = F.linear(hidden, self.weight, self.bias).view(-1, every, self.dim)
        cos, sin = (part[0].contiguous() for part in rotation)
        return kernels.rotate_and_store(
            qkv,
            cos,
            sin,
            slots,
            caches[0],
            caches[1],
            norms=self.norms,
            eps=self.eps,
            early=early,
        )


def _front(module: nn.Module) -> _Front | None:
    """What a module projects that looks like attention with one projection each for Q, K and V."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [getattr(module, name, None) for name in names]
    dim = getattr(module, "head_dim", None)
    if registrations.bound(module) is None or not isinstance(dim, int) or dim % 2:
        return None
    if any(type(linear) is not nn.Linear for linear in linears):
        return None
    if "position_embeddings" not in inspect.signature(type(module).forward).parameters:
        return None
    q, k, v, _ = (linear.weight for linear in linears if isinstance(linear, nn.Linear))
    biases = [linear.bias for linear in linears[:3] if isinstance(linear, nn.Linear)]
    if k.shape != v.shape or q.shape[0] % dim or k.shape[0] % dim:
        return None
    if len({bias is None for bias in biases}) > 1:
        return None
    norms, eps = None, 0.0
    found = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if found != [None, None]:
        if any(not isinstance(norm, nn.Module) for norm in found):
            return None
        sizes = [epsilon(norm) for norm in found if isinstance(norm, nn.Module)]
        weights = [norm.get_parameter("weight").data for norm in found if norm is not None]
        if None in sizes or sizes[0] != sizes[1] or any(w.shape != (dim,) for w in weights):
            return None
        norms, eps = (weights[0], weights[1]), float(sizes[0] or 0.0)
    return _Front(
        weight=torch.cat([q.data, k.data, v.data]),
        bias=None if biases[0] is None else torch.cat([b.data for b in biases if b is not None]),
        heads=q.shape[0] // dim,
        kv_heads=k.shape[0] // dim,
        dim=dim,
        norms=norms,
        eps=eps,
    )


class _Recorder:
    """Bound in a trial: keeps what a module passes to attention, and answers with `result`."""

    def __init__(self, result: Tensor) -> None:
        self.result = result
        self.qkv: tuple[Tensor, ...] = ()
        self.options: dict[str, Any] = {}

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        **options: Any,
    ) -> Tensor:
        self.qkv = tuple(part[0].transpose(0, 1) for part in (query, key, value))
        self.options = options
        return self.result


def _try_attention(module: Any, front: _Front, kernels: Fusions) -> None:
    weight = front.weight
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    # small rows show the epsilon of a norm
    hidden = randn(_ROWS, weight.shape[1]) * torch.logspace(-3, 1, _ROWS)[:, None].to(weight)
    angles = torch.randn((_ROWS, front.dim // 2), generator=generator)
    angles = torch.cat([angles, angles], -1)
    rotation = tuple(f(angles).to(weight)[None] for f in (torch.cos, torch.sin))
    recorder = _Recorder(randn(1, _ROWS, front.heads, front.dim))
    binding = registrations.bound(module)
    registrations.bind(module, recorder)
    try:
        theirs = type(module).forward(
            module, hidden_states=hidden[None], position_embeddings=rotation, attention_mask=None
        )
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return  # it wants something else to work on
    finally:
        registrations.bind(module, binding)
    output = module.o_proj(recorder.result.view(1, _ROWS, -1))
    if (
        not isinstance(theirs, tuple)
        or len(theirs) != 2
        or theirs[1] is not None
        or not recorder.qkv
        or not torch.equal(theirs[0], output)
    ):
        return
    slots = torch.randperm(_ROWS, generator=generator).to(weight.device)
    shape = (_ROWS // _BLOCK, _BLOCK, front.kv_heads, front.dim)
    caches = weight.new_empty(shape), weight.new_empty(shape)
    for early in (True, False):
        query = front(kernels, hidden, (rotation[0], rotation[1]), slots, caches, early)
        kept = [cache.view(_ROWS, front.kv_heads, front.dim)[slots] for cache in caches]
        if all(_same(a, b) for a, b in zip((query, *kept), recorder.qkv, strict=True)):
            _share(module, front)
            forward = _attention(module, front, kernels, early, recorder.options)
            vars(module)["forward"] = forward
            return


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Row by row, but for rounding."""
    if ours.shape != theirs.shape:
        return False
    difference = (ours.float() - theirs.float()).flatten(1).norm(dim=1)
    size = theirs.float().flatten(1).norm(dim=1)
    return bool((difference <= 4 * torch.finfo(ours.dtype).eps * size).all())


def _share(module: Any, front: _Front) -> None:
    """Let the projections be views of the joint weight, so that nothing is held twice."""
    begin = 0
    for linear in (module.q_proj, module.k_proj, module.v_proj):
        end = begin + linear.weight.shape[0]
        linear.weight = nn.Parameter(front.weight[begin:end], requires_grad=False)
        begin = end


def _attention(
    module: Any, front: _Front, kernels: Fusions, early: bool, options: dict[str, Any]
) -> Callable[..., tuple[Tensor, None]]:
    """As the module; what it passes to attention, `options`, is the same each time.

    A model that rotates a part of each head (GLM) passes angles for that part alone, which the
    trial cannot know: there the module computes.
    """
    binding = registrations.bound(module)
    original = type(module).forward
    scaling = options.get("scaling")
    sinks = options.get("s_aux")

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *others: Any,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        if position_embeddings[0].shape[-1] != front.dim:
            result: tuple[Tensor, None] = original(
                module, hidden_states, position_embeddings, *others, **rest
            )
            return result
        batch = binding.batch
        caches = binding.key_cache, binding.value_cache
        query = front(
            kernels, hidden_states[0], position_embeddings, batch.slot_mapping, caches, early
        )
        out = kernels.attend(
            query,
            *caches,
            batch.query_start,
            batch.context_len,
            batch.block_tables,
            scaling=front.dim**-0.5 if scaling is None else scaling,
            window=options.get("sliding_window") or 0,
            softcap=options.get("softcap") or 0.0,
            sinks=None if sinks is None else sinks.to(query.dtype).contiguous(),
        )
        return module.o_proj(out.view(1, out.shape[0], -1)), None

    return forward


# ---- router ---------------------------------------------------------------------------------


def _looks_like_router(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 2
        and len(module._parameters) == 1
        and not module._buffers
        and isinstance(getattr(module, "top_k", None), int)
    )


def _try_router(module: Any, kernels: Fusions) -> None:
    weight = module.weight.data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_ROWS, weight.shape[1]), generator=generator).to(weight)
    try:
        theirs = type(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return  # it wants something else to work on
    if not isinstance(theirs, tuple) or len(theirs) != 3:
        return
    shapes = [(_ROWS, count) for count in (weight.shape[0], module.top_k, module.top_k)]
    if [tuple(t.shape) if isinstance(t, Tensor) else None for t in theirs] != shapes:
        return
    logits, weights, ids = theirs
    for normalised in (True, False):
        forward = _router(module, kernels, normalised, weights.dtype)
        ours = forward(x)
        equal = ours[2] == ids
        if (
            _same(ours[0], logits)
            and bool(equal.float().mean() >= _MOST_EQUAL)
            and torch.allclose(
                ours[1][equal].float(),
                weights[equal].float(),
                rtol=4 * torch.finfo(weights.dtype).eps,
                atol=0.0,
            )
        ):
            vars(module)["forward"] = forward
            return


def _router(
    module: Any, kernels: Fusions, normalised: bool, dtype: torch.dtype
) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    weight, topk = module.weight.data, module.top_k

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, weight.shape[1]), weight)
        chosen, ids = kernels.choose_experts(logits, topk, normalised=normalised, dtype=dtype)
        return logits, chosen, ids

    return forward
