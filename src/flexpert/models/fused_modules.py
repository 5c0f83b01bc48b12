"""Puts a few kernels where a model's attention and router modules launch a dozen each.

A decode step on a GPU is a chain of short kernels, and starting each costs as much as it computes.
As with norms (`fused`), what a module computes is found out by trying it on random data, whatever
its class: one that does something else is left alone.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexpert.kernels.kernel_set import Fusions
from flexpert.models import registrations
from flexpert.models.fused import epsilon
from flexpert.models.fusion_verdicts import (
    AttentionFusion,
    FusionVerdicts,
    RouterFusion,
    VerdictLedger,
    WeightsDtype,
)

_ROWS: Final = 24
_LEAST_CLEAR: Final = 12  # rows of a router's trial that say what it does
_BLOCK: Final = 8  # of the trial's cache
_DTYPES: Final[dict[torch.dtype, WeightsDtype]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def fuse_modules(
    model: nn.Module, kernels: Fusions, known: FusionVerdicts = MappingProxyType({})
) -> FusionVerdicts:
    """Replace the forward of the modules of a bound model that our kernels compute as well.

    known: what was found of such a model before; modules that it names are not tried.

    Returns: what holds for its attention modules and routers.
    """
    ledger = VerdictLedger(known)
    for name, module in model.named_modules():
        if (front := _front(module)) is not None:
            _fuse_attention(name, module, front, kernels, ledger)
        elif _looks_like_router(module):
            attempt = functools.partial(_try_router, module, kernels)
            if (found := ledger.settle(name, module, RouterFusion, attempt)) is not None:
                vars(module)["forward"] = FusedRouter(module, kernels, found)
    return ledger.found


# ---- attention ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionFront:
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


def _front(module: nn.Module) -> AttentionFront | None:
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
    return AttentionFront(
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


def _fuse_attention(
    name: str, module: nn.Module, front: AttentionFront, kernels: Fusions, ledger: VerdictLedger
) -> None:
    attempt = functools.partial(_try_attention, module, front, kernels)
    fusion = ledger.settle(name, module, AttentionFusion, attempt)
    if fusion is None:
        return
    _share(module, front)
    vars(module)["forward"] = FusedAttention(module, front, kernels, fusion)


def _try_attention(module: Any, front: AttentionFront, kernels: Fusions) -> AttentionFusion | None:
    """What the module does if our kernels do the same."""
    for half in (False, True):
        if (found := _try_rotation(module, front, kernels, half)) is not None:
            return found
    return None


def _try_rotation(
    module: Any, front: AttentionFront, kernels: Fusions, half: bool
) -> AttentionFusion | None:
    weight = front.weight
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    # small rows show the epsilon of a norm
    hidden = randn(_ROWS, weight.shape[1]) * torch.logspace(-3, 1, _ROWS)[:, None].to(weight)
    angles = torch.randn((_ROWS, front.dim // 2), generator=generator)
    angles = angles if half else torch.cat([angles, angles], -1)
    rotation = tuple(f(angles).to(weight)[None] for f in (torch.cos, torch.sin))
    recorder = _Recorder(randn(1, _ROWS, front.heads, front.dim))
    binding = registrations.bound(module)
    registrations.bind(module, recorder)
    try:
        theirs = type(module).forward(
            module, hidden_states=hidden[None], position_embeddings=rotation, attention_mask=None
        )
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None  # it wants something else to work on
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
        return None
    slots = torch.randperm(_ROWS, generator=generator).to(weight.device)
    shape = (_ROWS // _BLOCK, _BLOCK, front.kv_heads, front.dim)
    caches = weight.new_empty(shape), weight.new_empty(shape)
    for early in (True, False):
        query = front(kernels, hidden, (rotation[0], rotation[1]), slots, caches, early)
        kept = [cache.view(_ROWS, front.kv_heads, front.dim)[slots] for cache in caches]
        if all(_same(a, b) for a, b in zip((query, *kept), recorder.qkv, strict=True)):
            return _with_options(module, early, half, recorder.options)
    return None


def _with_options(
    module: nn.Module, early: bool, half: bool, options: dict[str, Any]
) -> AttentionFusion | None:
    """options: what a module passes to attention; None: they are not what they should be."""
    found = {name: options.get(name) for name in ("scaling", "sliding_window", "softcap")}
    if (sinks := options.get("s_aux")) is not None:
        names = [name for name, own in module._parameters.items() if own is sinks]
        found["sinks"] = names[0] if names else sinks
    try:
        return msgspec.convert(
            {"type": "attention", "early": early, "half": half, **found}, AttentionFusion
        )
    except msgspec.ValidationError:
        return None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Row by row, but for rounding."""
    if ours.shape != theirs.shape:
        return False
    difference = (ours.float() - theirs.float()).flatten(1).norm(dim=1)
    size = theirs.float().flatten(1).norm(dim=1)
    return bool((difference <= 4 * torch.finfo(ours.dtype).eps * size).all())


def _share(module: Any, front: AttentionFront) -> None:
    """Let the projections be views of the joint weight, so that nothing is held twice."""
    begin = 0
    for linear in (module.q_proj, module.k_proj, module.v_proj):
        end = begin + linear.weight.shape[0]
        linear.weight = nn.Parameter(front.weight[begin:end], requires_grad=False)
        begin = end


class FusedAttention:
    """The forward of an attention module; what it passes to attention is the same each time.

    A model that rotates a part of each head (GLM) passes angles for that part alone, one that
    rotates nothing (Granite-4) passes none, which the trial cannot know: there the module computes.

    Attributes:
        binding: the cache and the batch, a `PagedAttention`.
        angles: that it is given for each token.
        window: as kernels take it. softcap: 0.0: none. sinks: [heads], or None.
    """

    def __init__(
        self, module: Any, front: AttentionFront, kernels: Fusions, fusion: AttentionFusion
    ) -> None:
        self.module = module
        self.front = front
        self.fusion = fusion
        self.binding = registrations.bound(module)
        self.angles = front.dim // 2 if fusion.half else front.dim
        self.scaling = front.dim**-0.5 if fusion.scaling is None else fusion.scaling
        self.window = fusion.sliding_window or -self.binding.chunk
        self.softcap = fusion.softcap or 0.0
        self.sinks: Tensor | None = None
        if fusion.sinks is not None:
            sinks = module.get_parameter(fusion.sinks).data
            self.sinks = sinks.to(front.weight.dtype).contiguous()
        self._kernels = kernels

    def __call__(self, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, None]:
        module, kernels = self.module, self._kernels
        rotation: tuple[Tensor, Tensor] | None = named.get("position_embeddings")
        if others or rotation is None or rotation[0].shape[-1] != self.angles:
            result: tuple[Tensor, None] = type(module).forward(
                module, hidden_states, *others, **named
            )
            return result
        batch = self.binding.batch
        caches = self.binding.key_cache, self.binding.value_cache
        query = self.front(
            kernels,
            hidden_states[0],
            rotation,
            batch.slot_mapping,
            caches,
            self.fusion.early,
        )
        out = kernels.attend(
            query,
            *caches,
            batch.query_start,
            batch.context_len,
            batch.block_tables,
            scaling=self.scaling,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )
        return module.o_proj(out.view(1, out.shape[0], -1)), None


# ---- router ---------------------------------------------------------------------------------


def _looks_like_router(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 2
        and module._parameters.keys() <= {"weight", "bias"}
        and not module._buffers
        and isinstance(getattr(module, "top_k", None), int)
    )


def _try_router(module: Any, kernels: Fusions) -> RouterFusion | None:
    weight = module.weight.data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((_ROWS, weight.shape[1]), generator=generator).to(weight)
    try:
        theirs = type(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None  # it wants something else to work on
    if not isinstance(theirs, tuple) or len(theirs) != 3:
        return None
    shapes = [(_ROWS, count) for count in (weight.shape[0], module.top_k, module.top_k)]
    if [tuple(t.shape) if isinstance(t, Tensor) else None for t in theirs] != shapes:
        return None
    logits, weights, ids = theirs
    if (dtype := _DTYPES.get(weights.dtype)) is None:
        return None
    for normalised in (True, False):
        fusion = RouterFusion(normalised, dtype)
        ours = FusedRouter(module, kernels, fusion)(x)
        if _same(ours[0], logits) and _same_choice(ours[1:], (weights, ids), logits):
            return fusion
    return None


def _same_choice(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], logits: Tensor) -> bool:
    """Whether (weights, ids) are the same choices. Which of two equally likely experts is the last
    one chosen, or comes first, is left open: rows of bf16 logits have such, and CUDA's topk takes
    them in an order of its own."""
    clear = _clear_rows(logits, theirs[1].shape[1])
    if int(clear.sum()) < _LEAST_CLEAR:
        return False
    (our_weights, our_ids), (weights, ids) = (
        (weights[clear].gather(1, order), ids[clear].gather(1, order))
        for weights, ids in (ours, theirs)
        for order in (ids[clear].argsort(1),)
    )
    return torch.equal(our_ids, ids) and torch.allclose(
        our_weights.float(),
        weights.float(),
        rtol=4 * torch.finfo(weights.dtype).eps,
        atol=0.0,
    )


def _clear_rows(logits: Tensor, topk: int) -> Tensor:
    """[rows] bool: the last expert chosen is likelier than the first one that is not, by more than
    the rounding of two ways to compute it."""
    likely = logits.float().softmax(-1).sort(-1, descending=True).values
    if topk >= likely.shape[1]:
        return torch.ones(len(likely), dtype=torch.bool, device=likely.device)
    last, next_ = likely[:, topk - 1], likely[:, topk]
    return last - next_ > 16 * torch.finfo(torch.float32).eps * last


class FusedRouter:
    """The forward of a router. weight: [experts, hidden]; bias: [experts], or None."""

    def __init__(self, module: Any, kernels: Fusions, fusion: RouterFusion) -> None:
        self.weight: Tensor = module.weight.data
        self.bias: Tensor | None = getattr(module, "bias", None)
        self.topk: int = module.top_k
        self.fusion = fusion
        self.dtype: torch.dtype = getattr(torch, fusion.dtype)
        self._choose = kernels.choose_experts

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight
        logits = F.linear(hidden_states.reshape(-1, weight.shape[1]), weight, self.bias)
        chosen, ids = self._choose(
            logits, self.topk, normalised=self.fusion.normalised, dtype=self.dtype
        )
        return logits, chosen, ids
