"""Whether two servers compute the same model: their greedy answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Final

import msgspec

from flexpert.bench.load import LoadError, Target, call, error_message
from flexpert.errors import FlexpertError

NEAR: Final = 0.1
"""Nats between two first tokens that rounding to bfloat16 may exchange: logits of 8 to 16 are
multiples of 1/16."""

_LOGPROBS = 5  # likeliest tokens that are named in each place
_TIMEOUT_S = 300.0


class GreedyAgreement(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts whose first tokens are the same; those whose first tokens differ by no more than
    rounding (`NEAR`); those whose whole answers are the same. same_tokens: mean number before the
    first that differs."""

    prompts: int
    tokens: int
    first: int
    near: int
    whole: int
    same_tokens: float

    @property
    def same_model(self) -> bool:
        """All first tokens agree but for rounding, and most of them exactly."""
        return self.first + self.near == self.prompts and 2 * self.first > self.prompts


class GreedyAnswer(msgspec.Struct, frozen=True):
    """Token ids, and log probabilities of the likeliest first tokens by id, if they were told."""

    tokens: list[int]
    first: dict[int, float] = {}


def agreement(ours: Sequence[GreedyAnswer], theirs: Sequence[Sequence[int]]) -> GreedyAgreement:
    """Of answers to the same prompts, in the same order; all have a token at least."""
    pairs = list(zip(ours, theirs, strict=True))
    same = [_same_tokens(mine.tokens, other) for mine, other in pairs]
    near = [
        max(mine.first.values()) - mine.first.get(other[0], float("-inf")) <= NEAR
        for (mine, other), count in zip(pairs, same, strict=True)
        if count == 0
    ]
    return GreedyAgreement(
        prompts=len(pairs),
        tokens=max(len(mine.tokens) for mine in ours),
        first=sum(count > 0 for count in same),
        near=sum(near),
        whole=sum(mine.tokens == list(other) for mine, other in pairs),
        same_tokens=sum(same) / len(same),
    )


def check_same_model(found: GreedyAgreement) -> None:
    """Raises: FlexpertError: a comparison of speed would be one of different models."""
    if found.same_model:
        return
    raise FlexpertError(
        f"the servers do not compute the same: of {found.prompts} prompts {found.first} have the "
        f"same first token and {found.near} one that rounding explains, so that no ratio of their "
        "speeds is worth anything; is it a model that llama.cpp's qwen3moe computes, and is "
        "--llama-server a current one?"
    )


async def greedy_agreement(
    ours: Target, theirs: Target, prompts: Sequence[list[int]], tokens: int
) -> GreedyAgreement:
    """
    Args:
        theirs: llama.cpp's server.
        tokens: of each answer.

    Raises: LoadError: one of them does not answer.
    """
    mine = [await _our_answer(ours, prompt, tokens) for prompt in prompts]
    others = [await _llama_answer(theirs, prompt, tokens) for prompt in prompts]
    return agreement(mine, others)


async def _our_answer(target: Target, prompt: list[int], tokens: int) -> GreedyAnswer:
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": _LOGPROBS,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    choice = (await _asked(target, "/v1/completions", body))["choices"][0]
    first = choice["logprobs"]["top_logprobs"][0]
    return GreedyAnswer(
        choice["token_ids"], {int(name.partition(":")[2]): value for name, value in first.items()}
    )


async def _llama_answer(target: Target, prompt: list[int], tokens: int) -> list[int]:
    body = {
        "prompt": prompt,
        "n_predict": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_tokens": True,
    }
    answer = await _asked(target, "/completion", body)
    found = answer.get("tokens")
    if not found:
        raise LoadError("llama-server names no token ids in its answers; build a current one")
    return list(found)


async def _asked(target: Target, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, answer = await call(target, "POST", path, body, timeout_s=_TIMEOUT_S)
    if status != 200 or not isinstance(answer, dict):
        said = error_message(msgspec.json.encode(answer))
        raise LoadError(f"{path} of {target.host}:{target.port} answered {status}: {said}")
    return answer


def _same_tokens(mine: Sequence[int], other: Sequence[int]) -> int:
    """How many before the first that differs."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, other, strict=False))
    )
