"""An answer on its way to becoming a response or a message: parts in, events of blocks out."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
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


async def block_events(
    generation: Generation, answer: BlockAnswer, shape: BlockShape
) -> AsyncGenerator[bytes, None]:
    """The stream's events; what came in one step leaves in one piece."""
    try:
        yield shape.begin(generation.usage)
        async with aclosing(generation.parts()) as arriving:
            async for parts in arriving:
                events = [event for part in parts for event in answer.feed(part)]
                if piece := b"".join([shape.show(event) for event in events]):
                    yield piece
        yield shape.end(answer, generation.usage)
    except Exception as error:
        if not isinstance(error, FlexpertError):
            log.exception("an answer failed")
        yield shape.fail(answer, api_error(error))


async def whole_answer(generation: Generation, answer: BlockAnswer) -> None:
    """Until it is complete.

    Raises: FlexpertError: a sequence failed.
    """
    async with aclosing(generation.parts()) as arriving:
        async for parts in arriving:
            for part in parts:
                answer.feed(part)
