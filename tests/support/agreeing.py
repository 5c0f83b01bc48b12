"""A small random model whose draft layer is often of its opinion."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from support.draft_checkpoints import with_draft_layer


def agreeing_model(
    folder: Path, *, say: float = 0.5, seed: int = 0, width: int = 32, vocab: int = 128
) -> Path:
    """A Qwen3-MoE whose answers follow mostly from the last token, which its draft layer is told.

    say: of attention and experts in the answer.
    """
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=vocab,
        hidden_size=width,
        moe_intermediate_size=width // 2,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    plain = folder / "plain"
    AutoModelForCausalLM.from_config(config).save_pretrained(plain)
    drafting = with_draft_layer(plain, folder / "drafting", "mtp")
    tensors = load_file(drafting / "model.safetensors")
    same = torch.eye(width)
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensors[name] = torch.randn(tensor.shape)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.randn(tensor.shape) * say * (32 / width) ** 0.5
        elif "norm" in name:
            tensors[name] = torch.ones(tensor.shape)
        elif name == "mtp.fc.weight":
            tensors[name] = torch.cat([same, 0 * same], 1)
    for name in tensors:
        if name.startswith("mtp.layers.0."):
            tensors[name] = tensors[name.replace("mtp.layers.0.", "model.layers.0.")].clone()
    save_file(tensors, drafting / "model.safetensors", metadata={"format": "pt"})
    return drafting
