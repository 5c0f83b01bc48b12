"""A module gives way to our kernels only if it computes what they do; in Triton's interpreter."""

from __future__ import annotations

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
    fusions = gpu_kernels().fusions
    assert fusions is not None
    return fusions


class Bound:
    """Stands for the paged cache; the trial must put it back."""

    def attention(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("a trial must not touch the cache")


def halves(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def interleaved(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, turn: Any = halves, factor: float = 1.0) -> None:
        super().__init__()
        self.head_dim, self.turn, self.factor = DIM, turn, factor
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
        q, k = (x * cos + self.turn(x) * sin for x in (q, k))
        binding = registrations.bound(self)
        out = binding.attention(self, q * self.factor, k, v, None, scaling=0.5)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


@pytest.mark.parametrize(
    ("module", "fused"),
    [
        (Attention(), True),
        (Attention(turn=interleaved), False),
        (Attention(factor=1.1), False),
    ],
    ids=["halves", "interleaved", "scaled"],
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
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, HIDDEN, generator=torch.manual_seed(1)))
        self.top_k, self.rule = 3, rule

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states, self.weight)
        if self.rule == "sigmoid":
            weights, ids = logits.sigmoid().topk(self.top_k)
        elif self.rule == "least":
            weights, ids = logits.softmax(-1).topk(self.top_k, largest=False)
        else:
            weights, ids = logits.softmax(-1).topk(self.top_k)
        if self.rule == "normalised":
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, ids


@pytest.mark.parametrize(
    ("rule", "fused"),
    [("plain", True), ("normalised", True), ("sigmoid", False), ("least", False)],
)
def test_a_router_with_another_rule_is_left_alone(rule: str, fused: bool) -> None:
    module = Router(rule)
    with torch.inference_mode():
        fuse_modules(module, kernels())
        assert ("forward" in vars(module)) == fused
        x = torch.randn(5, HIDDEN)
        for ours, theirs in zip(module.forward(x), Router.forward(module, x), strict=True):
            torch.testing.assert_close(ours, theirs)


class TiedRouter(Router):
    """Takes of equally likely experts the last, where the kernel takes the first."""

    def __init__(self, seed: int, *, hidden: int, experts: int, topk: int, last: int = 0) -> None:
        super().__init__("normalised")
        weight = torch.randn(experts, hidden, generator=torch.manual_seed(seed)) * hidden**-0.5
        self.weight = nn.Parameter(weight.bfloat16())
        self.top_k, self.last = topk, last

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states, self.weight)
        likely = logits.float().softmax(-1).flip(-1)
        weights, places = torch.sort(likely, dim=-1, descending=True, stable=True)
        chosen = slice(self.last, self.last + self.top_k)
        weights, ids = weights[:, chosen], likely.shape[-1] - 1 - places[:, chosen]
        return logits, (weights / weights.sum(-1, keepdim=True)).to(logits.dtype), ids


@pytest.mark.parametrize("seed", range(12))
def test_a_router_is_known_whichever_of_equally_likely_experts_it_takes(seed: int) -> None:
    module = TiedRouter(seed, hidden=64, experts=32, topk=4)
    with torch.inference_mode():
        fuse_modules(module, kernels())
    assert "forward" in vars(module)


def test_a_router_that_takes_the_next_likely_ones_is_left_alone() -> None:
    module = TiedRouter(0, hidden=64, experts=32, topk=4, last=1)
    with torch.inference_mode():
        fuse_modules(module, kernels())
    assert "forward" not in vars(module)
