"""A decoder layer gives way to our kernels only if it computes what they do; in the interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from models.test_fused_modules import HIDDEN, Attention, Bound

from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models import registrations
from flexpert.models.fused import fuse
from flexpert.models.fused_layers import fuse_layers
from flexpert.models.fused_modules import fuse_modules
from flexpert.models.fusion_verdicts import LayerFusion, Verdict

EXPERTS, TOPK = 16, 2


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOPK
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        weights, ids = logits.softmax(-1).topk(TOPK)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class Experts(nn.Module):
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        bound = registrations.bound(self)
        result: Tensor = bound.compute(0, x, ids, weights, None)
        return result


class Block(nn.Module):
    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.gate, self.experts = Router(), Experts()
        self.shared = nn.Linear(HIDDEN, HIDDEN) if shared else None

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, HIDDEN)
        _, weights, ids = self.gate(x)
        y = self.experts(x, ids, weights)
        if self.shared is not None:
            y = y + self.shared(x)
        return y.view(hidden.shape)


class Layer(nn.Module):
    """kind: "usual", or in what it differs from others."""

    def __init__(self, kind: str = "usual") -> None:
        super().__init__()
        self.kind = kind
        self.attention = Attention()
        self.first, self.second = Norm(), Norm()
        self.block = Block(shared=kind == "shared expert")
        if kind == "third norm":
            self.third = Norm()

    def forward(
        self, hidden: Tensor, position_embeddings: Any = None, attention_mask: Any = None
    ) -> Tensor:
        first, second = self.first, self.second
        if self.kind == "norms named the other way":
            first, second = second, first
        given = hidden if self.kind == "norm behind" else first(hidden)
        y, _ = self.attention(
            given, position_embeddings=position_embeddings, attention_mask=attention_mask
        )
        if self.kind == "norm behind":
            y = first(y)
        x = hidden + (y * 0.5 if self.kind == "scaled" else y)
        if self.kind == "parallel":
            return x + self.block(second(hidden))
        return x + self.block(second(x))


def prepared(kind: str) -> Layer:
    torch.manual_seed(0)
    layer = Layer(kind)
    registrations.bind(layer.attention, Bound())
    forward = SimpleNamespace(forward=None)
    bound = SimpleNamespace(compute=None, rows=0, layer=0, runtime=forward, apply_gate=None)
    registrations.bind(layer.block.experts, bound)
    return layer


def fused(layer: Layer, known: dict[str, Verdict] | None = None) -> Verdict | None:
    kernels = gpu_kernels(torch.device("cpu"))
    assert kernels.fusions is not None
    with torch.inference_mode():
        fuse(layer, kernels, deterministic=False)
        fuse_modules(layer, kernels.fusions)
        return fuse_layers(layer, kernels.fusions, known or {}).get("")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("usual", LayerFusion("attention", "first", "block", "second")),
        ("norms named the other way", LayerFusion("attention", "second", "block", "first")),
        ("norm behind", None),
        ("scaled", None),
        ("parallel", None),
    ],
)
def test_what_a_layer_computes_is_tried(kind: str, expected: LayerFusion | None) -> None:
    layer = prepared(kind)
    verdict = fused(layer)
    assert verdict is not None
    assert verdict.fusion == expected
    assert ("forward" in vars(layer)) == (expected is not None)
    bound = registrations.bound(layer.block.experts)
    assert bound.compute is None  # as before the trial
    assert "forward" in vars(layer.attention)


@pytest.mark.parametrize("kind", ["shared expert", "third norm"])
def test_a_layer_with_other_modules_is_not_tried(kind: str) -> None:
    layer = prepared(kind)
    assert fused(layer) is None
    assert "forward" not in vars(layer)


def test_a_verdict_about_other_modules_counts_for_nothing() -> None:
    layer = prepared("usual")
    of = f"{Layer.__module__}.{Layer.__qualname__}"
    fused(layer, {"": Verdict(of, LayerFusion("attention", "first", "block", "third"))})
    assert "forward" not in vars(layer)
