"""Families of models that write the values of their calls' arguments as texts between tags."""

from __future__ import annotations

import re

import msgspec

from flexpert.frontend.tools.call_arguments import TaggedArguments, Tools
from flexpert.frontend.tools.call_reader import CallReader, Reading
from flexpert.frontend.tools.json_calls import Grammar
from flexpert.frontend.tools.tool_events import AnswerSink

_MOST_NAME = 128  # characters
_STRING = re.compile(r'\bstring="(true|false)"')


class TagStyle(msgspec.Struct, frozen=True):
    """How calls are tagged. call, parameter: up to the name that follows; `>` ends the tag."""

    section: str
    section_end: str
    call: str
    call_end: str
    parameter: str
    parameter_end: str

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(msgspec.structs.astuple(self))


QWEN3_CODER = TagStyle(
    "<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>"
)
MINIMAX = TagStyle(
    "<minimax:tool_call>",
    "</minimax:tool_call>",
    "<invoke name=",
    "</invoke>",
    "<parameter name=",
    "</parameter>",
)
DEEPSEEK_V32 = TagStyle(
    "<｜DSML｜function_calls>",
    "</｜DSML｜function_calls>",
    "<｜DSML｜invoke name=",
    "</｜DSML｜invoke>",
    "<｜DSML｜parameter name=",
    "</｜DSML｜parameter>",
)


def tagged(style: TagStyle) -> Grammar:
    """Sections with calls with parameters, in tags."""

    def grammar(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
        inside = False
        while True:
            between = (style.section, style.call, style.section_end)
            marker = yield from reader.until(between, sink.content)
            if marker is None:
                return
            if marker == style.section_end and not inside:
                sink.content(marker)
            elif marker == style.call:
                inside = True  # models leave a section's beginning out
                yield from _call(reader, sink, tools, style)
            elif marker == style.section:
                space = yield from reader.space()
                inside = yield from reader.next_is(style.call)
                if not inside:
                    sink.content(marker + space)
            else:
                inside = False

    return grammar


def _call(reader: CallReader, sink: AnswerSink, tools: Tools, style: TagStyle) -> Reading[None]:
    head, marker = yield from reader.take((">", "\n"))
    name = _name(head)
    if marker != ">" or not name:
        sink.content(style.call + head + (marker or ""))
        return
    sink.begin_call(name)
    arguments = TaggedArguments(tools.get(name, {}), sink)
    ends = (style.call_end, style.section_end, style.call)
    end: str | None = style.parameter_end
    while end == style.parameter_end:
        end = yield from reader.until((style.parameter, style.parameter_end, *ends), sink.content)
        while end == style.parameter:
            key, _ = yield from reader.take((">",))
            end = yield from arguments.value(
                _name(key),
                reader,
                (style.parameter_end, style.parameter, *ends),
                is_text=_is_text(key),
            )
            if end is None:
                return  # cut off within a value: its text stays open
    arguments.close()
    if end is not None and end != style.call_end:
        reader.unread(end)


def _name(head: str) -> str:
    """Of a function or parameter: `=x`, `="x"`, or `="x" string="true"`."""
    head = head.strip()
    if head[:1] in ('"', "'"):
        head = head[1:].partition(head[0])[0]
    return head[:_MOST_NAME]


def _is_text(head: str) -> bool | None:
    """What DeepSeek-V3.2 says of a value: `"x" string="true"`; None: nothing."""
    said = _STRING.search(head)
    return None if said is None else said[1] == "true"


def glm(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """<tool_call>NAME, then <arg_key>…</arg_key><arg_value>…</arg_value>: GLM-4.5 and later."""
    begin, end, key_begin, key_end, value_begin, value_end = GLM_MARKERS
    while (yield from reader.until((begin,), sink.content)):
        head, marker = yield from reader.take((key_begin, end, begin))
        name = head.strip()
        if marker is None or not name or len(name.split()) > 1 or len(name) > _MOST_NAME:
            sink.content(begin + head)
            if marker is not None and marker != begin:
                sink.content(marker)
            elif marker is not None:
                reader.unread(marker)
            continue
        sink.begin_call(name)
        arguments = TaggedArguments(tools.get(name, {}), sink)
        while marker == key_begin:
            key, marker = yield from reader.take((key_end, end))
            if marker != key_end:
                break
            marker = yield from reader.until((value_begin, key_begin, end), sink.content)
            if marker != value_begin:
                continue
            marker = yield from arguments.value(key.strip(), reader, (value_end, end, begin))
            if marker is None:
                return  # cut off within a value: its text stays open
            if marker == value_end:
                marker = yield from reader.until((key_begin, end, begin), sink.content)
        arguments.close()
        if marker == begin:
            reader.unread(begin)


GLM_MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)
