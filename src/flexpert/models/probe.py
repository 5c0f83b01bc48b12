"""What a model asks of us, found by running it on the meta device: no weights, no family lists.

The model class of transformers is built on the meta device and walked once. What its attention
and experts modules pass to the registered functions tells the shapes of the KV cache, the MoE
layers and the router's k; and whatever we would not compute faithfully is refused here, with the
reason, instead of being ignored in silence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.models import registrations

UNDERSTOOD: Final = {"scaling", "sliding_window", "s_aux", "softcap", "dropout", "is_causal"}
"""Arguments of an attention call that `model_runner` honours."""

HARMLESS: Final = {
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
"""Arguments that do not change the result of causal attention without padding."""

PLAIN_LAYERS: Final = {"attention", "full_attention", "sliding_attention"}
"""Layer types that are attention over the keys and values of all or the last tokens."""


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What one attention layer keeps of each token: kv_heads keys and as many values."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One MoE layer: the name of its experts module and what it was called with."""

    name: str
    experts: int
    hidden: int
    topk: int


class Probe:
    """Records the calls of one walk; see `registrations` for what its methods are called with."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self.attention_shapes: dict[str, AttentionShape] = {}
        self.experts_calls: list[ExpertsCall] = []

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        **kwargs: Any,
    ) -> Tensor:
        name = self._names[module]
        for argument, given in kwargs.items():
            if given is None or argument in HARMLESS or argument in UNDERSTOOD:
                continue
            raise UnsupportedModel(
                f"{name} passes {argument!r} to attention, which we do not compute"
            )
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModel(f"{name} is not causal")
        window = kwargs.get("sliding_window")
        if not isinstance(mask, registrations.AskedMask) or not _is_causal_window(mask, window):
            raise UnsupportedModel(
                f"{name} asks for a mask that is neither causal nor the sliding window it names"
            )
        if name in self.attention_shapes:
            raise UnsupportedModel(f"{name} attends twice in one pass")
        if key.shape[1] == 0 or query.shape[1] % key.shape[1] or key.shape[2] != query.shape[2]:
            raise UnsupportedModel(f"{name} attends to keys that are not those of its own tokens")
        self.attention_shapes[name] = AttentionShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))

    def experts(self, module: nn.Module, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        name = self._names[module]
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModel(
                f"{name} normalises each expert's result, which we do not compute"
            )
        if name in (call.name for call in self.experts_calls):
            raise UnsupportedModel(f"{name} is used twice in one pass")
        experts = int(getattr(module, "num_experts", 0))
        self.experts_calls.append(ExpertsCall(name, experts, x.shape[-1], expert_ids.shape[-1]))
        return torch.empty_like(x)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The causal language model class that transformers has for a configuration."""
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder")
    for front in ("vision_config", "audio_config"):
        if getattr(config, front, None) is not None:
            raise UnsupportedModel(
                f"{config.model_type} has a {front.removesuffix('_config')} front end; "
                "flexpert serves text-only models"
            )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) - PLAIN_LAYERS
    if kinds:
        raise UnsupportedModel(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}; flexpert serves models "
            "whose layers keep plain keys and values"
        )
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "dynamic":
            raise UnsupportedModel(
                f"{config.model_type} has dynamic rotary embeddings: the longest request of a "
                "batch would change the others; rope_type 'default' keeps to the original context"
            )
    try:
        found: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type!r}"
        ) from None
    return found


def build_skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, *, attention: str
) -> PreTrainedModel:
    """The model on the meta device: every module, no memory, weights not tied.

    Raises:
        UnsupportedModel: no causal language model, or layers that are not plain attention.
        ModelError: the configuration is incomplete or contradicts itself.
    """
    registrations.register()
    config = copy.deepcopy(config)
    for flag in ("use_cache", "output_router_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, flag, False):
            setattr(config, flag, False)
    chosen = model_class(config)
    try:
        with (
            torch.device("meta"),
            initialization.no_init_weights(),
            initialization.no_tie_weights(),
            initialization.meta_device_safe_creation_ops(),
        ):
            model: PreTrainedModel = chosen._from_config(
                config,
                dtype=dtype,
                attn_implementation=attention,
                experts_implementation=registrations.IMPLEMENTATION,
            )
    except Exception as error:  # whatever a model's constructor raises on odd settings
        raise ModelError(
            f"transformers cannot build {chosen.__name__} from this config.json "
            f"({type(error).__name__}: {error})"
        ) from error
    return model.eval()


def probe(model: PreTrainedModel) -> Probe:
    """Walk a skeleton built with `registrations.PROBE`.

    Raises:
        UnsupportedModel: the model is dense or asks for something that we do not compute.
    """
    family = model.config.model_type
    if not any(hasattr(m, "has_gate") and hasattr(m, "is_transposed") for m in model.modules()):
        raise UnsupportedModel(
            f"{family} is a dense model (none of its layers has experts that transformers can "
            "dispatch); flexpert serves Mixture-of-Experts models"
        )
    found = Probe(model)
    for module in model.modules():
        registrations.bind(module, found)
    tokens = torch.zeros((1, 2), dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            model(
                input_ids=tokens,
                position_ids=tokens,
                # with a mask given, transformers does not look for packed sequences by value
                attention_mask=torch.ones((1, 2), dtype=torch.int64, device="meta"),
                use_cache=False,
            )
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{family} does not fit: {error}") from None
    except Exception as error:  # any failure of foreign code means: does not fit
        raise UnsupportedModel(
            f"{family} does not fit: its forward pass needs more than token ids and positions, "
            f"such as masks or caches of its own ({type(error).__name__}: {error})"
        ) from error
    _check_layers(model, found)
    return found


def _check_layers(model: PreTrainedModel, found: Probe) -> None:
    family = model.config.model_type
    layers = model.config.get_text_config().num_hidden_layers
    if len(found.attention_shapes) != layers:
        raise UnsupportedModel(
            f"{family} does not fit: {layers - len(found.attention_shapes)} of its {layers} layers "
            "keep something else than keys and values (convolutions, states)"
        )
    calls = found.experts_calls
    if not calls:
        raise UnsupportedModel(f"{family} is configured without a Mixture-of-Experts layer")
    for what in ("experts", "hidden", "topk"):
        values = sorted({getattr(call, what) for call in calls})
        if len(values) > 1 or values[0] < 1:
            raise UnsupportedModel(
                f"{family} does not fit: its MoE layers differ in {what}: {values}"
            )


def _is_causal_window(mask: registrations.AskedMask, window: int | None) -> bool:
    """Whether the mask means: see every key up to the query, of the last `window` if given."""
    reach = 2 * (window or 4) + 3
    query = torch.arange(reach)[:, None]
    key = torch.arange(reach)[None, :]
    expected = key <= query
    if window is not None:
        if window > 1 << 12:  # compare around the edge only
            query = torch.tensor([0, 1, window - 1, window, window + 1])[:, None]
            key = torch.tensor([0, 1, 2, window - 1, window, window + 1])[None, :]
            expected = key <= query
        expected = expected & (key > query - window)
    zero = torch.zeros((), dtype=torch.int64)
    try:
        seen = mask.sees(zero, zero, query, key)
    except Exception:  # noqa: BLE001 - a mask that needs more than positions is not ours
        return False
    return bool(torch.equal(torch.broadcast_to(seen, expected.shape), expected))
