"""A model with random weights on a GPU, as large as a real one; no checkpoint is read."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexpert.bench.model_shapes import random_model_info
from flexpert.kernels.cuda.device_experts import SlotAddresses
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.kernels.weight_formats import FP8
from flexpert.models import registrations
from flexpert.models.model_runner import ModelRunner, compute_buffers
from flexpert.models.probe import Probe, find_architecture
from flexpert.models.source import ModelInfo
from flexpert.moe.moe_layers import ElasticMoELayers, LayerState
from flexpert.moe.placement import Placement
from flexpert.moe.runtime import expert_tables

_STD = 0.02


def quantised_with(whole: ExpertWeights) -> ExpertWeights:
    """An expert in fp8; the one given becomes what it is, so that others compute the same."""
    small = whole.quantized(FP8)
    restored = small.dequantized()
    whole.gate_up.copy_(restored.gate_up)
    whole.down.copy_(restored.down)
    return small


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Weights by their name in transformers, on a GPU; experts fused as there.

    placement: on which ranks the experts are. rank: whose share this is, with the dense part.
    info, found: of a cache that keeps latents where attention has them, but for `expanded()`.
    quantised: of each MoE layer, the experts in fp8 that are held, or None; what is in `weights` is
    then the same function.
    """

    config: PreTrainedConfig
    info: ModelInfo
    found: Probe
    weights: dict[str, Tensor]
    placement: Placement
    rank: int
    expert_shape: ExpertShape
    quantised: list[list[ExpertWeights]] | None = None

    @classmethod
    def build(
        cls,
        config: PreTrainedConfig,
        device: torch.device,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        place: Callable[[ModelInfo], Placement],
        rank: int = 0,
        quantise: bool = False,
        whole: bool = True,
    ) -> RandomModel:
        """The weights depend on the seed alone, and not on who holds them; norms are 1.

        Args:
            place: where the experts of a model are.
            quantise: the engine's experts are fp8.
            whole: keep those of `transformers()` next to them.
        """
        skeleton, found = find_architecture(config, dtype, latent_cache=True)
        call = found.experts_calls[0]
        draw = torch.Generator(device)

        def drawn(name: str, shape: torch.Size) -> Tensor:
            tensor = torch.empty(shape, dtype=dtype, device=device)
            draw.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            return tensor.fill_(1) if len(shape) == 1 else tensor.normal_(std=_STD, generator=draw)

        info = random_model_info(config, skeleton, found, dtype)
        placement = place(info)
        names = (call.name for call in found.experts_calls)
        held = dict(zip(names, placement.held_by(rank), strict=True))
        weights = {}
        for name, parameter in skeleton.named_parameters():
            module = name.rpartition(".")[0]
            if module not in held:
                weights[name] = drawn(name, parameter.shape)
                continue
            shape = parameter.shape[1:]
            weights[name] = torch.empty((len(held[module]), *shape), dtype=dtype, device=device)
            for index, expert in enumerate(held[module]):
                weights[name][index] = drawn(f"{name}/{expert}", shape)
        up, down = (weights[f"{call.name}.{part}_proj"].shape for part in ("gate_up", "down"))
        shape = ExpertShape(up[2], up[1], down[2], FP8 if quantise else dtype)
        model = cls(config, info, found, weights, placement, rank, shape)
        if not quantise:
            return model
        quantised = [model._quantise(layer, keep=whole) for layer in range(info.moe_layers)]
        return replace(model, quantised=quantised)

    def expanded(self) -> RandomModel:
        """The same weights, with a cache of the keys and values of all heads."""
        skeleton, found = find_architecture(self.config, self.info.dtype)
        info = random_model_info(self.config, skeleton, found, self.info.dtype)
        return replace(self, found=found, info=info)

    def _quantise(self, layer: int, *, keep: bool) -> list[ExpertWeights]:
        """The experts of a layer in fp8; what `weights` has becomes equal to them, or goes."""
        experts = [quantised_with(whole) for whole in self.experts(layer)]
        if not keep:
            name = self.found.experts_calls[layer].name
            for part in ("gate_up", "down"):
                del self.weights[f"{name}.{part}_proj"]
        return experts

    @property
    def dense_nbytes(self) -> int:
        """Of the weights that every step reads: all but the experts and the embedding."""
        experts = tuple(call.name + "." for call in self.found.experts_calls)
        return sum(
            tensor.nbytes
            for name, tensor in self.weights.items()
            if not name.startswith(experts) and "embed_tokens" not in name
        )

    @property
    def expert_nbytes(self) -> int:
        """Of one expert of one layer."""
        return self.expert_shape.nbytes

    def runner(
        self,
        moe: ElasticMoELayers,
        *,
        kv_blocks: int,
        kv_block_size: int,
        state_slots: int = 0,
        runtime: Any = None,
    ) -> ModelRunner:
        """Our engine's view of it; the weights are shared, not copied.

        runtime: stands between the model and `moe`, or None.
        """
        model = self._model(registrations.IMPLEMENTATION)
        for call in self.found.experts_calls:
            model.get_submodule(call.name)._parameters.clear()
        runner = ModelRunner.assemble(
            model,
            self.info,
            attention_names=tuple(self.found.attention_shapes),
            experts_names=tuple(call.name for call in self.found.experts_calls),
            moe=runtime or moe,
            kv_blocks=kv_blocks,
            kv_block_size=kv_block_size,
            state_names=tuple(self.found.states),
            state_slots=state_slots,
            kernels=gpu_kernels(next(iter(self.weights.values())).device),
        )
        moe.install(moe.stage(self.layers()))
        return runner

    def experts(self, layer: int) -> list[ExpertWeights]:
        """Those held of a MoE layer, in slot order; whole ones as views."""
        if self.quantised is not None:
            return self.quantised[layer]
        name = self.found.experts_calls[layer].name
        up, down = self.weights[f"{name}.gate_up_proj"], self.weights[f"{name}.down_proj"]
        return [ExpertWeights(*pair) for pair in zip(up, down, strict=True)]

    def layers(self) -> list[LayerState[SlotAddresses]]:
        """What this rank serves with."""
        return [
            LayerState(table, SlotAddresses.of(self.experts(layer)))
            for layer, table in enumerate(expert_tables(self.placement, self.rank))
        ]

    def transformers(self) -> PreTrainedModel:
        """The same as transformers runs it: sdpa, and grouped_mm for the experts, which must all
        be here, in order."""
        model = self.expanded()._model("sdpa")
        model.set_experts_implementation("grouped_mm")
        return model

    def _model(self, attention: str) -> PreTrainedModel:
        model = self.found.build(self.info.dtype, attention=attention)
        with torch.no_grad():
            compute_buffers(model)
        device = next(iter(self.weights.values())).device
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:  # corrections of a router, which are 0
                    module._buffers[name] = torch.zeros_like(buffer, device=device)
                elif buffer is not None:
                    module._buffers[name] = buffer.to(device)
        for name, tensor in self.weights.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return model
