"""The contract of a rank's MoE layers: what a model calls, and what an engine changes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from flexpert.comm import ExpertTable
from flexpert.kernels.experts import Gate
from flexpert.moe.load_snapshot import LoadSnapshot

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class LayerState(Generic[E]):
    """One layer in one epoch: where its experts are, and those held here, as the device has them
    (`Store.layer`).

    split: [period, experts + 1] int64 on the host, in place of an expert which entry of the table a
    token takes, by its index modulo the period; the last column is for no expert, -1. None: the
    table has one entry for each expert.
    """

    table: ExpertTable
    experts: E
    split: Tensor | None = None


class MoELayers(Protocol):
    """Where the routed experts' sum comes from; called by a model, each layer once a step."""

    def expect(self, tokens: int, mean_tokens: int = 0) -> None:
        """So many rows of the batches to come count; the rest is padding.

        Where the model cuts its batches to their rows, as on a CPU, there is no padding.

        mean_tokens: of the ranks in the step to come; 0: as many as here.
        """
        ...

    def forward(
        self, layer: int, x: Tensor, expert_ids: Tensor, weights: Tensor, apply_gate: Gate
    ) -> Tensor:
        """The routed experts' weighted sum for this rank's tokens; serves the peers' on the way.

        Args:
            layer: index among the MoE layers.
            x: [T, hidden]; T may be 0, the exchanges are walked all the same.
            expert_ids: [T, k] int; -1: none. weights: [T, k] of any float dtype. All contiguous.

        Returns:
            [T, hidden] in x's dtype.
        """
        ...


@runtime_checkable
class NativeMoELayers(Protocol):
    """MoE layers that C may walk, in a step that is a program of our kernels."""

    def native(self) -> AbstractContextManager[int]:
        """While it is entered, C may walk layers on this thread. What is entered is the address of
        a `moe_step` (kernels/cpu/tables.h), 0 where `MoELayers.forward` is to be asked for each.

        Raises, also when it is left: what `forward` raises.
        """
        ...


@runtime_checkable
class AddingMoELayers(MoELayers, Protocol):
    """MoE layers of few tokens that are added to something in the same kernel."""

    def forward_added(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        residual: Tensor,
        apply_gate: Gate,
    ) -> Tensor | None:
        """`MoELayers.forward` + residual, [T, hidden]; None: not of such experts.

        x, expert_ids and weights were computed by the last kernel but those of this call.
        """
        ...


class ElasticMoELayers(MoELayers, Protocol):
    """MoE layers whose experts an engine changes between steps.

    walked: layers computed so far; a replayed graph counts none. splits: a layer's state may have a
    `split`.
    """

    splits: bool

    @property
    def walked(self) -> int: ...

    def stage(self, layers: Sequence[LayerState[Any]]) -> Any:
        """All that can be done ahead for `install`, to which the result goes; an empty list: no
        expert is anywhere.

        May be called in another thread while steps are computed; what the calling thread launches
        is to be waited for.

        Raises:
            ValueError: the device cannot compute with these.
        """
        ...

    def install(self, staged: Any) -> None:
        """Use these from the next step on; between two steps, and does not wait for the device."""
        ...

    def lost_rows(self) -> Tensor | None:
        """[tokens] bool: which tokens of the step lost a choice, because nobody holds the expert;
        None: none did. To be asked after each step with tokens."""
        ...

    def loads(self) -> LoadSnapshot | None:
        """How often each expert was chosen here; None: it is not counted. Between two steps; may
        wait for the device."""
        ...
