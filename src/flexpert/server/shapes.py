"""Parts of choices as the objects of OpenAI's two APIs, whole or in chunks."""

from __future__ import annotations

import abc
import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec

from flexpert.frontend.generation import Part, Usage
from flexpert.frontend.logprobs import chat_logprobs, completion_logprobs
from flexpert.frontend.text import TokenText
from flexpert.server import wire


class ChoiceShape(abc.ABC):
    """How one request is answered.

    Args:
        id: the answer's, with OpenAI's prefix. created: seconds since 1970.
        with_usage: chunks have a usage field, null but in the last.
    """

    def __init__(
        self, id: str, created: int, model: str, text: TokenText, *, with_usage: bool
    ) -> None:
        self.id = id
        self.created = created
        self.model = model
        self.text = text
        self.with_usage = with_usage
        self._no_usage = None if with_usage else msgspec.UNSET

    @abc.abstractmethod
    def chunk(self, part: Part) -> bytes | None:
        """JSON of one event; None: the part has nothing to show."""

    @abc.abstractmethod
    def usage_chunk(self, usage: Usage) -> bytes:
        """JSON of the last event of a stream that asked for its usage."""

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
        text: TokenText,
        *,
        with_usage: bool,
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(id, created, model, text, with_usage=with_usage)
        self._echoes = dict(enumerate(echoes))

    def chunk(self, part: Part) -> bytes | None:
        choice = self._choice(part)
        if not choice.text and part.finish is None and not part.records:
            return None
        return self._encode([choice], self._no_usage, _remark([part]))

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: list[msgspec.Raw], usage: Usage, parts: Sequence[Part]) -> bytes:
        return self._encode(cast(list[wire.TextChoice], choices), usage, _remark(parts))

    def whole_choice(self, part: Part) -> wire.TextChoice:
        return self._choice(part)

    def _choice(self, part: Part) -> wire.TextChoice:
        records = part.records
        return wire.TextChoice(
            part.index,
            self._echoes.pop(part.index, "") + part.text,
            None if records is None else completion_logprobs(records, self.text),
            part.finish,
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

    def __init__(
        self, id: str, created: int, model: str, text: TokenText, *, with_usage: bool
    ) -> None:
        super().__init__(id, created, model, text, with_usage=with_usage)
        self._begun: set[int] = set()

    def chunk(self, part: Part) -> bytes | None:
        if not part.text and part.finish is None and not part.records:
            return None
        if part.index in self._begun:
            delta = wire.ChatDelta(content=part.text or None)
        else:
            self._begun.add(part.index)
            delta = wire.ChatDelta("assistant", part.text)
        records = part.records
        choice = wire.ChatChunkChoice(
            part.index,
            delta,
            None if records is None else chat_logprobs(records, self.text),
            part.finish,
        )
        return self._encode([choice], self._no_usage, _remark([part]))

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._encode([], usage)

    def whole(self, choices: list[msgspec.Raw], usage: Usage, parts: Sequence[Part]) -> bytes:
        all_of_them = cast(list[wire.ChatChoice], choices)
        return wire.encode(
            wire.ChatCompletion(
                self.id, self.created, self.model, all_of_them, usage, flexpert=_remark(parts)
            )
        )

    def whole_choice(self, part: Part) -> wire.ChatChoice:
        return wire.ChatChoice(
            part.index,
            wire.ChatMessage(part.text),
            None if part.records is None else chat_logprobs(part.records, self.text),
            part.finish,
        )

    def _encode(
        self,
        choices: list[wire.ChatChunkChoice],
        usage: Usage | msgspec.UnsetType | None,
        remark: wire.Remark | msgspec.UnsetType = msgspec.UNSET,
    ) -> bytes:
        return wire.encode(
            wire.ChatChunk(self.id, self.created, self.model, choices, usage, flexpert=remark)
        )


def _remark(parts: Sequence[Part]) -> wire.Remark | msgspec.UnsetType:
    """On the last part of a degraded choice; nothing on any other."""
    degraded = any(part.degraded and part.finish is not None for part in parts)
    return wire.Remark(degraded=True) if degraded else msgspec.UNSET
