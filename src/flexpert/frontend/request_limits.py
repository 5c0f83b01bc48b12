"""What one request may ask for: counts are checked before its prompts are tokenised (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from flexpert.engine.request import SamplingParams
from flexpert.errors import RequestError, context_overflow
from flexpert.frontend.text import TokenText
from flexpert.frontend.tools.answer_parser import ParserNames

Prompt = str | list[int]


class RequestLimits(msgspec.Struct, frozen=True):
    """What one request may ask for.

    model: the name it is served under. vocab: size of the model's vocabulary. max_model_len: tokens
    of prompt and answer. max_choices: prompts × n. max_prompt_tokens: sum over all prompts.
    defaults: sampling parameters of the model where a request says nothing. lenient: unknown
    fields are passed over. trust_chat_template: a request may bring its own. skip_tokenizer: token
    ids are taken and given, no texts. parsers: of calls and reasoning in answers.
    """

    model: str
    vocab: int
    max_model_len: int
    max_choices: int
    max_prompt_tokens: int
    defaults: dict[str, Any] = {}
    lenient: bool = False
    trust_chat_template: bool = False
    skip_tokenizer: bool = False
    parsers: ParserNames = ParserNames()


def with_bad_tokens(params: SamplingParams, text: TokenText) -> SamplingParams:
    """The same with tokens for its bad words. Raises: RequestError"""
    if not params.bad_words:
        return params
    params.check()
    found = (*params.bad_token_ids, *text.bad_token_ids(params.bad_words))
    return msgspec.structs.replace(params, bad_words=(), bad_token_ids=found)


def check_params(params: SamplingParams, prompts: int, limits: RequestLimits) -> None:
    """Checks what is known before anything is tokenised.

    Raises: RequestError, ContextOverflow
    """
    params.check()
    params.check_model(limits.vocab, limits.max_model_len)
    choices = prompts * params.n
    if choices > limits.max_choices:
        raise RequestError(
            f"n must be lower or there must be fewer prompts: {prompts} prompts and n={params.n} "
            f"are {choices} choices, one request may have {limits.max_choices} (--max-choices)",
            "n",
        )


def encode_prompts(
    prompts: Sequence[Prompt],
    text: TokenText,
    limits: RequestLimits,
    answer: int | None,
    *,
    add_special_tokens: bool = True,
    truncate: int | None = None,
) -> Iterator[list[int]]:
    """Token ids of each prompt, one after the other, so that a caller need not keep them all.

    answer: tokens that each answer may have; None: one at least. truncate: the last so many tokens
    are kept; -1: as many as the context takes.

    Raises: RequestError, ContextOverflow
    """
    total = 0
    for prompt in prompts:
        if isinstance(prompt, str):
            most = limits.max_model_len - 1 if truncate is None else limits.max_prompt_tokens
            ids = text.encode_bounded(
                prompt,
                most,
                add_special_tokens=add_special_tokens,
                is_context=truncate is None,
            )
        else:
            ids = prompt
        ids = truncated(ids, truncate, answer, limits)
        check_length(len(ids), answer, limits)
        if not isinstance(prompt, str):
            _check_vocabulary(ids, limits.vocab)
        total += len(ids)
        if total > limits.max_prompt_tokens:
            raise RequestError(
                f"the prompts have more than {limits.max_prompt_tokens} tokens together, the most "
                "of one request (--max-prompt-tokens); send several requests",
                "prompt",
            )
        yield ids


def truncated(
    ids: list[int], truncate: int | None, answer: int | None, limits: RequestLimits
) -> list[int]:
    """The last tokens of a prompt; see `encode_prompts`."""
    if truncate is None:
        return ids
    if truncate == -1:
        truncate = limits.max_model_len - (answer or 1)
    return ids[-truncate:] if truncate > 0 else ids


def check_length(prompt: int, answer: int | None, limits: RequestLimits) -> None:
    """prompt, answer: numbers of tokens. Raises: RequestError, ContextOverflow"""
    if not prompt:
        raise RequestError("prompt must have at least one token", "prompt")
    if prompt + (answer or 1) > limits.max_model_len:
        raise context_overflow(limits.max_model_len, prompt, answer or 1)


def token_outside(tokens: list[int], size: int) -> int | None:
    """The first token that a vocabulary of this size does not have, if there is one."""
    if not tokens or (min(tokens) >= 0 and max(tokens) < size):
        return None
    return next(token for token in tokens if not 0 <= token < size)


def _check_vocabulary(tokens: list[int], size: int) -> None:
    """Raises: RequestError"""
    wrong = token_outside(tokens, size)
    if wrong is not None:
        raise RequestError(f"token {wrong} is outside the vocabulary of {size}", "prompt")
