"""Which grammar a model's answers need, and an answer read by it: reasoning, content and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from flexpert.errors import ConfigError
from flexpert.frontend.tools import json_calls, xml_calls
from flexpert.frontend.tools.call_arguments import Tools
from flexpert.frontend.tools.call_reader import CallReader, Reading
from flexpert.frontend.tools.harmony import HARMONY_MARKERS, harmony
from flexpert.frontend.tools.json_calls import Grammar
from flexpert.frontend.tools.tool_events import AnswerSink, Parsed, long_id, short_id

AUTO = "auto"
NONE = "none"


class CallTags(msgspec.Struct, frozen=True):
    """How a call looks around its arguments. begin: with {name}; it begins with trigger."""

    trigger: str
    begin: str
    end: str


class ToolFamily(msgspec.Struct, frozen=True):
    """How a family of models writes calls.

    markers: special tokens whose names the grammar has to see. signs: a chat template of the family
    has all texts of one of these. new_id: of a call that the model gives none. tags: by which its
    arguments can be enforced; None: they cannot.
    """

    grammar: Grammar
    markers: tuple[str, ...]
    signs: tuple[tuple[str, ...], ...] = ()
    new_id: Callable[[], str] = long_id
    tags: CallTags | None = None


class ReasoningFamily(msgspec.Struct, frozen=True):
    """How a family marks its reasoning. always_open: every answer begins within it."""

    begin: str
    end: str
    signs: tuple[tuple[str, ...], ...] = ()
    always_open: bool = False


# The order matters to `auto`: a family's signs may be part of another's template.
TOOL_FAMILIES: Mapping[str, ToolFamily] = {
    "openai": ToolFamily(harmony, HARMONY_MARKERS, (("<|channel|>", "<|start|>"),)),
    "deepseek_v32": ToolFamily(
        xml_calls.tagged(xml_calls.DEEPSEEK_V32),
        (*xml_calls.DEEPSEEK_V32.markers, "｜DSML｜"),
        (("｜DSML｜",),),
    ),
    "deepseek_v31": ToolFamily(json_calls.deepseek, json_calls.DEEPSEEK_MARKERS),
    "deepseek_v3": ToolFamily(
        json_calls.deepseek, json_calls.DEEPSEEK_MARKERS, (("<｜tool▁call▁begin｜>",),)
    ),
    "kimi_k2": ToolFamily(
        json_calls.kimi,
        json_calls.KIMI_MARKERS,
        (("<|tool_call_argument_begin|>",), ("tool_declare", "<|im_middle|>")),
    ),
    "minimax_m2": ToolFamily(
        xml_calls.tagged(xml_calls.MINIMAX),
        xml_calls.MINIMAX.markers,
        # the template puts the tag together of ':' and a name
        (("minimax:tool_call",), ("]~b]", "<invoke name=")),
    ),
    "glm45": ToolFamily(xml_calls.glm, xml_calls.GLM_MARKERS, (("<arg_key>",),)),
    "qwen3_coder": ToolFamily(
        xml_calls.tagged(xml_calls.QWEN3_CODER),
        xml_calls.QWEN3_CODER.markers,
        (("<function=", "<parameter="),),
    ),
    "mistral": ToolFamily(
        json_calls.mistral, json_calls.MISTRAL_MARKERS, (("[TOOL_CALLS]",),), short_id
    ),
    "hermes": ToolFamily(
        json_calls.hermes,
        json_calls.HERMES_MARKERS,
        (("<tool_call>",),),
        tags=CallTags(
            "<tool_call>", '<tool_call>\n{{"name": "{name}", "arguments": ', "}\n</tool_call>"
        ),
    ),
    "llama3_json": ToolFamily(
        json_calls.llama_json,
        json_calls.LLAMA_MARKERS,
        (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
    ),
}

_THINK = (("</think>",),)
REASONING_FAMILIES: Mapping[str, ReasoningFamily] = {
    "openai_gptoss": ReasoningFamily("", "", (("<|channel|>", "<|start|>"),)),
    "mistral": ReasoningFamily("[THINK]", "[/THINK]", (("[THINK]",),)),
    "qwen3": ReasoningFamily("<think>", "</think>", _THINK),
    "deepseek_v3": ReasoningFamily("<think>", "</think>"),
    "glm45": ReasoningFamily("<think>", "</think>"),
    "kimi_k2": ReasoningFamily("<think>", "</think>"),
    "minimax_m2": ReasoningFamily("<think>", "</think>"),
    "deepseek_r1": ReasoningFamily("<think>", "</think>", always_open=True),
}


class ParserNames(msgspec.Struct, frozen=True):
    """What the service's model is read with; None: with none."""

    tools: str | None = None
    reasoning: str | None = None

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens whose names a grammar has to see."""
        found: tuple[str, ...] = ()
        if self.reasoning is not None:
            family = REASONING_FAMILIES[self.reasoning]
            found = (family.begin, family.end) if family.begin else HARMONY_MARKERS
        if self.tools is not None:
            found += TOOL_FAMILIES[self.tools].markers
        return frozenset(found)

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether an answer to this prompt, as the chat template wrote it, begins within its
        reasoning."""
        if self.reasoning is None:
            return False
        family = REASONING_FAMILIES[self.reasoning]
        return family.always_open or bool(family.begin and prompt.rstrip().endswith(family.begin))


def parser_names(tools: str, reasoning: str, chat_template: object) -> ParserNames:
    """Of the settings `server.tool_call_parser` and `server.reasoning_parser`.

    Args:
        chat_template: the tokenizer's: a text, several by name, or None.

    Raises: ConfigError: there is no parser of that name.
    """
    parts = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template]
    template = "\n".join(str(part) for part in parts if part)
    return ParserNames(
        _chosen("tool_call_parser", tools, TOOL_FAMILIES, template),
        _chosen("reasoning_parser", reasoning, REASONING_FAMILIES, template),
    )


def _chosen(setting: str, name: str, families: Mapping[str, Any], template: str) -> str | None:
    if name == NONE:
        return None
    if name != AUTO:
        if name not in families:
            known = ", ".join((AUTO, NONE, *sorted(families)))
            raise ConfigError(f"server.{setting}: there is no {name!r}; there are {known}")
        return name
    for found, family in families.items():
        if any(all(text in template for text in signs) for signs in family.signs):
            return found
    return None


class AnswerParser:
    """One answer as it comes. What it finds does not depend on how the text is cut.

    Args:
        reasoning: name of a family; None: what a model thinks is content.
        tools: how calls are written; None: there are none.
        reasoning_open: the answer begins within its reasoning.
        schemas: of the functions that may be called.
        most_calls: further ones are dropped; None: no bound.
    """

    def __init__(
        self,
        *,
        reasoning: str | None = None,
        tools: ToolFamily | None = None,
        reasoning_open: bool = False,
        schemas: Tools | None = None,
        most_calls: int | None = None,
    ) -> None:
        family = tools or ToolFamily(json_calls.plain, ())
        self._sink = AnswerSink(family.new_id, most_calls)
        self._reader = CallReader()
        grammar = _grammar(reasoning, family, opened=reasoning_open)
        self._reading = grammar(self._reader, self._sink, schemas or {})
        self._running = True

    @property
    def has_calls(self) -> bool:
        """Something has been called."""
        return self._sink.calls > 0

    def push(self, text: str) -> Parsed:
        """What this piece completes."""
        self._reader.push(text)
        self._go_on()
        return self._sink.take()

    def finish(self) -> Parsed:
        """What was held back until the end."""
        self._reader.finish()
        self._go_on()
        self._sink.finish()
        return self._sink.take()

    def _go_on(self) -> None:
        if self._running:
            try:
                next(self._reading)
            except StopIteration:
                self._running = False


def _grammar(reasoning: str | None, family: ToolFamily, *, opened: bool) -> Grammar:
    if family.grammar is harmony or reasoning == "openai_gptoss":
        return harmony
    if reasoning is None:
        return family.grammar
    marks = REASONING_FAMILIES[reasoning]
    # Kimi K2 goes from its reasoning to a call without ending it
    also_end = json_calls.KIMI_MARKERS[:1] if family.grammar is json_calls.kimi else ()

    def grammar(reader: CallReader, sink: AnswerSink, tools: Tools) -> Reading[None]:
        space = yield from reader.space()
        if (yield from reader.literal(marks.begin)) or opened:
            end = yield from reader.until((marks.end, *also_end), sink.reasoning)
            if end is not None and end != marks.end:
                reader.unread(end)
            sink.end_reasoning()
        else:
            sink.content(space)
        yield from family.grammar(reader, sink, tools)

    return grammar
