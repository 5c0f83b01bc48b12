"""Answers of a chat with calls and reasoning, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from flexpert.engine.request import FINISH_STOP
from flexpert.frontend.generation import Part, Usage
from flexpert.frontend.tools.answer_parser import AnswerParser
from flexpert.frontend.tools.tool_choice import Dialog
from flexpert.frontend.tools.tool_events import CallDelta, Parsed
from flexpert.server import wire
from flexpert.server.shapes import ChatShape

FINISH_TOOL_CALLS = "tool_calls"


class DialogShape(ChatShape):
    """`/v1/chat/completions` whose answers are parsed. dialog: how."""

    def __init__(self, *args: Any, dialog: Dialog, **more: Any) -> None:
        super().__init__(*args, **more)
        self._dialog = dialog
        self._parsers: dict[int, AnswerParser] = {}

    def chunk(self, part: Part, usage: Usage | None = None) -> bytes | None:
        parser = self._parsers.get(part.index)
        if parser is None:
            parser = self._parsers[part.index] = self._dialog.parser()
        found = self._read(parser, part)
        if found.is_empty and self._is_empty(msgspec.structs.replace(part, text="")):
            return None
        begins = self._begins(part.index)
        delta = wire.ChatDelta(
            "assistant" if begins else None,
            found.content or ("" if begins else None),
            [_delta(call) for call in found.calls] or None,
            found.reasoning or None,
            found.reasoning or None,
        )
        return self._chunk(part, delta, _finish(part, parser), usage, begins=begins)

    def whole_choice(self, part: Part) -> wire.ChatChoice:
        parser = self._dialog.parser()
        found = self._read(parser, part)
        message = wire.ChatMessage(found.content)
        if found.calls:
            message.content = found.content or None
            message.tool_calls = whole_calls(found.calls)
        if found.reasoning:
            message.reasoning_content = message.reasoning = found.reasoning
        return self._whole_choice(part, message, _finish(part, parser))

    def _read(self, parser: AnswerParser, part: Part) -> Parsed:
        return read_part(parser, part, with_reasoning=self._dialog.with_reasoning)


def read_part(parser: AnswerParser, part: Part, *, with_reasoning: bool = True) -> Parsed:
    """What a part of an answer holds; at its end with all that was held back."""
    found = parser.push(part.text)
    if part.finish is not None:
        rest = parser.finish()
        found = Parsed(
            found.content + rest.content,
            found.reasoning + rest.reasoning,
            joined([*found.calls, *rest.calls]),
        )
    if not with_reasoning:
        found.reasoning = ""
    return found


def joined(calls: Sequence[CallDelta]) -> list[CallDelta]:
    """Neighbouring deltas of one call put together."""
    found: list[CallDelta] = []
    for call in calls:
        if found and found[-1].index == call.index:
            found[-1].arguments += call.arguments
        else:
            found.append(call)
    return found


def whole_calls(calls: Sequence[CallDelta]) -> list[wire.ToolCall]:
    """Of an answer that was parsed at once."""
    return [
        wire.ToolCall(call.id or "", wire.CalledFunction(call.name or "", call.arguments))
        for call in calls
    ]


def _delta(call: CallDelta) -> wire.ToolCallDelta:
    function = wire.FunctionDelta(call.arguments, call.name)
    return wire.ToolCallDelta(
        call.index, function, call.id, "function" if call.id is not None else None
    )


def _finish(part: Part, parser: AnswerParser) -> str | None:
    called = part.finish == FINISH_STOP and parser.has_calls
    return FINISH_TOOL_CALLS if called else part.finish
