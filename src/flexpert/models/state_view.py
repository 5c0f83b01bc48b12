"""The cache that a layer with a state is given in place of transformers' own.

Such a layer (linear attention, a state-space model, a short convolution) asks the cache that its
forward gets for the state of its sequences and hands the new one back. A `StateView` is that cache
for one call of one layer, and holds nothing beyond it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE: Final = "cache"
"""The parameter through which transformers' layers get the cache."""

MASK: Final = "attention_mask"
"""The parameter through which they get the mask."""

StateKind = Literal["conv", "recurrent", "linear"]


class StateKey(NamedTuple):
    """One of a layer's states. number: a layer may have several of a kind."""

    kind: StateKind
    number: int = 0


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a layer keeps of one sequence under a key."""

    key: StateKey
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class StateView:
    """States of B sequences at one layer; its methods are those of `transformers.Cache`.

    states: by key, [B, *shape]; empty where the sequences begin. A layer may change them in place.
    """

    def __init__(
        self,
        states: dict[StateKey, Tensor] | None = None,
        dtypes: Mapping[StateKey, torch.dtype] = MappingProxyType({}),
    ) -> None:
        """dtypes: of the states, whatever a layer computes them in."""
        self.states: dict[StateKey, Tensor] = {} if states is None else states
        self._dtypes = dtypes
        self._begins = not self.states

    def go_on(self) -> None:
        """The next call of the layer continues where this one has ended."""
        self._begins = False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._before(StateKey("conv", state_idx))

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: object,
    ) -> Tensor:
        """conv_states: [B, channels, N], of the new tokens; returned with what was before."""
        key = StateKey("conv", state_idx)
        before = self._before(key)
        if before is None:
            kept = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            seen = F.pad(conv_states, (max(0, kept - conv_states.shape[-1]), 0))
        else:
            kept = before.shape[-1]
            seen = torch.cat([before, conv_states], dim=-1)
        self._keep(key, seen[..., -kept:])
        return seen

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._before(StateKey("recurrent", state_idx))

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: object
    ) -> Tensor:
        self._keep(StateKey("recurrent", state_idx), recurrent_states)
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self._before(StateKey("linear"))

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self._keep(StateKey("linear"), linear_cache)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def _before(self, key: StateKey) -> Tensor | None:
        return None if self._begins else self.states[key]

    def _keep(self, key: StateKey, state: Tensor) -> None:
        self.states[key] = state.to(self._dtypes.get(key, state.dtype))


def takes_cache(module: nn.Module) -> bool:
    """Whether a module's forward has the parameter `CACHE`."""
    return CACHE in inspect.signature(module.forward).parameters


def cache_position(module: nn.Module) -> int:
    """Where that parameter is among the module's positional ones."""
    return list(inspect.signature(module.forward).parameters).index(CACHE)
