"""A Qwen3-MoE checkpoint as GGUF has it: settings and tensors by llama.cpp's names (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flexpert.errors import ModelError

ARCHITECTURE: Final = "qwen3moe"
"""llama.cpp's name of it."""

_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # kinds of tokens: TokenType of gguf

_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS: Final = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
_IN_FLOAT32: Final = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm", "ffn_gate_inp")
"""Norms and routers, of which llama.cpp's kernels take nothing else."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of the file. sources: the checkpoint's keys; several are stacked along a new first
    dimension, which is that of the experts. float32: bfloat16 otherwise."""

    name: str
    sources: tuple[str, ...]
    float32: bool = False


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """A list entry for each token id. merges: of byte-pair encoding, each "left right"."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]


def check_fits(config: Any) -> None:
    """config: of transformers.

    Raises: ModelError: it is no model that `qwen3moe` of llama.cpp computes.
    """
    family = config.model_type
    if family != "qwen3_moe":
        raise ModelError(
            f"a model of type {family!r} cannot be compared with llama.cpp: only Qwen3-MoE "
            "('qwen3_moe') is written as GGUF here"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    refused = {
        "layers without experts": bool(config.mlp_only_layers) or config.decoder_sparse_step != 1,
        "routing weights that do not sum to 1": not config.norm_topk_prob,
        "biases in attention": config.attention_bias,
        "a sliding window": config.sliding_window is not None,
        "scaled rotary embeddings": rope.get("rope_type", "default") != "default",
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise ModelError(
            f"this Qwen3-MoE has {' and '.join(found)}, which is not written as GGUF here; "
            "compare another model with llama.cpp"
        )


def settings(config: Any) -> dict[str, int | float]:
    """The settings of the architecture, by their names below `qwen3moe.`."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def tensors(config: Any) -> Iterator[GgufTensor]:
    """All of them, in the order in which they are written."""
    yield GgufTensor("token_embd.weight", ("model.embed_tokens.weight",))
    for layer in range(config.num_hidden_layers):
        of = f"model.layers.{layer}"
        for name, source in _LAYER.items():
            yield GgufTensor(
                f"blk.{layer}.{name}.weight", (f"{of}.{source}.weight",), name in _IN_FLOAT32
            )
        for name, source in _EXPERTS.items():
            sources = (
                f"{of}.mlp.experts.{expert}.{source}.weight" for expert in range(config.num_experts)
            )
            yield GgufTensor(f"blk.{layer}.{name}.weight", tuple(sources))
    yield GgufTensor("output_norm.weight", ("model.norm.weight",), float32=True)
    if not config.tie_word_embeddings:
        yield GgufTensor("output.weight", ("lm_head.weight",))


def vocabulary(
    known: dict[str, int], special: Sequence[int], merges: Sequence[Any], size: int
) -> GgufVocabulary:
    """
    Args:
        known: id by token, as the tokenizer has them.
        special: ids of those that are no text.
        merges: as tokenizer.json has them, pairs or "left right".
        size: of the model's vocabulary; ids that the tokenizer lacks are unused.
    """
    tokens = [f"[unused {number}]" for number in range(size)]
    kinds = [_UNUSED] * size
    for token, number in known.items():
        if number < size:
            tokens[number], kinds[number] = token, _NORMAL
    for number in special:
        if number < size:
            kinds[number] = _CONTROL
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    # llama.cpp wants some; a tokenizer of whole words has none, and no text is tokenised there
    return GgufVocabulary(tokens, kinds, pairs or ["0 0"])
