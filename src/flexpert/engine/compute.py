"""What a rank computes on: its device, where the experts' sum comes from, and which batch sizes.

On a GPU one rank holds all experts: it votes with itself through its buffer, and exchanges nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flexpert.comm import Buffer
from flexpert.config import EngineConfig
from flexpert.models.padding import padded_sizes
from flexpert.models.source import ModelSource
from flexpert.moe.kernels import open_gpu
from flexpert.moe.runtime import MoERuntime

if TYPE_CHECKING:
    from flexpert.moe.cuda.runtime import LocalExperts

MOST_CAPTURED = 512
"""Sequences of the largest graph; more of them take so long that launching them costs little."""


def open_device(config: EngineConfig) -> torch.device:
    """The device that the settings name.

    Raises:
        ConfigError: it cannot be used.
    """
    return torch.device("cpu") if config.device == "cpu" else open_gpu()


def make_runtime(
    buffer: Buffer, source: ModelSource, config: EngineConfig, device: torch.device
) -> MoERuntime | LocalExperts:
    """The MoE layers of a rank on a device."""
    if config.device == "cpu":
        return MoERuntime(buffer, reduce="home" if config.deterministic else "rank")
    from flexpert.moe.cuda.runtime import LocalExperts  # needs triton

    info = source.info
    return LocalExperts(buffer.rank, info.moe_layers, info.experts, source.expert_shape(), device)


def warm_up_sizes(most: int, config: EngineConfig) -> list[int]:
    """Tokens of the batches to compute before serving: one of each kernel that will be needed."""
    if config.device != "cpu":
        return sorted({min(rows, most) for rows in (2, 16, 64, 256, 1024, most)})
    if config.deterministic:
        return sorted({min(rows, most) for rows in (1, 2, most)})
    return padded_sizes(most)


def graph_sizes(most: int) -> list[int]:
    """Sequences of the decode steps to capture: 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, … `most`."""
    most = min(most, MOST_CAPTURED)
    sizes = {1, 2, 4, 8} | {n for k in range(4, 10) for n in (1 << k, 3 << k - 1)}
    return sorted({size for size in sizes if size < most} | {most})
