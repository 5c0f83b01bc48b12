"""A small random Qwen3-MoE, whose router may give most tokens to few experts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from flexpert.models.source import ModelSource

HOT = 4  # experts that get most tokens, by their numbers: on one rank, as they lie at first
_CONSTANT = 4.0  # of one channel, which all tokens have alike
_HIDDEN = 512
_BIAS = 1.5  # of the hot experts' logits, by that channel


def make_skewed_checkpoint(
    folder: Path,
    *,
    hidden: int = _HIDDEN,
    inter: int = 1024,
    experts: int = 16,
    layers: int = 4,
    hot: int = HOT,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> None:
    """Experts' products take most of a step, and a router prefers the first `hot` experts.

    All embeddings share a channel, through which a router without a bias has one. With hot=0 it
    prefers none.

    device: that draws the weights.

    Raises: OSError: it cannot be written.
    """
    tiny = ModelSource.open("tiny")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=tiny.info.vocab,
        hidden_size=hidden,
        intermediate_size=inter,
        moe_intermediate_size=inter,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )
    config.dtype = dtype
    with torch.device(device), torch.no_grad():
        model = Qwen3MoeForCausalLM._from_config(config)
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate.normal_(std=1.0 / hidden**0.5)
            gate[:, 0] = 0.0
            gate[:hot, 0] = _BIAS * (_HIDDEN / hidden) ** 0.5  # a norm makes the channel larger
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
