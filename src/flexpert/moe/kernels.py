"""The kernels of a device under one contract: C on a CPU (`ops`), Triton on a GPU (`cuda`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexpert.errors import FlexpertError
from flexpert.moe import ops


class PagedAttentionKernel(Protocol):
    """See `ops.paged_attention`."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        query_start: Tensor,
        context_len: Tensor,
        block_tables: Tensor,
        slot_mapping: Tensor,
        *,
        scaling: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor: ...


class NormKernel(Protocol):
    """See `ops.rms_norm`."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float, *, early: bool) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a model's dense part calls."""

    paged_attention: PagedAttentionKernel
    rms_norm: NormKernel


_CPU = Kernels(ops.paged_attention, ops.rms_norm)


def kernels_of(device: torch.device) -> Kernels:
    """The kernels of a device.

    Raises:
        FlexpertError: a GPU's, and the package triton is missing.
    """
    if device.type == "cpu":
        return _CPU
    try:
        from flexpert.moe.cuda import attention, norm
    except ImportError as error:
        raise FlexpertError(
            f"the kernels for GPUs need the package triton ({error}): pip install flexpert[cuda]"
        ) from error
    return Kernels(attention.paged_attention, norm.rms_norm)
