"""The sizes of models that measurements take for examples."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen3MoeConfig


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
