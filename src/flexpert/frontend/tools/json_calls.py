"""Families of models that write the arguments of their calls as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import Enum, auto

from flexpert.frontend.tools.call_arguments import Tools, written_json
from flexpert.frontend.tools.call_reader import CallReader, Reading, nowhere
from flexpert.frontend.tools.tool_events import AnswerSink

Grammar = Callable[[CallReader, AnswerSink, Tools], Reading[None]]

_ARGUMENT_KEYS = frozenset({"arguments", "parameters"})


class Found(Enum):
    """What a text that might be an object {"name", "arguments"} was.

    NO_CALL: nothing was handed on. BROKEN: a call whose arguments go on with whatever follows.
    """

    CALL = auto()
    NO_CALL = auto()
    BROKEN = auto()


class _ObjectCall:
    """One object {"name": …, "arguments": …}, its keys in any order.

    Args:
        known: names that a call may have; None: any. complete: there is no call without arguments.
    """

    def __init__(
        self, reader: CallReader, sink: AnswerSink, known: Tools | None, *, complete: bool
    ) -> None:
        self._reader = reader
        self._sink = sink
        self._known = known
        self._complete = complete
        self._name: str | None = None
        self._begun = False
        self._early: str | None = None  # arguments that came before the name

    def read(self) -> Reading[Found]:
        reader = self._reader
        if not (yield from reader.literal("{")):
            return Found.NO_CALL
        while True:
            yield from reader.space()
            if (yield from reader.literal("}")):
                return self._closed()
            whole = yield from self._member()
            if not whole:
                break
            yield from reader.space()
            yield from reader.literal(",")
        return Found.BROKEN if self._begun else Found.NO_CALL

    def _member(self) -> Reading[bool]:
        """One key with its value. Returns: it was whole."""
        reader = self._reader
        key: list[str] = []
        if not (yield from reader.next_is('"')) or not (yield from reader.json_value(key.append)):
            return False
        yield from reader.space()
        if not (yield from reader.literal(":")):
            return False
        yield from reader.space()
        name = _text_of("".join(key))
        if name == "name":
            return (yield from self._read_name())
        if name in _ARGUMENT_KEYS:
            return (yield from self._read_arguments())
        return (yield from reader.json_value(nowhere))

    def _read_name(self) -> Reading[bool]:
        written: list[str] = []
        if not (yield from self._reader.json_value(written.append)):
            return False
        name = _text_of("".join(written))
        if not name or (self._known is not None and name not in self._known):
            return False
        self._name = name
        if self._early is not None:
            self._begin()
            self._sink.arguments(self._early)
        elif not self._complete:
            self._begin()
        return True

    def _read_arguments(self) -> Reading[bool]:
        if self._name is None or (yield from self._reader.next_is('"')):
            written: list[str] = []
            whole = yield from self._reader.json_value(written.append)
            text = "".join(written)
            inner = _text_of(text) if whole else None  # JSON as a text in JSON
            self._early = text if inner is None else inner
            if self._name is not None:
                self._begin()
                self._sink.arguments(self._early)
            return whole
        self._begin()
        self._early = ""
        return (yield from self._reader.json_value(self._sink.arguments))

    def _begin(self) -> None:
        if not self._begun and self._name is not None:
            self._begun = True
            self._sink.begin_call(self._name)

    def _closed(self) -> Found:
        if not self._begun:
            return Found.NO_CALL
        if self._early is None:
            self._sink.arguments("{}")
        return Found.CALL


def _logged(
    reader: CallReader, sink: AnswerSink, known: Tools | None = None, *, complete: bool = False
) -> Reading[tuple[Found, str]]:
    """An `_ObjectCall`, and its text."""
    log: list[str] = []
    reader.log = log
    found = yield from _ObjectCall(reader, sink, known, complete=complete).read()
    reader.log = None
    return found, "".join(log)


def hermes(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """<tool_call>{"name": …, "arguments": …}</tool_call>: Hermes, Qwen2.5, Qwen3."""
    begin, end = HERMES_MARKERS
    while (yield from reader.until((begin,), sink.content)):
        space = yield from reader.space()
        found, text = yield from _logged(reader, sink)
        if found is Found.NO_CALL:
            sink.content(begin + space + text)
            continue
        if found is Found.BROKEN:
            marker = yield from reader.until((end, begin), sink.arguments)
        else:
            rest, marker = yield from reader.take((end, begin))
            sink.arguments(rest.strip())
        if marker == begin:
            reader.unread(begin)


def llama_json(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """{"name": …, "parameters": …}; …, after <|python_tag|> or as the whole answer: Llama 3 and 4.

    An object that names no tool is content.
    """
    (tag,) = LLAMA_MARKERS
    space = yield from reader.space()
    if (yield from reader.next_is("{")):
        yield from _row_of_objects(reader, sink, tools)
    else:
        sink.content(space)
    while (yield from reader.until((tag,), sink.content)):
        space = yield from reader.space()
        if (yield from reader.next_is("{")):
            yield from _row_of_objects(reader, sink, tools)
        else:
            sink.content(space)


def _row_of_objects(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    while True:
        found, text = yield from _logged(reader, sink, tools, complete=True)
        if found is Found.NO_CALL:
            sink.content(text)
            return
        if found is Found.BROKEN:
            yield from reader.until((), sink.arguments)
            return
        between = yield from reader.space()
        for separator in ";,":
            if (yield from reader.literal(separator)):
                between += separator + (yield from reader.space())
                break
        if not (yield from reader.next_is("{")):
            sink.content(between)
            return


def mistral(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """[TOOL_CALLS][{"name": …, "arguments": …}, …], or [TOOL_CALLS]name[ARGS]{…}."""
    begin = MISTRAL_BEGIN
    while (yield from reader.until((begin,), sink.content)):
        space = yield from reader.space()
        if (yield from reader.literal("[")):
            yield from _mistral_array(reader, sink, begin + space + "[")
        else:
            yield from _mistral_call(reader, sink)


def _mistral_array(reader: CallReader, sink: AnswerSink, opening: str) -> Reading[None]:
    while True:
        opening += yield from reader.space()
        found, text = yield from _logged(reader, sink)
        if found is Found.NO_CALL:
            sink.content(opening + text)
            return
        if found is Found.BROKEN:
            yield from reader.until((), sink.arguments)
            return
        opening = yield from reader.space()
        if (yield from reader.literal("]")):
            return
        if not (yield from reader.literal(",")):
            return
        opening += ","


def _mistral_call(reader: CallReader, sink: AnswerSink) -> Reading[None]:
    marks = ("[ARGS]", "[CALL_ID]", "{", MISTRAL_BEGIN)
    name, mark = yield from reader.take(marks)
    name, id = name.strip(), None
    if mark == "[CALL_ID]":
        id, mark = yield from reader.take(marks)
    if mark == "{":
        reader.unread(mark)
    if not name or mark is None or mark == MISTRAL_BEGIN:
        sink.content(MISTRAL_BEGIN + name + ("" if id is None else f"[CALL_ID]{id}"))
        if mark == MISTRAL_BEGIN:
            reader.unread(mark)
        return
    sink.begin_call(name, id.strip() if id else None)
    end = yield from written_json(reader, sink, (MISTRAL_BEGIN,))
    if end is not None:
        reader.unread(end)


def deepseek(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """DeepSeek V3: …function<sep>NAME, then JSON in a fence; V3.1: …NAME<sep>JSON."""
    section, begin, middle, end, close = DEEPSEEK_MARKERS
    while marker := (yield from reader.until((section, begin, close), sink.content)):
        if marker != begin:
            continue
        head, marker = yield from reader.take((middle, end, close))
        if marker != middle:
            sink.content(begin + head + (marker or ""))
            continue
        head = head.strip()
        yield from reader.space()
        if head == "function" and not (yield from reader.next_is("{")):
            name, marker = yield from reader.take(("\n", end))
            if marker == end:
                reader.unread(end)
            head = name.strip()
            yield from reader.literal("```json")
        if not head:
            sink.content(begin + middle)
            continue
        sink.begin_call(head)
        yield from written_json(reader, sink, (end, close), fences=("```",))


def kimi(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """Kimi K2: functions.NAME:NUMBER, which is the call's id, then JSON."""
    section, begin, middle, end, close = KIMI_MARKERS
    while marker := (yield from reader.until((section, begin, close), sink.content)):
        if marker != begin:
            continue
        head, marker = yield from reader.take((middle, end, close))
        id = head.strip()
        name, _, number = id.removeprefix("functions.").partition(":")
        if marker != middle or not name:
            sink.content(begin + head + (marker or ""))
            continue
        sink.begin_call(name, id if number else None)
        yield from written_json(reader, sink, (end, close))


HERMES_MARKERS = ("<tool_call>", "</tool_call>")
LLAMA_MARKERS = ("<|python_tag|>",)
MISTRAL_BEGIN = "[TOOL_CALLS]"
MISTRAL_MARKERS = (MISTRAL_BEGIN, "[ARGS]", "[CALL_ID]")
DEEPSEEK_MARKERS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI_MARKERS = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)


def _text_of(written: str) -> str | None:
    """The text that JSON writes; None: it is something else."""
    try:
        value = json.loads(written)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def enforced_array(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
    """[{"name": …, "parameters": …}, …]: what `tool_choice.choice_schema` lets a model write."""
    opening = yield from reader.space()
    if (yield from reader.literal("[")):
        yield from _mistral_array(reader, sink, opening + "[")
    else:
        sink.content(opening)
    yield from reader.until((), sink.content)


def enforced_call(name: str) -> Grammar:
    """The arguments alone, of the function that a request names."""

    def grammar(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
        sink.begin_call(name)
        yield from written_json(reader, sink, ())

    return grammar


def plain(reader: CallReader, sink: AnswerSink, tools: Mapping[str, object]) -> Reading[None]:
    """No calls."""
    yield from reader.until((), sink.content)
