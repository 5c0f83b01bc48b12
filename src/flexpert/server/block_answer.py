"""An answer on its way to becoming a response or a message: parts in, events of blocks out."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import Protocol

from flexpert.engine.request import FINISH_STOP
from flexpert.errors import FlexpertError
from flexpert.frontend.generation import Generation, Part, Usage
from flexpert.frontend.tools.tool_choice import Dialog
from flexpert.server.answer_blocks import BlockBuilder, BlockEvent
from flexpert.server.dialog_shape import read_part
from flexpert.server.http_errors import ApiError, api_error
from flexpert.server.preprocessing import Generate

log = logging.getLogger("flexpert.server")


class BlockAnswer:
    """One answer as blocks.

    finish: as of `Part`, once it is over. stopped_by: the stop text that ended it. degraded: as of
    `Part`. reasoning_tokens: tokens that came with reasoning.
    """

    def __init__(self, asked: Generate) -> None:
        dialog = asked.dialog or Dialog()
        self._parser = dialog.parser()
        self._with_reasoning = dialog.with_reasoning
        self._stops = asked.params.stop if asked.params.include_stop_str_in_output else ()
        self._builder = BlockBuilder()
        self.blocks = self._builder.blocks
        self.finish: str | None = None
        self.stopped_by: str | None = None
        self.degraded = False
        self.reasoning_tokens = 0

    @property
    def has_calls(self) -> bool:
        """Something is called, and the answer was not cut off."""
        return self.finish == FINISH_STOP and self._parser.has_calls

    def feed(self, part: Part) -> list[BlockEvent]:
        """What a part does."""
        self.degraded |= part.degraded
        if part.finish == FINISH_STOP:
            self._cut_stop(part)
        self.finish = part.finish
        found = read_part(self._parser, part)
        if found.reasoning:
            self.reasoning_tokens += len(part.tokens)
        if not self._with_reasoning:
            found.reasoning = ""
        events = [*self._builder.feed(found)]
        if part.finish is not None:
            events += self._builder.end()
        return events

    def _cut_stop(self, part: Part) -> None:
        """A stop text that was met is the end of the last part's text: nothing of it was shown
        before."""
        met = [stop for stop in self._stops if part.text.endswith(stop)]
        if met:
            self.stopped_by = max(met, key=len)
            part.text = part.text.removesuffix(self.stopped_by)


class BlockShape(Protocol):
    """How such an answer is told in events of a stream, each piece one or several of them."""

    def begin(self, usage: Usage) -> bytes: ...

    def show(self, event: BlockEvent) -> bytes: ...

    def end(self, answer: BlockAnswer, usage: Usage) -> bytes: ...

    def fail(self, answer: BlockAnswer, error: ApiError) -> bytes: ...


class BlockEvents:
    """The events of an answer's stream; as `AnswerEvents`."""

    def __init__(self, generation: Generation, answer: BlockAnswer, shape: BlockShape) -> None:
        self._generation = generation
        self._answer = answer
        self._shape = shape

    def begin(self) -> bytes:
        return self._shape.begin(self._generation.usage)

    def show(self, parts: list[Part]) -> bytes:
        events = [event for part in parts for event in self._answer.feed(part)]
        return b"".join([self._shape.show(event) for event in events])

    def end(self) -> bytes:
        return self._shape.end(self._answer, self._generation.usage)

    def fail(self, error: Exception) -> bytes:
        if not isinstance(error, FlexpertError):
            log.exception("an answer failed")
        return self._shape.fail(self._answer, api_error(error))


async def whole_answer(generation: Generation, answer: BlockAnswer) -> None:
    """Until it is complete.

    Raises: FlexpertError: a sequence failed.
    """
    async with aclosing(generation.parts()) as arriving:
        async for parts in arriving:
            for part in parts:
                answer.feed(part)
