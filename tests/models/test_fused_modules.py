"""A module gives way to our kernels only if it computes what they do; in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.kernel_set import Fusions, gpu_kernels
from flexpert.models import registrations
from flexpert.models.fused_modules import fuse_modules

HEADS, KV_HEADS, DIM, HIDDEN = 4, 2, 16, 24


def kernels() -> Fusions:
    fusions = gpu_kernels(torch.device("cpu")).fusions
    assert fusions is not None
    return fusions


class Bound:
    """Stands for the paged cache; the trial must put it back."""

    chunk = 0

    def attention(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("a trial must not touch the cache")


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, turn: Any = halves, factor: float = 1.0, half: bool = False) -> None:
        super().__init__()
        self.head_dim, self.turn, self.factor, self.half = DIM, turn, factor, half
        self.q_proj = nn.Linear(HIDDEN, HEADS * DIM)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * DIM)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, DIM)
        q, k, v = (
            linear(hidden_states).view(shape).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        if self.half:
            cos, sin = (torch.cat([part, part], -1) for part in (cos, sin))
        q, k = (x * cos + self.turn(x) * sin for x in (q, k))
        binding = registrations.bound(self)
        out = binding.attention(self, q * self.factor, k, v, None, scaling=0.5)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        (Attention(), True),
        (Attention(half=True), True),
        (Attention(half=True, turn=interleaved), False),
        (Attention(turn=interleaved), False),
        (Attention(factor=1.1), False),
    ],
    ids=["halves", "angles of pairs", "angles of pairs, interleaved", "interleaved", "scaled"],
)
def test_attention_with_another_rotation_is_left_alone(module: Attention, fused: bool) -> None:
    binding = Bound()
    registrations.bind(module, binding)
    before = module.q_proj.weight.clone()
    with torch.inference_mode():
        fuse_modules(module, kernels())
    assert ("forward" in vars(module)) == fused
    assert registrations.bound(module) is binding
    assert torch.equal(module.q_proj.weight, before)
    shared = module.q_proj.weight.data_ptr() + before.nbytes == module.k_proj.weight.data_ptr()
    assert shared == fused


class Router(nn.Module):
    def __init__(self, rule: str, biased: bool = False) -> None:
        super().__init__()
        if biased:
            self.bias = nn.Parameter(torch.randn(12, generator=torch.manual_seed(2)))
        self.weight = nn.Parameter(torch.randn(12, HIDDEN, generator=torch.manual_seed(1)))
        self.top_k, self.rule = 3, rule

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states, self.weight, getattr(self, "bias", None))
        if self.rule == "sigmoid":
            weights, ids = logits.sigmoid().topk(self.top_k)
        elif self.rule == "least":
            weights, ids = logits.softmax(-1).topk(self.top_k, largest=False)
        else:
            weights, ids = logits.softmax(-1).topk(self.top_k)
        if self.rule == "of the best":
            weights, ids = logits.topk(self.top_k)
            weights = weights.softmax(-1)
        if self.rule == "normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, ids


@pytest.mark.parametrize(
    ("rule", "fused"),
    [
        ("plain", True),
        ("normalised", True),
        ("of the best", True),
        ("sigmoid", False),
        ("least", False),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_router_with_another_rule_is_left_alone(rule: str, fused: bool, biased: bool) -> None:
    module = Router(rule, biased)
    with torch.inference_mode():
        fuse_modules(module, kernels())
        assert ("forward" in vars(module)) == fused
        x = torch.randn(5, HIDDEN)
        for ours, theirs in zip(module.forward(x), Router.forward(module, x), strict=True):
            torch.testing.assert_close(ours, theirs)


class TiedRouter(Router):
    """Takes of equally likely experts the last, where the kernel takes the first."""

    def __init__(self, seed: int, *, hidden: int, experts: int, topk: int) -> None:
        super().__init__("normalised")
        weight = torch.randn(experts, hidden, generator=torch.manual_seed(seed)) * hidden**-0.5
        self.weight = nn.Parameter(weight.bfloat16())
        self.top_k = topk

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states, self.weight)
        weights, ids = self.choose(logits.float().softmax(-1))
        return logits, self.weigh(weights).to(logits.dtype), ids

    def choose(self, likely: Tensor) -> tuple[Tensor, Tensor]:
        weights, places = torch.sort(likely.flip(-1), dim=-1, descending=True, stable=True)
        return weights[:, : self.top_k], likely.shape[-1] - 1 - places[:, : self.top_k]

    def weigh(self, weights: Tensor) -> Tensor:
        return weights / weights.sum(-1, keepdim=True)


class ScaledRouter(TiedRouter):
    def weigh(self, weights: Tensor) -> Tensor:
        return 2.5 * super().weigh(weights)


class SigmoidRouter(TiedRouter):
    def choose(self, likely: Tensor) -> tuple[Tensor, Tensor]:
        return super().choose(likely.log().sigmoid())


class BiasedRouter(TiedRouter):
    """Chooses by scores with a small bias, as DeepSeek-V3 does; the weights are without it."""

    def choose(self, likely: Tensor) -> tuple[Tensor, Tensor]:
        bias = torch.linspace(-0.01, 0.01, likely.shape[-1])
        _, ids = super().choose(likely + bias)
        return likely.gather(1, ids), ids


class GroupedRouter(TiedRouter):
    """Chooses among the experts of the better half of eight groups."""

    def choose(self, likely: Tensor) -> tuple[Tensor, Tensor]:
        groups = likely.view(len(likely), 8, -1)
        worse = groups.amax(-1).argsort(-1)[:, :4]
        open_ = groups.scatter(1, worse[..., None].expand(-1, -1, groups.shape[-1]), 0.0)
        return super().choose(open_.flatten(1))


class OneFewerRouter(TiedRouter):
    """The last of its choices counts nothing."""

    def weigh(self, weights: Tensor) -> Tensor:
        weights = weights.clone()
        weights[:, -1] = 0.0
        return super().weigh(weights)


class NextRouter(TiedRouter):
    """Leaves the likeliest out."""

    def choose(self, likely: Tensor) -> tuple[Tensor, Tensor]:
        return super().choose(likely.masked_fill(likely == likely.amax(-1, keepdim=True), 0.0))


def first_of_equals(
    logits: Tensor, topk: int, *, normalised: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What the kernel computes, at the size of real routers in no time."""
    likely = logits.float().softmax(-1)
    weights, ids = torch.sort(likely, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :topk], ids[:, :topk]
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), ids


def let_in(kind: type[TiedRouter], seed: int) -> bool:
    module = kind(seed, hidden=1024, experts=128, topk=8)
    with torch.inference_mode():
        fuse_modules(module, replace(kernels(), choose_experts=first_of_equals))
    return "forward" in vars(module)


def test_a_router_is_known_whichever_of_equally_likely_experts_it_takes() -> None:
    assert [seed for seed in range(40) if not let_in(TiedRouter, seed)] == []


@pytest.mark.parametrize(
    "kind",
    [ScaledRouter, SigmoidRouter, BiasedRouter, GroupedRouter, OneFewerRouter, NextRouter],
)
def test_a_router_that_does_something_else_is_never_let_in(kind: type[TiedRouter]) -> None:
    assert [seed for seed in range(40) if let_in(kind, seed)] == []


def test_a_router_whose_choices_are_mostly_ties_is_left_alone() -> None:
    """Too few rows say what it does."""
    module = TiedRouter(0, hidden=64, experts=32, topk=4)
    module.weight.data[6:] = module.weight.data[6].clone()
    with torch.inference_mode():
        fuse_modules(module, replace(kernels(), choose_experts=first_of_equals))
    assert "forward" not in vars(module)


def test_the_kernel_takes_the_place_of_a_router_with_ties() -> None:
    module = TiedRouter(1, hidden=64, experts=32, topk=4)
    with torch.inference_mode():
        fuse_modules(module, kernels())
    assert "forward" in vars(module)
