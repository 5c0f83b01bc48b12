"""The layer by which a model proposes the token after the next (multi-token prediction, MTP).

Checkpoints have it beside the model's own layers, and transformers leaves it out. From what the
model has computed of a token, and from the embedding of the token after it, such a layer tells the
second one after it:

    x = eh_proj([enorm(embedding of token t + 1), hnorm(state of token t, behind the final norm)])
    logits of token t + 2 = output head(norm(layer(x)))

`layer` is an ordinary one of the model, with attention of its own over the x of all tokens so far.
Embedding and output head are the model's (DeepSeek-V3, README_WEIGHTS.md: shared parameters).
Applied again to norm(layer(x)) in the place of the state of token t + 1, and to the token that it
proposed, the same layer proposes another one, as SGLang and, of most families, vLLM have it.
Grafted onto the model it is one more of its layers wherever layers are counted: in the KV cache,
in the placement of experts, in the exchange between ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexpert.errors import UnsupportedModel

NAME: Final = "mtp"
"""Of the module in a model."""

_NUMBERED: Final = re.compile(r"^(?P<before>.*\blayers)\.(?P<number>\d+)\.(?P<rest>.*)$")
_OF_LAYERS: Final = {
    "enorm.": "enorm.",
    "hnorm.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "shared_head.norm.": "norm.",
}
"""DeepSeek-V3's names, in the first layer beyond the model's: what they begin with → ours."""

_OF_MODULE: Final = {
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "fc.": "eh_proj.",
    "norm.": "norm.",
    "layers.0.": "layer.",
}
"""Qwen3-Next's names, behind `mtp.`."""

_SHARED: Final = ("embed_tokens.", "shared_head.head.")


class DraftLayer(nn.Module):
    """See the module's docstring."""

    def __init__(self, layer: nn.Module, norms: tuple[nn.Module, nn.Module, nn.Module]) -> None:
        """norms: enorm, hnorm and norm, each for vectors of the model's width."""
        super().__init__()
        self.enorm, self.hnorm, self.norm = norms
        width = int(self.enorm.get_parameter("weight").shape[0])
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = layer

    def forward(self, embedded: Tensor, states: Tensor, **how: Any) -> Tensor:
        """embedded, states: [1, N, hidden], of the token after each, and of each → [1, N, hidden].

        how: as the model calls its layers.
        """
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(states)], dim=-1))
        found = self.layer(x, **how)
        result: Tensor = self.norm(found if isinstance(found, Tensor) else found[0])
        return result


def draft_layer(model: PreTrainedModel) -> DraftLayer | None:
    """The one of a model; None: it has none, or it was not grafted."""
    found = getattr(model, NAME, None)
    return found if isinstance(found, DraftLayer) else None


def graft(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give a skeleton its draft layer, on the device of the moment.

    Raises: UnsupportedModel: the class is put together otherwise than those that have one.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        decoder: Any = model.get_decoder()
        last, norm = decoder.layers[-1], type(decoder.norm)
        config = _longer(decoder.config)
        width, eps = config.hidden_size, config.rms_norm_eps
        layer = type(last)(config, config.num_hidden_layers)
        norms = (norm(width, eps=eps), norm(width, eps=eps), norm(width, eps=eps))
        head = model.get_output_embeddings(), decoder.embed_tokens, decoder.rotary_emb
        drafts = DraftLayer(layer, norms)
    except (AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        raise UnsupportedModel(
            f"{type(model).__name__} is put together otherwise than the models that have a layer "
            f"for multi-token prediction ({type(error).__name__}: {error}); leave --speculate out"
        ) from error
    finally:
        torch.set_default_dtype(usual)
    if None in head:
        raise UnsupportedModel(
            f"{type(model).__name__} has no output head of its own; leave --speculate out"
        )
    model.add_module(NAME, drafts)


def _longer(config: Any) -> Any:
    """A configuration whose lists of layers have an entry for the one behind the last, which is
    like the last."""
    longer, layers = copy.copy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == layers:
            object.__setattr__(longer, name, [*value, value[-1]])
    return longer


def draft_states(
    model: PreTrainedModel,
    token_ids: Tensor,
    positions: Tensor,
    states: Tensor,
    mask: object = None,
) -> Tensor:
    """[N, hidden], of which `draft_logits` are told; and `states` for another application.

    Args:
        model: with a draft layer.
        token_ids: [N] int64, the token after each. positions: [N] int64, of each.
        states: [1, N, hidden], what the decoder gave of each.
        mask: as attention gets it.
    """
    decoder: Any = model.get_decoder()
    embedded = decoder.embed_tokens(token_ids.unsqueeze(0))
    at = positions.unsqueeze(0)
    found: Tensor = model.get_submodule(NAME)(
        embedded,
        states,
        attention_mask=mask,
        position_ids=at,
        position_embeddings=decoder.rotary_emb(embedded, at),
        use_cache=False,
    )
    return found[0]


def draft_logits(model: PreTrainedModel, found: Tensor) -> Tensor:
    """[M, vocab]: logits of the token after the next one. found: [M, hidden], by `draft_states`."""
    head: Any = model.get_output_embeddings()
    logits: Tensor = head(found.unsqueeze(0))
    return logits[0]


@dataclass(frozen=True, slots=True)
class DraftNames:
    """What a checkpoint calls the tensors of its draft layer. prefix: of all of them. names: what
    the rest begins with → what it does in ours; `default`: what else there is goes before."""

    prefix: str
    names: dict[str, str]
    default: str | None

    @classmethod
    def find(cls, keys: Iterable[str], layers: int) -> DraftNames | None:
        """Of the files' names; None: there is no such layer. layers: of the model."""
        for key in keys:
            if key.startswith("mtp.fc."):
                return cls("mtp.", _OF_MODULE, None)
            found = _NUMBERED.match(key)
            if found and int(found["number"]) == layers and found["rest"].startswith("eh_proj."):
                return cls(f"{found['before']}.{layers}.", _OF_LAYERS, "layer.")
        return None

    def ours(self, key: str) -> str:
        """The name in the model of a tensor in the files."""
        if not key.startswith(self.prefix):
            return key
        rest = key.removeprefix(self.prefix)
        for begin, ours in self.names.items():
            if rest.startswith(begin):
                return f"{NAME}.{ours}{rest.removeprefix(begin)}"
        if self.default is None or rest.startswith(_SHARED):
            return key
        return f"{NAME}.{self.default}{rest}"
