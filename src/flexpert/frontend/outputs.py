"""Answers as Python programs get them, with vLLM's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from flexpert.engine.request import TokenLogprobs
from flexpert.errors import RequestError
from flexpert.frontend.generation import Generation, Part, TokenRecord
from flexpert.frontend.request_limits import Prompt
from flexpert.frontend.text import TokenText

FINISH_ABORT = "abort"


class CompletionOutput(msgspec.Struct, frozen=True):
    """One answer to a prompt.

    token_ids: including the token that ended it. logprobs: one per token of the text, or None if
    `SamplingParams.logprobs` is None. finish_reason: "stop" or "length"; of an `AsyncLLM`'s also
    "abort", and None while it goes on. degraded: some of it was computed while experts were missing
    (`cluster.on_missing_expert`). index: which of the prompt's `n` answers it is.
    """

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str | None
    degraded: bool = False
    index: int = 0

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum over `logprobs`: how likely the text is. None without them."""
        if self.logprobs is None:
            return None
        return sum(token.chosen for token in self.logprobs)

    def finished(self) -> bool:
        """Nothing more comes of it."""
        return self.finish_reason is not None


class Completion(msgspec.Struct, frozen=True):
    """A prompt and its `n` answers; prompt: None if token ids were given.

    request_id: its name in logs. finished: all its answers are whole. prompt_logprobs: one per
    token of the prompt, None for the first; None unless `SamplingParams.prompt_logprobs` asks for
    them.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    request_id: str = ""
    finished: bool = True
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first answer."""
        return self.outputs[0].token_ids


def encode_prompt(text: TokenText, prompt: Prompt) -> list[int]:
    """Token ids of what a program gives as one prompt.

    Raises: RequestError: it is no prompt.
    """
    if isinstance(prompt, str):
        return text.encode(prompt)
    # bytes and mappings are iterated as well, and would be answered as something else
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(
            f"a prompt is a text or a list of token ids, not {type(prompt).__name__}; "
            "generate() takes one text, or a list of prompts"
        )
    ids = list(prompt)
    wrong = next((token for token in ids if type(token) is not int), None)
    if wrong is not None:
        raise RequestError(f"a prompt is a text or a list of token ids; {wrong!r} is neither")
    return ids


async def whole_completion(
    prompt: str | None, prompt_ids: list[int], generation: Generation
) -> Completion:
    """When all answers of a generation with one prompt are there.

    Raises: FlexpertError: a sequence failed.
    """
    growing = GrowingCompletion(prompt, prompt_ids, generation)
    growing.add(await generation.whole())
    return growing.completion()


class GrowingCompletion:
    """Puts the parts of a generation with one prompt together."""

    def __init__(self, prompt: str | None, prompt_ids: list[int], generation: Generation) -> None:
        self._prompt = prompt
        self._prompt_ids = prompt_ids
        self._generation = generation
        self._answers = [_Growing() for _ in generation.answers]
        self._of_prompt: list[TokenLogprobs | None] | None = None

    def add(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._answers[part.index].add(part)
            if part.prompt is not None:
                self._of_prompt = [None, *part.prompt]

    def abort(self) -> None:
        """What has not ended goes on no more."""
        for answer in self._answers:
            answer.finish = answer.finish or FINISH_ABORT

    def completion(self) -> Completion:
        """All there is so far; it does not change any more when parts are added."""
        outputs = [
            CompletionOutput(
                answer.text,
                list(sequence.tokens),
                None if answer.records is None else [r.logprobs for r in answer.records],
                answer.finish,
                answer.degraded,
                index,
            )
            for index, (answer, sequence) in enumerate(
                zip(self._answers, self._generation.answers, strict=True)
            )
        ]
        return Completion(
            self._prompt,
            self._prompt_ids,
            outputs,
            self._generation.request_id,
            all(output.finished() for output in outputs),
            self._of_prompt,
        )


class _Growing:
    """One answer so far."""

    def __init__(self) -> None:
        self.text = ""
        self.records: list[TokenRecord] | None = None
        self.finish: str | None = None
        self.degraded = False

    def add(self, part: Part) -> None:
        self.text += part.text
        if part.records is not None:
            self.records = (self.records or []) + part.records
        self.finish = part.finish
        self.degraded = part.degraded
