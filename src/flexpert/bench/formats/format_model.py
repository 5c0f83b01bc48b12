"""A random model of GPT-OSS' shapes whose experts lie in memory in one format of weights.

All formats are given the same function as far as they hold it: the weights are drawn in MXFP4, as
GPT-OSS' files have them, and bf16 holds the same values.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, PreTrainedConfig, PreTrainedModel

from flexpert.bench.model_shapes import random_model_info
from flexpert.comm import BufferSpec, make_buffer
from flexpert.kernels.cpu.expert_products import LayerExperts
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.kernels.kernel_set import cpu_kernels, gpu_kernels
from flexpert.kernels.weight_formats import FORMATS, MXFP4, WeightFormat, int4_of
from flexpert.models import registrations
from flexpert.models.model_runner import ModelRunner, compute_buffers
from flexpert.models.probe import Probe, find_architecture
from flexpert.models.source import ModelInfo
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.moe_layers import ElasticMoELayers, LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import MoERuntime, expert_tables

LAYERS = 24
VOCABULARY = 201_088
BLOCK = 16  # tokens of a KV block
_DTYPE = torch.bfloat16
_FORMATS: Mapping[str, WeightFormat] = {**FORMATS, "int4": int4_of(96)}
"""int4 in groups near those of published models, 128, which rows of 2880 are not made of."""
_STD = 0.02
_MOST_TOKENS = 64
_VOTE_S = 60.0


def gpt_oss_20b(layers: int = LAYERS) -> PreTrainedConfig:
    """The shapes of gpt-oss-20b; of fewer layers the same share of its vocabulary, so that experts
    keep their share of the whole."""
    return GptOssConfig(
        num_hidden_layers=layers,
        vocab_size=VOCABULARY * layers // LAYERS // 64 * 64,
        num_local_experts=32,
        num_experts_per_tok=4,
        hidden_size=2880,
        intermediate_size=2880,
        head_dim=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": 150000.0, "rope_type": "default"},
        layer_types=[
            "sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)
        ],
    )


@dataclass(frozen=True)
class DenseModel:
    """What all formats share. weights: by their name in transformers."""

    config: PreTrainedConfig
    info: ModelInfo
    found: Probe
    weights: Mapping[str, Tensor]
    device: torch.device
    seed: int

    @classmethod
    def draw(cls, config: PreTrainedConfig, device: torch.device, seed: int) -> DenseModel:
        """Weights depend on the seed and their names alone; norms are 1."""
        skeleton, found = find_architecture(config, _DTYPE)
        info = random_model_info(config, skeleton, found, _DTYPE)
        experts = {call.name for call in found.experts_calls}
        weights = {}
        for name, parameter in skeleton.named_parameters():
            if name.rpartition(".")[0] in experts:
                continue
            tensor = torch.empty(parameter.shape, dtype=_DTYPE, device=device)
            if name.endswith("norm.weight"):
                weights[name] = tensor.fill_(1)
            else:
                weights[name] = tensor.normal_(std=_STD, generator=_dice(device, seed, name))
        return cls(config, info, found, weights, device, seed)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.values())

    def expert_shape(self, name: str) -> ExpertShape:
        """In a format, or as they are: none."""
        hidden, inter = self.config.hidden_size, self.config.intermediate_size
        return ExpertShape(hidden, 2 * inter, inter, _FORMATS.get(name, _DTYPE), _DTYPE)

    def expert(self, layer: int, expert: int, name: str) -> ExpertWeights:
        """One expert in a format, drawn anew."""
        drawn = self.expert_shape("mxfp4").empty().to(self.device)
        dice = _dice(self.device, self.seed, f"{layer}/{expert}")
        for tensor in (drawn.gate_up, drawn.down):
            tensor.random_(0, 256, generator=dice)
        for scale in (drawn.gate_up_scale, drawn.down_scale):
            if scale is not None:  # a standard deviation of 3 to 6 times 2 ** -8
                scale.random_(119, 121, generator=dice)
        for bias in (drawn.gate_up_bias, drawn.down_bias):
            if bias is not None:
                bias.normal_(std=_STD, generator=dice)
        if name == MXFP4.name:
            return drawn
        whole = drawn.dequantized()
        if name in _FORMATS:
            return whole.quantized(_FORMATS[name])
        return replace(whole, gate_up=whole.gate_up.to(_DTYPE), down=whole.down.to(_DTYPE))


def _dice(device: torch.device, seed: int, name: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


class FormatModel:
    """One format's experts, and the engine's own forward pass over them."""

    def __init__(
        self, dense: DenseModel, name: str, batch: int, longest: int, closing: contextlib.ExitStack
    ) -> None:
        """
        Args:
            name: of the format, or none.
            batch: sequences of a step. longest: tokens of one.
            closing: what is to be closed at the end goes there.
        """
        self.name = name
        self.info = dense.info
        experts = [
            [dense.expert(layer, expert, name) for expert in range(dense.info.experts)]
            for layer in range(dense.info.moe_layers)
        ]
        self.shape = dense.expert_shape(name)
        self.expert_nbytes = sum(expert.nbytes for layer in experts for expert in layer)
        self.nbytes = self.expert_nbytes + dense.nbytes
        on_gpu = dense.device.type == "cuda"
        width = -(-longest // BLOCK)
        moe = _on_gpu(dense, experts) if on_gpu else _on_cpu(dense, experts, closing)
        self.runner = ModelRunner.assemble(
            _model(dense),
            dense.info,
            attention_names=tuple(dense.found.attention_shapes),
            experts_names=tuple(call.name for call in dense.found.experts_calls),
            moe=moe,
            kv_blocks=batch * width,
            kv_block_size=BLOCK,
            kernels=gpu_kernels(dense.device) if on_gpu else cpu_kernels(),
        )
        for keys, values in self.runner.kv.layers:
            for cache in (keys, values):
                cache.normal_(generator=_dice(dense.device, dense.seed, "cache"))
        self.tables = torch.arange(batch * width, dtype=torch.int32, device="cpu").view(-1, width)
        if on_gpu:
            self.runner.capture([GraphShape(batch, batch)], width)
        else:
            heights = [self.shape.height] * dense.info.moe_layers
            self.runner.record(cpu_kernels().recorded_rows, heights)


def _model(dense: DenseModel) -> PreTrainedModel:
    model: PreTrainedModel = dense.found.build(
        dense.info.dtype, attention=registrations.IMPLEMENTATION
    )
    with torch.no_grad():
        compute_buffers(model)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(dense.device)
    for name, tensor in dense.weights.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for call in dense.found.experts_calls:
        model.get_submodule(call.name)._parameters.clear()
    return model


def _on_cpu(
    dense: DenseModel, experts: Sequence[Sequence[ExpertWeights]], closing: contextlib.ExitStack
) -> ElasticMoELayers:
    """As a rank that is alone has them."""
    info = dense.info
    spec = BufferSpec(1, _MOST_TOKENS, info.hidden, info.topk, info.dtype)
    buffer = closing.enter_context(contextlib.closing(make_buffer(0, spec)))
    buffer.connect({0: buffer.address})
    buffer.set_active([0], 1)
    buffer.post_vote(b"")
    buffer.collect_votes(_VOTE_S)
    moe = MoERuntime(buffer, reduce="rank")
    tables = expert_tables(replan(None, [0], experts=info.experts, layers=info.moe_layers), 0)
    states = [
        LayerState(table, LayerExperts(layer, deterministic=False))
        for table, layer in zip(tables, experts, strict=True)
    ]
    moe.install(moe.stage(states))
    return moe


def _on_gpu(dense: DenseModel, experts: Sequence[Sequence[ExpertWeights]]) -> ElasticMoELayers:
    from flexpert.kernels.cuda.device_experts import SlotAddresses
    from flexpert.moe.cuda.local_experts import LocalExperts

    info, shape = dense.info, experts[0][0].shape
    moe = LocalExperts(0, info.moe_layers, info.experts, shape, dense.device)
    tables = expert_tables(replan(None, [0], experts=info.experts, layers=info.moe_layers), 0)
    states = [
        LayerState(table, SlotAddresses.of(layer))
        for table, layer in zip(tables, experts, strict=True)
    ]
    moe.install(moe.stage(states))
    return moe
