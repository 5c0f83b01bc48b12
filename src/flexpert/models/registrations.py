"""The seam to transformers: one attention function and one experts function, registered.

Models built with these implementations call whatever is bound to the calling module: the paged
cache and the expert-parallel runtime while serving (`model_runner`), a recorder on the meta device
while opening a checkpoint (`probe`). The only global state is transformers' own registries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IMPLEMENTATION: Final = "flexpert"
"""Attention and experts while serving. No mask function: transformers then builds no masks."""

PROBE: Final = "flexpert_probe"
"""Attention that also gets the mask the model asked for, to check that we honour it."""

_BOUND: Final = "_flexpert"


class AttentionBinding(Protocol):
    """What an attention module is bound to."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        **kwargs: Any,
    ) -> Tensor:
        """query: [1, heads, N, key_dim], key: [1, kv_heads, N, key_dim], value: [1, kv_heads, N,
        value_dim] → [1, N, heads, value_dim]."""
        ...


class ExpertsBinding(Protocol):
    """What an experts module is bound to."""

    def experts(self, module: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """x: [N, hidden], expert_ids and weights: [N, k] → [N, hidden]."""
        ...


@dataclass(frozen=True, slots=True)
class AskedMask:
    """What a model asked for in place of a mask tensor.

    sees: (batch, head, query position, key position) → bool, of transformers' mask functions.
    sizes: numbers of queries and keys.
    """

    sees: Callable[..., Tensor]
    sizes: tuple[int, int]

    def __getitem__(self, part: Any) -> Tensor:
        """What an indexer gets of it while a model is walked: a mask without values, of these
        sizes."""
        return torch.ones((1, 1, *self.sizes), dtype=torch.bool, device="meta")[part]


def bind(module: nn.Module, binding: AttentionBinding | ExpertsBinding) -> None:
    """Let the registered functions, when called by `module`, use `binding`."""
    object.__setattr__(module, _BOUND, binding)


def bound(module: nn.Module) -> Any:
    """What `bind` gave a module; None: nothing."""
    return getattr(module, _BOUND, None)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    return module._flexpert.attention(module, query, key, value, attention_mask, **kwargs), None


def call_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What an experts module with our implementation computes: `ExpertsBinding.experts` of what it
    is bound to."""
    result: Tensor = module._flexpert.experts(module, hidden_states, top_k_index, top_k_weights)
    return result


def _asked_mask(
    *, mask_function: Callable[..., Tensor], q_length: int, kv_length: int, **_: object
) -> AskedMask:
    return AskedMask(mask_function, (int(q_length), int(kv_length)))


def register() -> None:
    """Make both implementations known to transformers; idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
    ALL_ATTENTION_FUNCTIONS.register(PROBE, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBE, _asked_mask)
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, call_experts)
