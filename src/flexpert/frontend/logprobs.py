"""Log probabilities in the two shapes OpenAI's API gives them, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from flexpert.engine.request import TokenLogprobs
from flexpert.frontend.generation import TokenRecord
from flexpert.frontend.text import AnswerText

# JSON has no infinity; this stands for an impossible token, as in other servers.
IMPOSSIBLE = -9999.0


class CompletionLogprobs(msgspec.Struct):
    """`/v1/completions`: parallel lists, one item per token; offsets in characters.

    A prompt's first token, which follows nothing, has None.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
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


class RankedLogprob(msgspec.Struct):
    """One candidate of a prompt's position. rank: 1 for the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
"""vLLM's: one item per token of the prompt, by token id; None for the first."""


def completion_logprobs(
    records: Sequence[TokenRecord],
    text: AnswerText,
    *,
    as_ids: bool = False,
    prompt: Sequence[int] = (),
    of_prompt: Sequence[TokenLogprobs] = (),
    top: int | None = None,
    begin: int = 0,
) -> CompletionLogprobs:
    """The records as parallel lists; the chosen token is always among the top ones.

    Args:
        as_ids: tokens are named by their ids.
        prompt, of_prompt: a prompt that is echoed before, and the log probabilities of its tokens
            from the second on. top: how many of the likeliest of them are shown.
        begin: where in the text the answer begins, in characters.
    """
    shape = CompletionLogprobs([], [], [], [])
    name = _namer(text, as_ids)
    detokenizer, offset = text.detokenizer(), 0
    for place, token in enumerate(prompt):
        known = of_prompt[place - 1] if place else None
        _append(shape, token, known, offset, name, top)
        offset += len(detokenizer.push((token,)))
    for record in records:
        _append(shape, record.id, record.logprobs, begin + record.offset, name, None)
    return shape


def _append(
    shape: CompletionLogprobs,
    token: int,
    known: TokenLogprobs | None,
    offset: int,
    name: Callable[[int], str],
    top: int | None,
) -> None:
    shape.tokens.append(name(token))
    shape.text_offset.append(offset)
    if known is None:
        shape.token_logprobs.append(None)
        shape.top_logprobs.append(None)
        return
    chosen = max(known.chosen, IMPOSSIBLE)
    pairs = list(zip(known.top_ids, known.top, strict=True))[:top]
    likeliest = {name(id): max(value, IMPOSSIBLE) for id, value in pairs}
    likeliest.setdefault(name(token), chosen)
    shape.token_logprobs.append(chosen)
    shape.top_logprobs.append(likeliest)


def chat_logprobs(
    records: Sequence[TokenRecord], text: AnswerText, *, as_ids: bool = False
) -> ChatLogprobs:
    """The records as chat's list of tokens. as_ids: tokens are named by their ids."""

    def named(id: int, value: float) -> TopLogprob:
        raw = text.token_bytes(id)
        shown = f"token_id:{id}" if as_ids else raw.decode("utf-8", "replace")
        return TopLogprob(shown, max(value, IMPOSSIBLE), list(raw))

    content = []
    for record in records:
        chosen = named(record.id, record.logprobs.chosen)
        pairs = zip(record.logprobs.top_ids, record.logprobs.top, strict=True)
        top = [named(id, value) for id, value in pairs]
        content.append(ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, top))
    return ChatLogprobs(content)


def prompt_logprobs(
    prompt: Sequence[int], found: Sequence[TokenLogprobs], text: AnswerText, top: int
) -> PromptLogprobs:
    """Of a prompt's tokens. found: from the second on. top: how many of the likeliest besides."""

    def shown(id: int, value: float, rank: int) -> RankedLogprob:
        decoded = text.token_bytes(id).decode("utf-8", "replace")
        return RankedLogprob(max(value, IMPOSSIBLE), rank, decoded)

    shape: PromptLogprobs = [None]
    for token, known in zip(prompt[1:], found, strict=True):
        place = {str(token): shown(token, known.chosen, known.rank)}
        pairs = list(zip(known.top_ids, known.top, strict=True))[:top]
        for at, (id, value) in enumerate(pairs):
            place.setdefault(str(id), shown(id, value, at + 1))
        shape.append(place)
    return shape


def _namer(text: AnswerText, as_ids: bool) -> Callable[[int], str]:
    if as_ids:
        return lambda id: f"token_id:{id}"
    return lambda id: _distinct_name(text.token_bytes(id))


def _distinct_name(raw: bytes) -> str:
    """The token's text, or its bytes written out: as keys, parts of characters must differ."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
