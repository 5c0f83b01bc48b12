"""The sizes of models that measurements take for examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from transformers import (
    DeepseekV3Config,
    GraniteMoeHybridConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from flexpert.models.probe import Probe
from flexpert.models.source import ModelInfo


def qwen3_30b_a3b(layers: int = 48) -> PreTrainedConfig:
    """The shapes of Qwen3-30B-A3B."""
    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
    )


def deepseek_v3(layers: int = 61) -> PreTrainedConfig:
    """The shapes of DeepSeek-V3: its first three layers have no experts, of fewer than four all but
    the last."""
    return DeepseekV3Config(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=layers,
        first_k_dense_replace=min(3, layers - 1),
        num_attention_heads=128,
        num_key_value_heads=128,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        max_position_embeddings=163840,
        tie_word_embeddings=False,
    )


def qwen3_next(layers: int = 48) -> PreTrainedConfig:
    """The shapes of Qwen3-Next-80B-A3B: three layers of the gated delta rule before each that is
    attention."""
    return Qwen3NextConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5120,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=512,
        num_experts_per_tok=10,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=262144,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def granite_4_small(layers: int = 40) -> PreTrainedConfig:
    """The shapes of Granite-4.0-H-Small: of ten layers nine are Mamba-2, and the sixth is
    attention; of fewer than six the last one is."""
    attention = [i % 10 == 5 or (layers < 6 and i == layers - 1) for i in range(layers)]
    return GraniteMoeHybridConfig(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=768,
        shared_intermediate_size=1536,
        num_hidden_layers=layers,
        layer_types=["full_attention" if one else "linear_attention" for one in attention],
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=72,
        num_experts_per_tok=10,
        mamba_n_heads=128,
        mamba_d_head=64,
        mamba_d_state=128,
        mamba_n_groups=1,
        mamba_d_conv=4,
        mamba_expand=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def qwen3_moe_1b() -> PreTrainedConfig:
    """A Qwen3-MoE of 1 B parameters, a quarter of them for each token, for a machine of few cores.

    No published model has these shapes.
    """
    return Qwen3MoeConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=3072,
        moe_intermediate_size=512,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=8192,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        attention_bias=False,
    )


Compared = Literal["transformers", "expanded", "none"]
"""What our step is timed against: transformers', ours with keys and values of all heads in the
cache, or nothing."""


@dataclass(frozen=True, slots=True)
class DecodeShape:
    """A model to take the shapes of. layers: it has; usual_layers: that one GPU holds. compared:
    what with.

    tolerance: ‖logits − transformers'‖ / ‖…‖. bf16 rounds differently in other kernels, and where
        two experts are almost equally likely the router then takes the other one, which is a larger
        part of few layers.
    """

    title: str
    config: Callable[[int], PreTrainedConfig]
    layers: int
    usual_layers: int
    compared: Compared
    tolerance: float


DECODE_SHAPES: Final[Mapping[str, DecodeShape]] = {
    "qwen3-30b-a3b": DecodeShape("Qwen3-30B-A3B", qwen3_30b_a3b, 48, 48, "transformers", 0.05),
    "deepseek-v3": DecodeShape("DeepSeek-V3", deepseek_v3, 61, 4, "expanded", 0.2),
    "qwen3-next": DecodeShape("Qwen3-Next-80B-A3B", qwen3_next, 48, 8, "none", 0.2),
    "granite-4": DecodeShape("Granite-4.0-H-Small", granite_4_small, 40, 10, "none", 0.2),
}


def random_model_info(
    config: PreTrainedConfig, skeleton: PreTrainedModel, found: Probe, dtype: torch.dtype
) -> ModelInfo:
    """Of a model that is in no files, whose weights are drawn. found: of a probe of `skeleton`."""
    call = found.experts_calls[0]
    return ModelInfo(
        name="random",
        model_type=config.model_type,
        architecture=type(skeleton).__name__,
        hidden=call.hidden,
        vocab=config.vocab_size,
        moe_layers=len(found.experts_calls),
        experts=call.experts,
        topk=call.topk,
        dtype=dtype,
        attention=tuple(found.attention_shapes.values()),
        max_model_len=config.max_position_embeddings,
        eos_token_ids=(),
        bos_token_id=None,
        states=tuple(found.states.values()),
    )
