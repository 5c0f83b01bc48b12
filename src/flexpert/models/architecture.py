"""Which of transformers' classes serves a checkpoint, and what of its model no text passes through.

A multimodal checkpoint is served as text by the class that wrote it: so its weights are found under
the names they were stored with. Its encoders of images and sounds are built on the meta device like
the rest, and left out once a walk has shown that tokens of text do not reach them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from flexpert.errors import UnsupportedModel

KEEPING_TOKENS: Final = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
"""Layer types that are attention over the keys and values of all or the last tokens."""

KEEPING_STATES: Final = {"linear_attention", "conv"}
"""Layer types that keep a state of each sequence, of a size that does not grow with it."""

KEEPING_INDEXED: Final = {"indexed_attention"}
"""Layer types that are attention to the keys that an indexer picks, which keeps keys of its own."""

KEEPING_BOTH: Final = {"hybrid", "hybrid_sliding"}
"""Layer types that keep a state, and the keys and values of tokens."""

KEEPING_NOTHING: Final = {"moe", "mlp", "dense", "sparse"}
"""Layer types that are no attention, and keep nothing of a token."""

_EXPERTS: Final = ("Experts", "MoE", "Moe", "MoeBlock", "MoEBlock", "MoA")
"""Ends of the names that transformers gives to modules with experts."""


def model_classes(config: PreTrainedConfig) -> list[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """The classes that may serve a checkpoint, each with its configuration; the likeliest first.

    Raises:
        UnsupportedModel: there is none, or its layers keep something else than keys and values.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder")
    thinker = getattr(config, "thinker_config", None)
    if isinstance(thinker, PreTrainedConfig):  # what speaks is apart from what thinks
        return model_classes(thinker)
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()).difference(
        KEEPING_TOKENS, KEEPING_INDEXED, KEEPING_STATES, KEEPING_BOTH, KEEPING_NOTHING
    )
    if kinds:
        raise UnsupportedModel(
            f"{config.model_type} has layers of {', '.join(sorted(kinds))}; flexpert serves models "
            "whose layers keep plain keys and values, or states"
        )
    mappings: list[Any] = [
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ]
    if text is not config:
        mappings = [*mappings[1:], mappings[0]]  # the class that wrote the checkpoint
    found: dict[type[PreTrainedModel], PreTrainedConfig] = {}
    for mapping in mappings:
        if type(config) in mapping:
            chosen = mapping[type(config)]
            of_text = text is not config and chosen.config_class is type(text)
            found.setdefault(chosen, text if of_text else config)
    if not found:
        raise UnsupportedModel(
            f"transformers has no causal language model for {config.model_type!r}"
        )
    written = set(config.architectures or ())
    return sorted(found.items(), key=lambda one: one[0].__name__ not in written)


def says_experts(model: PreTrainedModel) -> str:
    """Why a model whose experts transformers cannot dispatch is refused: the end of a sentence."""
    text = model.config.get_text_config()
    counts = {
        name: value
        for name, value in text.to_dict().items()
        if "expert" in name and isinstance(value, int) and not isinstance(value, bool) and value > 1
    }
    own = sorted(
        {
            type(module).__name__
            for module in model.modules()
            if type(module).__name__.endswith(_EXPERTS)
        }
    )
    if not counts and not own:
        return "it is a dense model; flexpert serves Mixture-of-Experts models"
    if not own:
        name, value = next(iter(counts.items()))
        return f"config.json says {name} {value}, but none of its layers has experts"
    return (
        f"its experts are modules of a kind of their own ({', '.join(own)}), which transformers "
        "does not let others compute"
    )


def untouched_parts(model: PreTrainedModel, touched: Collection[str]) -> tuple[str, ...]:
    """Names of the modules whose parameters had no part in a walk, the outermost ones.

    Args:
        touched: parameters and buffers that had, and all names of attention and experts modules.
    """
    found = []
    for name in _beside(model, touched):
        if next(model.get_submodule(name).parameters(), None) is not None:
            found.append(name)
    return tuple(found)


def leave_out(model: PreTrainedModel, parts: Collection[str]) -> None:
    """Remove modules from a skeleton."""
    for part in parts:
        parent, _, name = part.rpartition(".")
        model.get_submodule(parent)._modules[name] = None


def pad_vocabulary(model: PreTrainedModel, rows: int) -> None:
    """Give a skeleton embeddings of so many tokens: files may hold more than the vocabulary has."""
    embeddings: Any = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in embeddings:
        if module is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            padded = parameter.new_empty((rows, *parameter.shape[1:]))
            setattr(module, name, nn.Parameter(padded, requires_grad=False))


def _beside(model: nn.Module, touched: Collection[str], prefix: str = "") -> Iterator[str]:
    """The modules that hold nothing of what was touched, and whose parent holds some."""
    for name, child in model.named_children():
        whole = f"{prefix}{name}"
        if not any(one.startswith(f"{whole}.") for one in touched):
            yield whole
        else:
            yield from _beside(child, touched, f"{whole}.")
