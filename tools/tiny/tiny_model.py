"""The model `tiny` itself: its configuration, how it is trained faster, and how it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT, END = "<|endoftext|>", "<|end|>"
SPECIAL = (END_OF_TEXT, "<|system|>", "<|user|>", "<|assistant|>", END)
VOCABULARY = 4096
BALANCE = 0.02
"""Weight of the load-balancing loss."""


def model_config() -> Any:
    """The fixed architecture of `tiny`."""
    import torch
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=128,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        router_aux_loss_coef=BALANCE,
        bos_token_id=None,
        pad_token_id=SPECIAL.index(END_OF_TEXT),
        eos_token_id=[SPECIAL.index(END_OF_TEXT), SPECIAL.index(END)],
        dtype=torch.bfloat16,
    )


def dense_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All experts for all tokens, those not chosen weighted by zero.

    hidden: [tokens, hidden]; index, weights: [tokens, experts per token]. With 16 small experts two
    dense products are several times faster in training than sixteen gathered ones, and the result
    is the same.
    """
    import torch
    from torch.nn import functional as F

    experts, double, _ = module.gate_up_proj.shape
    gates = torch.zeros(len(hidden), experts, dtype=weights.dtype, device=hidden.device)
    gates = gates.scatter(1, index, weights)
    both = F.linear(hidden, module.gate_up_proj.flatten(0, 1)).view(-1, experts, 2, double // 2)
    inner = F.silu(both[:, :, 0]) * both[:, :, 1] * gates[..., None].to(both.dtype)
    return F.linear(inner.flatten(1), module.down_proj.transpose(0, 1).flatten(1))


@dataclass(slots=True)
class RouterTap:
    """Collects what the routers of one forward pass decided, a layer an item.

    `logits`: [tokens, experts]; `chosen`: [tokens, experts per token].
    """

    logits: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)

    def attach(self, model: Any) -> None:
        """Listens to every router of the model."""
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._heard)

    def _heard(self, _module: Any, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self.logits.append(output[0])
        self.chosen.append(output[2])

    def clear(self) -> None:
        """Forgets the last forward pass."""
        self.logits.clear()
        self.chosen.clear()

    def losses(self) -> tuple[Tensor, Tensor]:
        """The load-balancing loss (1 if balanced) and the z-loss, each the mean over the layers.

        Balanced layer by layer: transformers' own loss pools the layers, and so cannot see that an
        expert is idle in one and busy in another.
        """
        import torch

        balance, size = [], []
        for logits, chosen in zip(self.logits, self.chosen, strict=True):
            logits = logits.float()
            experts = logits.shape[1]
            expert = torch.arange(experts, device=chosen.device)  # bincount would wait for the GPU
            load = (chosen.flatten()[:, None] == expert).float().mean(0)
            balance.append(experts * (load * logits.softmax(-1).mean(0)).sum())
            size.append(logits.logsumexp(-1).square().mean())
        return torch.stack(balance).mean(), torch.stack(size).mean()


def add_dropout(model: Any, rate: float) -> None:
    """Dropout on what every attention and every MoE block adds to the residual stream."""
    from torch.nn import functional as F

    def drop(module: Any, _inputs: Any, output: Any) -> Any:
        if not module.training or rate == 0:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def save(model: Any, out: Path) -> None:
    """Writes the weights of a float32 model in bf16, and its configuration, to `out`."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeForCausalLM

    config = model_config()
    half = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    half.save_pretrained(out)
    rewrite(out / "config.json", num_experts=config.num_experts)  # the key of transformers 4


def rewrite(path: Path, **changes: Any) -> None:
    """Changes top-level values of a JSON file."""
    settings = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
