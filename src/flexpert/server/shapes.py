"""Parts of choices as the objects of OpenAI's two APIs, whole or in chunks."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec

from flexpert.frontend.generation import Part, Usage
from flexpert.frontend.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from flexpert.frontend.text import AnswerText
from flexpert.server import wire
from flexpert.server.schemas import Shown

NOTHING_MORE = Shown()

_NO_CHOICES = b'"choices":[]'  # in no text within JSON, where a quote is escaped


class ChoiceShape(abc.ABC):
    """How one request is answered.

    Args:
        id: the answer's, with OpenAI's prefix. created: seconds since 1970.
        shown: what there is besides the text.
        prompts: token ids of each choice's prompt; needed where `shown` says something of them.
    """

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        text: AnswerText,
        *,
        shown: Shown = NOTHING_MORE,
        prompts: Sequence[list[int]] = (),
    ) -> None:
        self.id = id
        self.created = created
        self.model = model
        self.text = text
        self.shown = shown
        self._prompts = prompts
        self._no_usage = None if shown.usage else msgspec.UNSET
        self._begun: set[int] = set()
        self._envelope: tuple[bytes, bytes] | None = None

    @abc.abstractmethod
    def chunk(self, part: Part, usage: Usage | None = None) -> bytes | None:
        """JSON of one event; None: the part has nothing to show. usage: so far, if asked for."""

    @abc.abstractmethod
    def whole_choice(self, part: Part) -> wire.TextChoice | wire.ChatChoice:
        """A choice of the answer at once."""

    @abc.abstractmethod
    def whole(self, choices: list[msgspec.Raw], usage: Usage, parts: Sequence[Part]) -> bytes:
        """JSON of the answer at once. choices: JSON of each."""

    async def answer(self, parts: Sequence[Part], usage: Usage) -> bytes:
        """JSON of the answer at once; others get their turn between its choices, because many of
        them with log probabilities take seconds."""
        choices = []
        for part in parts:
            choices.append(msgspec.Raw(wire.encode(self.whole_choice(part))))
            await asyncio.sleep(0)
        return self.whole(choices, usage, parts)

    def _enclose(self, choice: wire.TextChoice | wire.ChatChunkChoice) -> bytes:
        """JSON of an event with this choice and nothing more to tell: what is around it is always
        the same."""
        if self._envelope is None:
            before, mark, after = self._around(self._no_usage).partition(_NO_CHOICES)
            self._envelope = before + mark[:-1], mark[-1:] + after
        before, after = self._envelope
        return before + wire.encode(choice) + after

    @abc.abstractmethod
    def _around(self, usage: Usage | msgspec.UnsetType | None) -> bytes:
        """JSON of an event without any choice."""

    def usage_chunk(self, usage: Usage) -> bytes:
        """JSON of the last event of a stream that asked for its usage."""
        return self._around(usage)

    def _begins(self, index: int) -> bool:
        """Whether this is the first that is shown of a choice."""
        begins = index not in self._begun
        self._begun.add(index)
        return begins

    def _is_empty(self, part: Part) -> bool:
        tokens = part.tokens if self.shown.token_ids else ()
        return not (part.text or part.finish or part.records or tokens or part.prompt)

    def _token_ids(self, part: Part) -> wire.TokenIds:
        return part.tokens if self.shown.token_ids else msgspec.UNSET

    def _prompt_ids(self, index: int) -> wire.TokenIds:
        return self._prompts[index] if self.shown.token_ids else msgspec.UNSET

    def _prompt_logprobs(self, part: Part) -> PromptLogprobs | msgspec.UnsetType:
        top = self.shown.prompt_logprobs
        if top is None or part.prompt is None:
            return msgspec.UNSET
        return prompt_logprobs(self._prompts[part.index], part.prompt, self.text, top)


class TextShape(ChoiceShape):
    """`/v1/completions`.

    Args:
        echoes: text that stands before each choice's answer; empty: none.
    """

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        text: AnswerText,
        *,
        shown: Shown = NOTHING_MORE,
        prompts: Sequence[list[int]] = (),
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(id, created, model, text, shown=shown, prompts=prompts)
        self._echoes = echoes

    def chunk(self, part: Part, usage: Usage | None = None) -> bytes | None:
        if self._is_empty(part) and (not self._echoes or part.index in self._begun):
            return None
        choice, remark = self._choice(part), _remark([part])
        if usage is None and remark is msgspec.UNSET:
            return self._enclose(choice)
        return self._encode([choice], usage or self._no_usage, remark)

    def _around(self, usage: Usage | msgspec.UnsetType | None) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: list[msgspec.Raw], usage: Usage, parts: Sequence[Part]) -> bytes:
        return self._encode(cast(list[wire.TextChoice], choices), usage, _remark(parts))

    def whole_choice(self, part: Part) -> wire.TextChoice:
        return self._choice(part)

    def _choice(self, part: Part) -> wire.TextChoice:
        begins = self._begins(part.index)
        echo = self._echoes[part.index] if self._echoes else ""
        choice = wire.TextChoice(
            part.index,
            (echo if begins else "") + part.text,
            self._logprobs(part, begin=len(echo)),
            part.finish,
            token_ids=self._token_ids(part),
        )
        if begins:
            choice.prompt_token_ids = self._prompt_ids(part.index)
            choice.prompt_logprobs = self._prompt_logprobs(part)
        return choice

    def _logprobs(self, part: Part, begin: int) -> CompletionLogprobs | None:
        if part.records is None:
            return None
        top = self.shown.echo_logprobs
        echoed = top is not None and part.prompt is not None
        return completion_logprobs(
            part.records,
            self.text,
            as_ids=self.shown.tokens_as_ids,
            prompt=self._prompts[part.index] if echoed else (),
            of_prompt=part.prompt or (),
            top=top,
            begin=begin,
        )

    def _encode(
        self,
        choices: list[wire.TextChoice],
        usage: Usage | msgspec.UnsetType | None,
        remark: wire.Remark | msgspec.UnsetType = msgspec.UNSET,
    ) -> bytes:
        return wire.encode(
            wire.TextCompletion(self.id, self.created, self.model, choices, usage, flexpert=remark)
        )


class ChatShape(ChoiceShape):
    """`/v1/chat/completions`."""

    def chunk(self, part: Part, usage: Usage | None = None) -> bytes | None:
        if self._is_empty(part):
            return None
        begins = self._begins(part.index)
        if begins:
            delta = wire.ChatDelta("assistant", part.text)
        else:
            delta = wire.ChatDelta(content=part.text or None)
        return self._chunk(part, delta, part.finish, usage, begins=begins)

    def _chunk(
        self,
        part: Part,
        delta: wire.ChatDelta,
        finish: str | None,
        usage: Usage | None,
        *,
        begins: bool,
    ) -> bytes:
        choice = wire.ChatChunkChoice(
            part.index, delta, self._logprobs(part), finish, self._token_ids(part)
        )
        prompt = self._prompt_ids(part.index) if begins else msgspec.UNSET
        remark = _remark([part])
        if usage is None and remark is msgspec.UNSET and prompt is msgspec.UNSET:
            return self._enclose(choice)
        return self._encode([choice], usage or self._no_usage, remark, prompt)

    def _around(self, usage: Usage | msgspec.UnsetType | None) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: list[msgspec.Raw], usage: Usage, parts: Sequence[Part]) -> bytes:
        answer = wire.ChatCompletion(
            self.id,
            self.created,
            self.model,
            cast(list[wire.ChatChoice], choices),
            usage,
            flexpert=_remark(parts),
        )
        answer.prompt_token_ids = self._prompt_ids(0)
        answer.prompt_logprobs = self._prompt_logprobs(parts[0])
        return wire.encode(answer)

    def whole_choice(self, part: Part) -> wire.ChatChoice:
        return self._whole_choice(part, wire.ChatMessage(part.text), part.finish)

    def _whole_choice(
        self, part: Part, message: wire.ChatMessage, finish: str | None
    ) -> wire.ChatChoice:
        return wire.ChatChoice(
            part.index, message, self._logprobs(part), finish, self._token_ids(part)
        )

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        if part.records is None:
            return None
        return chat_logprobs(part.records, self.text, as_ids=self.shown.tokens_as_ids)

    def _encode(
        self,
        choices: list[wire.ChatChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        remark: wire.Remark | msgspec.UnsetType = msgspec.UNSET,
        prompt: wire.TokenIds = msgspec.UNSET,
    ) -> bytes:
        chunk = wire.ChatChunk(self.id, self.created, self.model, choices, usage, flexpert=remark)
        chunk.prompt_token_ids = prompt
        return wire.encode(chunk)


def _remark(parts: Sequence[Part]) -> wire.Remark | msgspec.UnsetType:
    """On the last part of a degraded choice; nothing on any other."""
    for part in parts:
        if part.degraded and part.finish is not None:
            return wire.Remark(degraded=True)
    return msgspec.UNSET
