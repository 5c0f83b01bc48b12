"""A sequence on its rank, as the scheduler advances it and the sampler reads it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexpert.engine.output_grammar import AnswerMatcher
from flexpert.engine.request import RequestSequence, SamplingParams, TokenLogprobs

SEQUENCE_FAULTS = (ValueError, TypeError, LookupError, ArithmeticError)
"""What adding or sampling one sequence may raise; more than that concerns the whole rank."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token per row of logits; logprobs[i] is None where none were asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class Unseen:
    """What the host does not know yet of a step's samples: [M] int64 each.

    tokens: how many come at least between its last one and the sample. more: so many more may.
    sequences: which of the step before each belongs to, of which the device knows how many more
    came; -1: to none.
    """

    tokens: NDArray[np.int64]
    more: NDArray[np.int64]
    sequences: NDArray[np.int64]


class TokenCounts:
    """The distinct tokens of a prompt and its answer, and how often each is in the answer.

    Kept as arrays that grow, so that a penalty costs as much as there are distinct tokens, not
    the length of the sequence or of the vocabulary.
    """

    __slots__ = ("_answer", "_ids", "_index")

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._answer = np.zeros(64, dtype=np.float32)
        for token in prompt:
            self._find(token)
        for token in answer:
            self.append(token)

    @property
    def ids(self) -> NDArray[np.int64]:
        """[distinct] int64: every token of prompt and answer, each once."""
        return self._ids[: len(self._index)]

    @property
    def answer(self) -> NDArray[np.float32]:
        """[distinct] float32: how often `ids` are in the answer."""
        return self._answer[: len(self._index)]

    def copy(self) -> TokenCounts:
        """One that goes its own way."""
        other = TokenCounts.__new__(TokenCounts)
        other._index = self._index.copy()
        other._ids, other._answer = self._ids.copy(), self._answer.copy()
        return other

    def append(self, token: int) -> None:
        """One more token of the answer."""
        at = self._find(token)  # may replace the arrays
        self._answer[at] += 1

    def _find(self, token: int) -> int:
        at = self._index.get(token)
        if at is None:
            at = self._index[token] = len(self._index)
            if at == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._answer = np.concatenate([self._answer, np.zeros_like(self._answer)])
            self._ids[at] = token
        return at


class SampleState:
    """What sampling the next token of a sequence depends on, and nothing else.

    tokens: prompt and answer. stop_ids: tokens that end the answer from `min_tokens` on.
    counts: None unless a penalty is on. bias: tokens and what is added to their logits, or None.
    allowed: ascending, the only tokens that are possible, or None. greedy: temperature 0. plain:
    the most likely token is the answer and nothing else is asked for. goes_on_unseen: which token
    came last makes no difference to how the next one is sampled. numbers: the sampler's
    uniform numbers for the positions from `numbers_from` on, as far as it has drawn them. matcher:
    of a structured answer, how far it has come; the mask builder's.
    """

    __slots__ = (
        "allowed",
        "bias",
        "counts",
        "goes_on_unseen",
        "greedy",
        "id",
        "matcher",
        "numbers",
        "numbers_from",
        "params",
        "plain",
        "prompt_length",
        "seed",
        "stop_array",
        "stop_ids",
        "tokens",
    )

    def __init__(self, sequence: RequestSequence) -> None:
        params: SamplingParams = sequence.params
        self.id = sequence.id
        self.params = params
        self.tokens = [*sequence.prompt, *sequence.generated]
        self.prompt_length = len(sequence.prompt)
        self.numbers: list[float] = []
        self.numbers_from = 0
        self.seed = (params.seed or 0) & (2**64 - 1)
        eos = () if params.ignore_eos else sequence.eos
        self.stop_ids = frozenset(eos).union(params.stop_token_ids)
        self.stop_array: NDArray[np.int64] = np.array(sorted(self.stop_ids), dtype=np.int64)
        penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        structure = params.structured_outputs
        self.matcher = None if structure is None else AnswerMatcher(structure)
        self.counts = TokenCounts(sequence.prompt, sequence.generated) if penalised else None
        self.bias = _biases(params.logit_bias) if params.logit_bias else None
        self.allowed: NDArray[np.int64] | None = None
        if params.allowed_token_ids is not None:
            self.allowed = np.unique(np.array(params.allowed_token_ids, dtype=np.int64))
        self.greedy = params.temperature == 0
        self.goes_on_unseen = not (penalised or params.bad_token_ids or structure is not None)
        self.plain = self.greedy and not (
            penalised
            or params.logprobs is not None
            or self.bias is not None
            or self.allowed is not None
            or params.bad_token_ids
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, {len(self.tokens)} tokens)"

    @property
    def position(self) -> int:
        """The index in the answer of the token to be sampled next."""
        return len(self.tokens) - self.prompt_length

    @property
    def must_go_on(self) -> bool:
        """`min_tokens` is not reached: the next token must not end the answer."""
        return len(self.tokens) - self.prompt_length < self.params.min_tokens

    def room(self, max_model_len: int) -> int:
        """Tokens that the answer may still get."""
        room = max_model_len - len(self.tokens)
        most = self.params.max_tokens
        return room if most is None else min(room, most - self.position)

    def impossible(self) -> list[int]:
        """Tokens that would complete one of the sequences that the answer must not have."""
        answer = self.tokens[self.prompt_length :]
        return [
            ids[-1]
            for ids in self.params.bad_token_ids
            if len(ids) == 1 or tuple(answer[1 - len(ids) :]) == ids[:-1]
        ]

    def after(self, tokens: Sequence[int]) -> list[SampleState]:
        """As it would be after the first of these tokens, after the first two, and so on; this one
        stays as it is. Not of a structured answer, whose matcher is one."""
        answer, before = self.tokens[self.prompt_length :], self
        found = []
        for place, token in enumerate(tokens, 1):
            state = SampleState.__new__(SampleState)
            for name in SampleState.__slots__:
                setattr(state, name, getattr(before, name))
            state.tokens, state.prompt_length = [*answer, *tokens[:place]], 0
            if before.counts is not None:
                state.counts = before.counts.copy()
                state.counts.append(token)
            found.append(state)
            before = state
        return found

    def append(self, token: int) -> None:
        """`token` was published."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.append(token)

    def finish(self, max_model_len: int) -> str | None:
        """Whether the last token ended the answer: "stop", "length" or None."""
        answered = len(self.tokens) - self.prompt_length
        params = self.params
        if self.tokens[-1] in self.stop_ids and answered > params.min_tokens:
            return "stop"
        if params.max_tokens is not None and answered >= params.max_tokens:
            return "length"
        return "length" if len(self.tokens) >= max_model_len else None


def _biases(logit_bias: dict[int, float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """([n] int64 tokens, ascending; [n] float32 what is added)."""
    ids = sorted(logit_bias)
    values = [logit_bias[token] for token in ids]
    return np.array(ids, dtype=np.int64), np.array(values, dtype=np.float32)
