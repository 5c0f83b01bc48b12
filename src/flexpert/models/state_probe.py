"""Which layers of a model keep a state of each sequence, and of which shapes: found by a walk.

While the model is walked on the meta device, each module that takes a cache of its own accord is
given one that writes down what it keeps.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from flexpert.errors import UnsupportedModel
from flexpert.models.state_view import (
    CACHE,
    MASK,
    StateKey,
    StateShape,
    StateView,
    cache_position,
    takes_cache,
)


class StateProbe(StateView):
    """The cache of one module while it is walked.

    layer: the number by which the module asks for its states; None: it has not. index_dim: numbers
    of the key of each token that it keeps as an indexer; 0: it does not.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        """dtype: of the model's cache."""
        super().__init__()
        self._dtype = dtype
        self.name = name
        self.layer: int | None = None
        self.index_dim = 0

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        if self.index_dim or indexer_key_states.ndim != 3:
            raise UnsupportedModel(f"{self.name} keeps something else than a key of each token")
        if indexer_key_states.dtype != self._dtype:
            raise UnsupportedModel(f"{self.name} keeps keys in {indexer_key_states.dtype}")
        self.index_dim = indexer_key_states.shape[2]
        return indexer_key_states

    def _before(self, key: StateKey) -> None:
        return None

    def _keep(self, key: StateKey, state: Tensor) -> None:
        if key in self.states:
            raise UnsupportedModel(f"{self.name} updates its state twice in one pass")
        super()._keep(key, state)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self.layer = layer_idx

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        self.layer = layer_idx

    def get_linear_cache(self, layer_idx: int) -> None:
        self.layer = layer_idx

    @property
    def shapes(self) -> tuple[StateShape, ...]:
        """Of one sequence's states."""
        return tuple(
            StateShape(key, tuple(state.shape[1:]), state.dtype)
            for key, state in self.states.items()
        )


def cached_modules(model: nn.Module, attention: Collection[str]) -> dict[str, nn.Module]:
    """The innermost modules whose forward takes a cache, and that are no attention, by name."""
    takes = [name for name, module in model.named_modules() if name and takes_cache(module)]
    return {
        name: model.get_submodule(name)
        for name in takes
        if name not in attention and not any(other.startswith(f"{name}.") for other in takes)
    }


@contextlib.contextmanager
def probed_states(
    modules: dict[str, nn.Module], dtype: torch.dtype
) -> Iterator[dict[str, StateProbe]]:
    """While it is entered, each of these modules gets a `StateProbe` in place of its cache."""
    probes = {name: StateProbe(name, dtype) for name in modules}
    hooks = [
        module.register_forward_pre_hook(_give(module, probes[name]), with_kwargs=True)
        for name, module in modules.items()
    ] + [module.register_forward_hook(_answer(probes[name])) for name, module in modules.items()]
    try:
        yield probes
    finally:
        for hook in hooks:
            hook.remove()


INDEX_ANSWER: Final = (1, 2, 1)
"""The shape of what an indexer gives while a model is walked with two tokens."""


def _answer(probe: StateProbe) -> Any:
    def answer(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if not probe.index_dim:
            return result
        if MASK not in inspect.signature(module.forward).parameters:
            raise UnsupportedModel(f"{probe.name} picks keys without a mask")
        if not isinstance(result, Tensor) or result.is_floating_point():
            raise UnsupportedModel(f"{probe.name} gives something else than the keys it picks")
        return result.new_empty(INDEX_ANSWER)

    return answer


def _give(module: nn.Module, probe: StateProbe) -> Any:
    at = cache_position(module)

    def give(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > at:
            return (*args[:at], probe, *args[at + 1 :]), kwargs
        return args, {**kwargs, CACHE: probe}

    return give
