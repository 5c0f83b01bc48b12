"""Which tensors of checkpoints no text model needs, and why: the only ones that may be skipped.

What stands in no list here, and has no place in the model either, is a reason to refuse the
checkpoint: leaving it out would give other answers than the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Unneeded:
    """A kind of tensors. pattern: found anywhere in their names."""

    kind: str
    reason: str
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, kind: str, reason: str, pattern: str) -> Unneeded:
        return cls(kind, reason, re.compile(pattern))


MTP: Final = "multi-token prediction"
_DRAFTS: Final = "they draft tokens (--speculate mtp); the answers do not depend on them"

KINDS: Final = (
    Unneeded.of(MTP, _DRAFTS, r"(^|\.)mtp(_\w+)?\."),
    Unneeded.of(
        "rotary buffers",
        "they follow from config.json, by which they are computed",
        r"(^|\.)rotary_emb(_\w+)?\.(\w+_)?(inv_freq|cos_cached|sin_cached)$|(^|\.)rope\.freqs$",
    ),
    Unneeded.of("position ids", "they count from 0", r"(^|\.)position_ids$"),
    Unneeded.of(
        "vision",
        "flexpert serves the text model",
        r"(^|\.)(visual|vision_\w+|multi_modal_projector|mm_projector|embed_vision|image_newline)"
        r"(\.|$)",
    ),
    Unneeded.of(
        "audio",
        "flexpert serves the text model",
        r"(^|\.)(audio_\w+|embed_audio|talker|code2wav|token2wav)(\.|$)",
    ),
)

_LAYER: Final = re.compile(r"(^|\.)layers\.(\d+)\.")
_DRAFTING: Final = re.compile(r"\.(eh_proj|enorm|hnorm|shared_head|embed_tokens)\.")
_NUMBERED: Final = re.compile(r"layers\\?\.\d")  # patterns of transformers that name a layer


class UnneededTensors:
    """Tells of the tensors that a model has no place for whether that matters.

    A layer beyond the model's counts as one for multi-token prediction only if it has what such
    layers have besides an ordinary one: else the configuration has too few layers.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        """
        Args:
            model: on the meta device.
            keys: all names of tensors in the files.
        """
        layers = int(model.config.get_text_config().num_hidden_layers)
        self._drafting = {
            number
            for key in keys
            if (number := _layer(key)) is not None and number >= layers and _DRAFTING.search(key)
        }
        patterns = [p for p in model._keys_to_ignore_on_load_unexpected or () if p]
        own = [re.compile(p) for p in sorted(patterns) if not _NUMBERED.search(p)]
        reason = f"transformers' {type(model).__name__} does not load them"
        self._kinds = (*KINDS, *(Unneeded("not of the model", reason, p) for p in own))

    def kind(self, key: str, name: str) -> tuple[str, str] | None:
        """(kind, reason) of a tensor; None: it would be missed.

        name: what transformers makes of its key.
        """
        if _layer(key) in self._drafting:
            return MTP, _DRAFTS
        for one in self._kinds:
            if one.pattern.search(key) or one.pattern.search(name):
                return one.kind, one.reason
        return None


def _layer(key: str) -> int | None:
    found = _LAYER.search(key)
    return int(found[2]) if found else None
