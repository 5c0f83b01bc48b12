"""Log probabilities in the two shapes OpenAI's API gives them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from flexpert.frontend.generation import TokenRecord
from flexpert.frontend.text import TokenText

# JSON has no infinity; this stands for an impossible token, as in other servers.
IMPOSSIBLE = -9999.0


class CompletionLogprobs(msgspec.Struct):
    """`/v1/completions`: parallel lists, one item per token; offsets in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TopLogprob(msgspec.Struct):
    """One candidate of a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """One token of a chat answer with the likeliest candidates of its position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """`/v1/chat/completions`."""

    content: list[ChatTokenLogprob]
    refusal: None = None


def completion_logprobs(records: Sequence[TokenRecord], text: TokenText) -> CompletionLogprobs:
    """The records as parallel lists; the chosen token is always among the top ones."""
    shape = CompletionLogprobs([], [], [], [])
    for record in records:
        name = _distinct_name(text.token_bytes(record.id))
        chosen = max(record.logprobs.chosen, IMPOSSIBLE)
        top = {
            _distinct_name(text.token_bytes(id)): max(value, IMPOSSIBLE)
            for id, value in zip(record.logprobs.top_ids, record.logprobs.top, strict=True)
        }
        top.setdefault(name, chosen)
        shape.tokens.append(name)
        shape.token_logprobs.append(chosen)
        shape.top_logprobs.append(top)
        shape.text_offset.append(record.offset)
    return shape


def chat_logprobs(records: Sequence[TokenRecord], text: TokenText) -> ChatLogprobs:
    """The records as chat's list of tokens."""

    def named(id: int, value: float) -> TopLogprob:
        raw = text.token_bytes(id)
        return TopLogprob(raw.decode("utf-8", "replace"), max(value, IMPOSSIBLE), list(raw))

    content = []
    for record in records:
        chosen = named(record.id, record.logprobs.chosen)
        pairs = zip(record.logprobs.top_ids, record.logprobs.top, strict=True)
        top = [named(id, value) for id, value in pairs]
        content.append(ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def _distinct_name(raw: bytes) -> str:
    """The token's text, or its bytes written out: as keys, parts of characters must differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
