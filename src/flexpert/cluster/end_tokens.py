"""The tokens that end an answer, from all the places where checkpoints keep them.

config.json and generation_config.json name some (`ModelInfo`, read when the model is opened); the
tokenizer has one; and a chat template may end the assistant's turns with one that none of these
names. A model that was trained on conversations ends its answers with that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from flexpert.models.source import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID: Final = "flexpertasksforyourturnsend"
"""An answer of one word, which no template has cause to change."""


def with_end_tokens(info: ModelInfo, tokenizer: PreTrainedTokenizerBase | None) -> ModelInfo:
    """A model whose answers also end where its tokenizer and its chat template say."""
    if tokenizer is None:
        return info
    told = (tokenizer.eos_token_id, turn_end(tokenizer))
    also = [one for one in told if isinstance(one, int) and 0 <= one < info.vocab]
    return replace(info, eos_token_ids=tuple(dict.fromkeys((*info.eos_token_ids, *also))))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes right behind an assistant's last word.

    None: there is no template, or it writes no such token. One that only comes if the conversation
    goes on is none: it may stand between an answer's parts.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # noqa: BLE001 - a template may refuse anything, and is asked again by requests
        return None
    _, said, behind = text.rpartition(_SAID)
    behind = behind.lstrip()
    if not said or not behind:
        return None
    ids = tokenizer.encode(behind, add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    if not ids or ids[0] not in added:
        return None
    first = added[ids[0]]
    return ids[0] if first.special and behind.startswith(first.content) else None
