"""A whole model on one device with the kernels of a GPU, ready to be stepped: in Triton's
interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.experts import ExpertWeights
from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.moe.cuda.local_experts import LocalExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import expert_tables
from support.checkpoints import SLOTS, Sequences


def device_runner(
    model: Path, device: torch.device, *, dtype: str = "float32", blocks: int = 64
) -> Sequences:
    """All experts are on it."""
    source = ModelSource.open(str(model), dtype=dtype, latent_cache=True)
    info = source.info
    moe = LocalExperts(0, info.moe_layers, info.experts, source.expert_shape(), device)
    runner = ModelRunner.load(
        source,
        moe=moe,
        kv_blocks=blocks,
        kv_block_size=16,
        deterministic=False,
        state_slots=SLOTS,
        device=device,
        kernels=gpu_kernels(device),
    )
    placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
    tables = expert_tables(placement, 0)
    held = [
        SlotAddresses.of(
            [_on(source.load_experts(layer, [expert])[expert], device) for expert in experts]
        )
        for layer, experts in enumerate(placement.held_by(0))
    ]
    moe.install(moe.stage([LayerState(*pair) for pair in zip(tables, held, strict=True)]))
    return Sequences(runner, 16)


def _on(expert: ExpertWeights, device: torch.device) -> ExpertWeights:
    fields = {field.name: getattr(expert, field.name) for field in dataclasses.fields(expert)}
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in fields.items()
    }
    return ExpertWeights(**moved)
