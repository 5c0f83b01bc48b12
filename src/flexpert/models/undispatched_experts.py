"""Families whose experts transformers computes in place: how they come to the registered function.

Most experts modules of transformers call whatever implementation was registered. A few, written
before that or unlike the rest, do not; those that amount to the same get another forward here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from flexpert.errors import UnsupportedModel
from flexpert.models import registrations


def dispatch_experts(model: nn.Module) -> None:
    """Let every module of a model that is known here call the registered experts function.

    Raises:
        UnsupportedModel: it is configured as no published checkpoint is.
    """
    for module in list(model.modules()):
        adapt = _ADAPTED.get(type(module).__name__)
        if adapt is not None:
            adapt(module)


def _describe(experts: Any, count: int, *, transposed: bool = False) -> None:
    """Give an experts module what transformers gives those that it dispatches."""
    experts.num_experts = count
    experts.has_gate = True
    experts.has_bias = False
    experts.has_post_expert_norm = False
    experts.is_transposed = transposed
    experts.is_concatenated = True
    if not hasattr(experts, "_apply_gate"):
        experts._apply_gate = MethodType(_default_apply_gate, experts)


def _as_they_are(experts: Any) -> None:
    """Its forward has the registered function's arguments and means the same."""
    _describe(experts, int(experts.num_experts))
    experts.forward = MethodType(registrations.call_experts, experts)


def _with_identities(experts: Any) -> None:
    """LongCat-Flash: experts beyond the routed ones return what they get, at no cost."""
    routed = int(experts.num_routed_experts)
    _describe(experts, routed)

    def forward(x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        identity = expert_ids >= routed
        kept = weights.masked_fill(~identity, 0.0).sum(1, keepdim=True)
        y = registrations.call_experts(
            experts, x, expert_ids.masked_fill(identity, -1), weights.masked_fill(identity, 0.0)
        )
        return y + (x * kept).to(y.dtype)

    experts.forward = forward


def _weighted_inputs(block: Any) -> None:
    """Llama-4: an expert gets its token times the token's weight, and its result counts whole."""
    if block.top_k != 1:
        raise UnsupportedModel(
            f"config.json says num_experts_per_tok {block.top_k}; Llama-4 is served with 1, as it "
            "was published"
        )
    experts = block.experts
    _describe(experts, int(block.num_experts), transposed=True)

    def forward(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.reshape(-1, block.hidden_dim)
        scores, logits = block.router(x)
        chosen = logits.argmax(1, keepdim=True)
        routed = registrations.call_experts(
            experts,
            x * scores.gather(1, chosen),
            chosen,
            torch.ones(chosen.shape, dtype=torch.float32, device=x.device),
        )
        return block.shared_expert(x) + routed, logits

    block.forward = forward


_ADAPTED: Final[dict[str, Callable[[Any], None]]] = {
    "Step3p7Experts": _as_they_are,
    "LongcatFlashExperts": _with_identities,
    "Llama4TextMoe": _weighted_inputs,
}
