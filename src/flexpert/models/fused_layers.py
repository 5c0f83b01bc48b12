"""Puts a few kernels where a decoder layer launches some fifteen, in steps of very few tokens.

What a layer computes is found out by trying it, as with its modules (`fused_modules`): a norm,
attention, a norm, experts behind a router, and what comes in added to both. Any other layer is left
alone.
"""

from __future__ import annotations

import functools
import itertools
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.kernels.kernel_set import FewTokenKernels, Fusions
from flexpert.models import recording, registrations
from flexpert.models.fused import FusedNorm
from flexpert.models.fused_modules import FusedAttention, FusedRouter
from flexpert.models.fusion_verdicts import FusionVerdicts, LayerFusion, VerdictLedger
from flexpert.moe.moe_layers import AddingMoELayers

_ROWS = 6


def fuse_layers(
    model: nn.Module, kernels: Fusions, known: FusionVerdicts = MappingProxyType({})
) -> FusionVerdicts:
    """Replace the forward of the decoder layers of a bound model that our kernels compute as well.

    Behind `fuse` and `fuse_modules`. known: what was found of such a model before; layers that it
    names are not tried.

    Returns: what holds for its layers.
    """
    ledger = VerdictLedger(known)
    if kernels.few is None:
        return ledger.found
    for name, module in model.named_modules():
        if (parts := _Parts.of(module)) is None or parts.depth > kernels.few.most_depth:
            continue
        attempt = functools.partial(_try_layer, module, parts)
        fusion = ledger.settle(name, module, LayerFusion, attempt)
        if fusion is not None and parts.named(fusion):
            vars(module)["forward"] = _FusedLayer(module, parts, fusion, kernels)
    return ledger.found


class _Parts:
    """The modules of what looks like a decoder layer, all of them fused.

    norms: by name. experts: what the experts' module is bound to.
    """

    def __init__(
        self,
        attention: tuple[str, FusedAttention],
        block: tuple[str, nn.Module],
        router: FusedRouter,
        experts: Any,
        norms: dict[str, FusedNorm],
    ) -> None:
        self.attention_name, self.attention = attention
        self.block_name, self.block = block
        self.router = router
        self.experts = experts
        self.norms = norms

    @classmethod
    def of(cls, layer: nn.Module) -> _Parts | None:
        """None: it has something else, or something less."""
        norms: dict[str, FusedNorm] = {}
        attention: list[tuple[str, FusedAttention]] = []
        blocks: list[tuple[str, nn.Module]] = []
        for name, child in layer.named_children():
            forward = _forward(child)
            if isinstance(forward, FusedNorm) and forward.weight.dtype == forward.dtype:
                norms[name] = forward
            elif isinstance(forward, FusedAttention):
                attention.append((name, forward))
            elif next(child.parameters(), None) is not None or next(child.children(), None):
                blocks.append((name, child))
        if len(norms) != 2 or len(attention) != 1 or len(blocks) != 1 or layer._parameters:
            return None
        if attention[0][1].softcap:
            return None
        inside = list(blocks[0][1].modules())
        routers = [f for m in inside if isinstance(f := _forward(m), FusedRouter)]
        experts = [bound for m in inside if (bound := registrations.bound(m)) is not None]
        if len(routers) != 1 or len(experts) != 1:
            return None
        weights = (routers[0].weight, routers[0].bias)
        known = {one.data_ptr() for one in weights if one is not None}
        if any(one.data_ptr() not in known for one in blocks[0][1].parameters()):
            return None  # experts that all tokens take, say
        return cls(attention[0], blocks[0], routers[0], experts[0], norms)

    @property
    def depth(self) -> int:
        """Elements of the longest row of a weight."""
        front = self.attention.front
        return max(front.weight.shape[1], front.heads * front.dim)

    def named(self, fusion: LayerFusion) -> bool:
        """Whether a verdict is about these."""
        return (
            fusion.attention == self.attention_name
            and fusion.experts == self.block_name
            and {fusion.attention_norm, fusion.experts_norm} == set(self.norms)
        )


def _forward(module: nn.Module) -> Any:
    return vars(module).get("forward")


def _try_layer(layer: nn.Module, parts: _Parts) -> LayerFusion | None:
    """What the layer does if it is what `_FusedLayer` computes."""
    weight = parts.attention.front.weight
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)

    hidden = randn(1, _ROWS, weight.shape[1])
    answer = randn(1, _ROWS, weight.shape[1])
    rotation = randn(1, _ROWS, parts.attention.angles), randn(1, _ROWS, parts.attention.angles)
    given: list[Tensor] = []

    def attention(hidden_states: Tensor, *_: Any, **rest: Any) -> tuple[Tensor, None]:
        angles = rest.get("position_embeddings")
        if isinstance(angles, tuple) and angles[0] is rotation[0] and angles[1] is rotation[1]:
            given.append(hidden_states)
        return answer, None

    experts, module = parts.experts, layer.get_submodule(parts.attention_name)
    compute, rows = experts.compute, experts.rows
    experts.compute, experts.rows = recording.stand_in_experts, _ROWS
    vars(module)["forward"] = attention
    try:
        theirs = type(layer).forward(
            layer, hidden, position_embeddings=rotation, attention_mask=None
        )
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None  # it wants something else to work on
    finally:
        experts.compute, experts.rows = compute, rows
        vars(module)["forward"] = parts.attention
    if not isinstance(theirs, Tensor) or theirs.shape != hidden.shape or len(given) != 1:
        return None
    for before, behind in itertools.permutations(parts.norms):
        if not torch.equal(parts.norms[before](hidden), given[0]):
            continue
        between = hidden + answer
        normed = parts.norms[behind](between)[0]
        _, weights, ids = parts.router(normed)
        ours = between + recording.stand_in(normed, ids, weights)[None]
        if torch.equal(ours, theirs):
            return LayerFusion(parts.attention_name, before, parts.block_name, behind)
    return None


class _FusedLayer:
    """The forward of a decoder layer: by few kernels where each sequence has one token and there
    are few of them, else as transformers has it. Where they may lie behind one another, attention
    is that of many tokens: ours reads keys before others of the step are written."""

    def __init__(
        self,
        layer: nn.Module,
        parts: _Parts,
        fusion: LayerFusion,
        usual: Fusions,
    ) -> None:
        self._layer = layer
        self._parts = parts
        self._output: Any = layer.get_submodule(parts.attention_name).get_submodule("o_proj")
        before, behind = (
            parts.norms[name] for name in (fusion.attention_norm, fusion.experts_norm)
        )
        self._before = before.weight, before.eps, before.early
        self._behind = behind.weight, behind.eps, behind.early
        self._usual = usual

    def __call__(self, hidden_states: Tensor, *others: Any, **rest: Any) -> Tensor:
        rotation = rest.get("position_embeddings")
        if not others and rotation is not None and self._takes(hidden_states, rotation):
            kernels = self._kernels_of(hidden_states.shape[1])
            if kernels is not None:
                return self._by(kernels, hidden_states[0], rotation)[None]
        result: Tensor = type(self._layer).forward(self._layer, hidden_states, *others, **rest)
        return result

    def _takes(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> bool:
        attention, batch = self._parts.attention, self._parts.attention.binding.batch
        tokens = hidden.shape[1]
        return (
            batch is not None
            and tokens == batch.slot_mapping.shape[0] == batch.block_tables.shape[0]
            and hidden.dtype == attention.front.weight.dtype
            and rotation[0].shape[-1] == attention.angles
            and recording.current() is None
        )

    def _kernels_of(self, tokens: int) -> FewTokenKernels | None:
        usual = self._usual
        if not tokens:
            return None
        if tokens <= usual.few_tokens:
            return usual.few
        return usual.some if tokens <= usual.some_tokens else None

    def _by(self, kernels: FewTokenKernels, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """[tokens, hidden], contiguous."""
        router = self._parts.router
        front = self._parts.attention.front
        x = x.contiguous()
        qkv = kernels.project(x, front.weight, front.bias, norm=self._before)
        attended = self._attend(kernels, qkv.view(x.shape[0], -1, front.dim), rotation)
        output = self._output
        x = kernels.project(attended, output.weight, output.bias, residual=x)
        normed, weights, ids = kernels.route(
            x,
            self._behind,
            router.weight,
            router.bias,
            router.topk,
            normalised=router.fusion.normalised,
            dtype=router.dtype,
        )
        experts = self._parts.experts
        runtime, gate = experts.runtime, experts.apply_gate
        if isinstance(runtime, AddingMoELayers) and experts.compute == runtime.forward:
            added = runtime.forward_added(experts.layer, normed, ids, weights, x, gate)
            if added is not None:
                return added
        sums: Tensor = experts.compute(experts.layer, normed, ids, weights, gate)
        return x + sums

    def _attend(
        self, kernels: FewTokenKernels, qkv: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        """qkv: [tokens, heads + 2 * kv_heads, dim] → [tokens, heads * dim]."""
        attention = self._parts.attention
        front, binding, batch = attention.front, attention.binding, attention.binding.batch
        cos, sin = (part[0].contiguous() for part in rotation)
        keys, values, slots = binding.key_cache, binding.value_cache, batch.slot_mapping
        normed: dict[str, Any] = {
            "norms": front.norms,
            "eps": front.eps,
            "early": attention.fusion.early,
        }
        how: dict[str, Any] = {
            "scaling": attention.scaling,
            "window": attention.window,
            "sinks": attention.sinks,
        }
        context, tables = batch.context_len, batch.block_tables
        if not batch.shares:
            return kernels.attend(
                qkv, cos, sin, slots, keys, values, context, tables, **normed, **how
            )
        query = self._usual.rotate_and_store(qkv, cos, sin, slots, keys, values, **normed)
        out = self._usual.attend(query, keys, values, batch.query_start, context, tables, **how)
        return out.view(out.shape[0], -1)
