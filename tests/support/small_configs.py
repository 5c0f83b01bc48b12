"""Every MoE family of the installed transformers, its configuration made small.

Nothing here is a list of families: which there are is asked of transformers, and sizes are made
small by the names that configurations use. What few families need besides stands in `OWN`.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGES,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as SEVERAL,
)

TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 72,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "head_dim": 24,
    "rotary_dim": 8,
    "sliding_window": 9,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
    "q_lora_rank": 32,
    "n_group": 4,
    "topk_group": 2,
    "n_routed_experts": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "num_experts_per_token": 3,
    "moe_topk": 3,
    "top_k_experts": 3,
    "moe_k": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "index_topk": 12,
    "index_head_dim": 16,
    "index_n_heads": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 20,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 36, "mamba_expand": 2}
OWN: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [40, 24],
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [3, 3, 3]},
    },
    "deepseek_ocr2_text": {
        "num_experts_per_tok": 3,
        "head_dim": 18,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "rope_type": "default",
            "mrope_section": [2, 2, 2],
        },
        "hidden_size": 96,
    },
    "step3p5": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
        "share_expert_dim": 40,
        "sliding_window": 9,
    },
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 88,
        "expert_ffn_hidden_size": 40,
        "zero_expert_num": 4,
        "qk_head_dim": 24,
        "head_dim": 8,
    },
    "muse_spark_text": {
        "moe_hidden_size": 56,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "layer_rope_theta": [1e4, 0, 1e4, 0],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 3,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {},
    },
    "diffusion_gemma_text": {
        "num_experts": 8,
        "top_k_experts": 3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {},
    },
    "llama4_text": {
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 88,
        "attention_chunk_size": 20,
        "floor_scale": 8,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "moe_layers": [1, 3],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, **_MAMBA},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 16,
        "linear_num_heads": 3,
    },
    "bailing_hybrid": {"layer_group_size": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 20,
    },
    "hy_v4_vl_text": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 24,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 12,
        "indexer_compress_ratio": 4,
    },
    "inkling2_text": {"unpadded_vocab_size": 160},
    "inkling2_loop_text": {"unpadded_vocab_size": 160},
}
"""Model type → what its text configuration needs besides."""

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "dots3_note": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_layer_types": ["dense"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 72,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "downsample_hidden_size": 32,
            "adapter_input_size": 32,
            "adapter_out_dim": 72,
        },
    },
    "nemotron_h_omni": {
        "": {"projector_hidden_size": 32, "vision_hidden_size": 32},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "video_temporal_patch_size": 2,
        },
        "audio_config": None,
    },
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            "diarization_config": {
                "audio_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                },
                "head_config": {"hidden_size": 32, "audio_hidden_size": 32},
            },
        },
    },
    "muse_spark": {
        "": {"out_hidden_size": 48, "projector_hidden_size": 48},
        "audio_config": {
            "num_hidden_layers": 1,
            "patch_sizes": [16],
            "hidden_sizes": [32],
            "depths": [1],
            "out_hidden_size": 72,
        },
    },
    "deepseek_ocr2": {
        "vision_config": {
            "sam_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            "encoder_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
            },
        },
    },
}
"""Model type → what its encoders' configurations need instead."""

_ATTENTION: dict[str, Any] = {"layer_types": ["full_attention"] * 4}
_FACTORS: dict[str, Any] = {"short_factor": [1.0, 1.1, 1.2] * 3, "long_factor": [4.0] * 9}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next, attention only": ("qwen3_next", _ATTENTION),
    "glm_moe_dsa, shared choices": (
        "glm_moe_dsa",
        {"indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "qwen3_5_moe_text, attention only": ("qwen3_5_moe_text", _ATTENTION),
    "jamba, attention only": ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    "granitemoehybrid, attention only": ("granitemoehybrid", {**_ATTENTION, **_MAMBA}),
    "minimax, attention only": ("minimax", _ATTENTION),
    "lfm2_moe, attention only": (
        "lfm2_moe",
        {
            **_ATTENTION,
            "num_dense_layers": 1,
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
    ),
    "nemotron_h, attention only": (
        "nemotron_h",
        {"layer_types": ["full_attention", "moe", "full_attention", "mlp"]},
    ),
    "bailing_hybrid, attention only": ("bailing_hybrid", _ATTENTION),
    "lara_mini, attention only": ("lara_mini", _ATTENTION),
    "hunyuan_v1_moe as published": (
        "hunyuan_v1_moe",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 1000.0,
                "rope_theta": 1e4,
                "factor": 1.0,
                "beta_fast": 32,
                "beta_slow": 1,
            }
        },
    ),
    "mixtral, dynamic rotary": (
        "mixtral",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "phimoe as Phi-3.5": (
        "phimoe",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_mscale": 1.2,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 128,
                **_FACTORS,
            }
        },
    ),
    "doge with experts": ("doge", {"is_moe": True, "num_experts": 16}),
}
"""Name → family and changes: configurations that a family may have, beside its defaults."""

_ABSENT_STAYS_ABSENT = ("sliding_window", "n_group", "topk_group", "q_lora_rank")


@cache
def moe_families() -> tuple[str, ...]:
    """Model types with experts that transformers can generate text with."""
    found = []
    for family in sorted(CONFIG_MAPPING):
        if family not in CAUSAL and family not in IMAGES and family not in SEVERAL:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                text = CONFIG_MAPPING[family]().get_text_config()
            except Exception:  # noqa: BLE001 - a configuration without defaults: no family of ours
                continue
        if "expert" in repr(text.to_dict()):
            found.append(family)
    return tuple(found)


def small_config(case: str) -> PreTrainedConfig:
    """Of a family or of one of the `VARIANTS`, small."""
    family, changes = VARIANTS.get(case, (case, {}))
    return AutoConfig.for_model(family, **{**small_settings(family), **changes})


def small_settings(family: str) -> dict[str, Any]:
    """What a family's configuration is given to be small."""
    return _settings(AutoConfig.for_model(family))


def _settings(defaults: PreTrainedConfig) -> dict[str, Any]:
    if "thinker_config" in defaults.sub_configs:
        return {"thinker_config": _settings(defaults.thinker_config)}
    text = defaults.get_text_config()
    if text is defaults:
        return _text(defaults)
    settings: dict[str, Any] = dict(PARTS.get(defaults.model_type, {}).get("", {}))
    for name in defaults.sub_configs:
        part = getattr(defaults, name, None)
        if part is text:
            settings[name] = _text(part)
        elif part is not None:
            settings[name] = {k: v for k, v in TOWER.items() if hasattr(part, k)}
        if name in PARTS.get(defaults.model_type, {}):
            settings[name] = PARTS[defaults.model_type][name]
    return settings


def stated_value(config: PreTrainedConfig, name: str) -> Any:
    """A setting by any of its names, also one that may differ from layer to layer."""
    return config.to_dict().get(config.attribute_map.get(name, name))


def _text(defaults: PreTrainedConfig) -> dict[str, Any]:
    stated = defaults.to_dict().keys() | defaults.attribute_map.keys()
    known = {
        name: size
        for name, size in TEXT.items()
        if name in stated
        and not (name in _ABSENT_STAYS_ABSENT and stated_value(defaults, name) is None)
    }
    if "kv_lora_rank" in known:
        known.pop("head_dim", None)
        known["num_key_value_heads"] = 4
    return {**known, **OWN.get(defaults.model_type, {})}
