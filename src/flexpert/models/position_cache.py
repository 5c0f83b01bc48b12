"""Attention that depends on positions beyond its rotation, such as Llama-4's temperatures.

Such a module asks its cache how many tokens it has seen, and counts its rows from there. Rows of a
step are those of several sequences, so it is given a cache that answers with a number for each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexpert.models.state_view import CACHE, cache_position, takes_cache

_QUESTION = "get_seq_length"


class PositionCache:
    """The cache of all attention of a model; its methods are those of `transformers.Cache`.

    positions: [N] int64, of the rows that are computed; None: none are.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        """[N] int64: what makes the number of each row its position."""
        if self.positions is None:
            return 0
        count, device = self.positions.shape[0], self.positions.device
        return self.positions - torch.arange(count, device=device)

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values are kept elsewhere, see `PagedAttention`."""
        return key, value


def asks_for_length(module: nn.Module) -> bool:
    """Whether it is attention that asks its cache how many tokens it has seen."""
    if not hasattr(module, "is_causal") or not takes_cache(module):
        return False
    forward: Any = inspect.unwrap(type(module).forward)
    return _QUESTION in forward.__code__.co_names


def give_positions(modules: Sequence[nn.Module]) -> PositionCache | None:
    """Have those that ask be answered from now on; None: none does."""
    cache, asking = PositionCache(), [module for module in modules if asks_for_length(module)]
    for module in asking:
        at = cache_position(module)

        def give(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], at: int = at
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if len(args) > at:
                return (*args[:at], cache, *args[at + 1 :]), kwargs
            return args, {**kwargs, CACHE: cache}

        module.register_forward_pre_hook(give, with_kwargs=True)
    return cache if asking else None
