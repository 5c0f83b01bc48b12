"""Answers of each family of models: what is content, reasoning and a call, however it is cut."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.config import ReasoningParser, ToolCallParser
from flexpert.errors import ConfigError
from flexpert.frontend.tools.answer_parser import (
    REASONING_FAMILIES,
    TOOL_FAMILIES,
    AnswerParser,
    ParserNames,
    ToolFamily,
    parser_names,
)
from flexpert.frontend.tools.json_calls import enforced_array, enforced_call

SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "place": {"$ref": "#/$defs/Place"},
        },
        "$defs": {"Place": {"type": "object"}},
    },
    "now": {"type": "object", "properties": {}},
}


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments
    ids: list[str] = field(default_factory=list)


def parsed(parser: AnswerParser, pieces: list[str]) -> Answer:
    """All that is found in a text that comes in these pieces."""
    answer = Answer()
    for found in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        answer.content += found.content
        answer.reasoning += found.reasoning
        for call in found.calls:
            if call.name is not None:
                assert call.index == len(answer.calls)
                assert call.id
                answer.calls.append((call.name, ""))
                answer.ids.append(call.id)
            assert call.index == len(answer.calls) - 1
            name, before = answer.calls[-1]
            answer.calls[-1] = (name, before + call.arguments)
    return answer


def parser_of(tools: str | None, reasoning: str | None = None, **more: object) -> AnswerParser:
    family = None if tools is None else TOOL_FAMILIES[tools]
    return AnswerParser(reasoning=reasoning, tools=family, schemas=SCHEMAS, **more)  # type: ignore[arg-type]


PARIS = '{"city": "Paris </x> \\" é", "days": 2}'
CALL = [("weather", PARIS)]
DS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
DS_END = "<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>"
KIMI_CALL = "<|tool_call_begin|>functions.weather:{}<|tool_call_argument_begin|>"

# family, reasoning, text, what is found in it
CASES = {
    "hermes": (
        "hermes",
        None,
        f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>',
        Answer("Let me see.", calls=CALL),
    ),
    "hermes, two calls and text between and behind": (
        "hermes",
        None,
        f'<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>\n and '
        '<tool_call>{"name": "now"}</tool_call>\ndone\n',
        Answer("and\ndone\n", calls=[*CALL, ("now", "{}")]),
    ),
    "hermes, arguments as a text": (
        "hermes",
        None,
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(PARIS)}}}</tool_call>',
        Answer(calls=CALL),
    ),
    "hermes, no end": (
        "hermes",
        None,
        f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}',
        Answer(calls=CALL),
    ),
    "hermes, cut off": (
        "hermes",
        None,
        '<tool_call>{"name": "weather", "arguments": {"city": "Par',
        Answer(calls=[("weather", '{"city": "Par')]),
    ),
    "hermes, not JSON": (
        "hermes",
        None,
        "<tool_call>weather(Paris)</tool_call>",
        Answer("<tool_call>weather(Paris)</tool_call>"),
    ),
    "hermes, broken within the arguments": (
        "hermes",
        None,
        '<tool_call>{"name": "weather", "arguments": {"city": Paris!}}</tool_call>',
        Answer(calls=[("weather", '{"city": Paris!}}')]),
    ),
    "hermes, a call without an end before another": (
        "hermes",
        None,
        '<tool_call>{"name": "now"}\n<tool_call>{"name": "now"}</tool_call>',
        Answer(calls=[("now", "{}"), ("now", "{}")]),
    ),
    "only a beginning of a marker": ("hermes", None, "a <tool_c", Answer("a <tool_c")),
    "qwen3 with reasoning": (
        "hermes",
        "qwen3",
        "<think>\nI <tool_call> think\n</think>\n\n"
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        Answer("", "I <tool_call> think", [("now", "{}")]),
    ),
    "reasoning and content": (
        None,
        "qwen3",
        "<think>\na\n\nb\n</think>\n\nThe answer.\n",
        Answer("The answer.\n", "a\n\nb"),
    ),
    "reasoning that does not end": (None, "qwen3", "<think>a\nb", Answer("", "a\nb")),
    "no reasoning": (None, "qwen3", " a < b <think>", Answer(" a < b <think>")),
    "mistral's reasoning": (None, "mistral", "[THINK]a[/THINK]b", Answer("b", "a")),
    "always open": (None, "deepseek_r1", "a</think>b", Answer("b", "a")),
    "qwen3_coder": (
        "qwen3_coder",
        None,
        'Yes:\n<tool_call>\n<function=weather>\n<parameter=city>\nParis "é"\n\nline 2\n'
        "</parameter>\n<parameter=days>\n2\n</parameter>\n<parameter=exact>True</parameter>"
        '<parameter=tags>["a"]</parameter><parameter=unit>null</parameter>'
        '<parameter=place>{"x": 1}</parameter><parameter=other>1</parameter>'
        "\n</function>\n</tool_call>\n<tool_call><function=now>\n</function></tool_call>",
        Answer(
            "Yes:",
            calls=[
                (
                    "weather",
                    '{"city":"Paris \\"é\\"\\n\\nline 2","days":2,"exact":true,"tags":["a"],'
                    '"unit":null,"place":{"x": 1},"other":"1"}',
                ),
                ("now", "{}"),
            ],
        ),
    ),
    "qwen3_coder, of another type than the schema's": (
        "qwen3_coder",
        None,
        "<function=weather><parameter=days>two</parameter><parameter=unit>5</parameter></function>",
        Answer(calls=[("weather", '{"days":"two","unit":"5"}')]),
    ),
    "qwen3_coder, parameters without ends": (
        "qwen3_coder",
        None,
        "<tool_call><function=weather><parameter=city>a<parameter=days>2</function></tool_call>",
        Answer(calls=[("weather", '{"city":"a","days":2}')]),
    ),
    "qwen3_coder, cut off in a text": (
        "qwen3_coder",
        None,
        "<tool_call><function=weather><parameter=city>Par",
        Answer(calls=[("weather", '{"city":"Par')]),
    ),
    "qwen3_coder, no function": (
        "qwen3_coder",
        None,
        "<tool_call> nothing</tool_call>",
        Answer("<tool_call> nothing</tool_call>"),
    ),
    "minimax_m2": (
        "minimax_m2",
        "minimax_m2",
        "<think>hm</think>\n<minimax:tool_call>\n"
        '<invoke name="weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n'
        '<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        Answer("", "hm", [("weather", '{"city":"Paris","days":2}'), ("now", "{}")]),
    ),
    "deepseek_v32": (
        "deepseek_v32",
        None,
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="other" string="false">[1]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="true">2</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        Answer(calls=[("weather", '{"city":"Paris","other":[1],"days":"2"}')]),
    ),
    "glm45": (
        "glm45",
        "glm45",
        "\n<think>why</think>\nOK\n<tool_call>weather\n<arg_key>city</arg_key>\n"
        "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
        "</tool_call>\n<tool_call>now</tool_call>",
        Answer("OK", "why", [("weather", '{"city":"Paris","days":2}'), ("now", "{}")]),
    ),
    "glm45, no name": (
        "glm45",
        None,
        "<tool_call>{no name}: here\n</tool_call>",
        Answer("<tool_call>{no name}: here\n</tool_call>"),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        None,
        f"Sure{DS[0]}{DS[1]}function{DS[2]}weather\n```json\n{PARIS}\n```{DS[3]}\n"
        f"{DS[1]}function{DS[2]}now\n```json\n{{}}\n```{DS[3]}{DS_END}",
        Answer("Sure", calls=[*CALL, ("now", "{}")]),
    ),
    "deepseek_v31": (
        "deepseek_v31",
        "deepseek_v3",
        f"Sure{DS[0]}{DS[1]}weather{DS[2]}{PARIS}{DS[3]}{DS[1]}function{DS[2]}{{}}{DS[3]}{DS_END}",
        Answer("Sure", calls=[*CALL, ("function", "{}")]),
    ),
    "deepseek_v31, no separator": (
        "deepseek_v31",
        None,
        f"{DS[0]}{DS[1]}weather{DS[3]}{DS_END}",
        Answer(f"{DS[1]}weather{DS[3]}"),
    ),
    "kimi_k2": (
        "kimi_k2",
        "kimi_k2",
        f"<think>hm{KIMI}{KIMI_CALL.format(0)}{PARIS}<|tool_call_end|>{KIMI_CALL.format(1)}"
        "{}<|tool_call_end|><|tool_calls_section_end|>",
        Answer(
            "",
            "hm",
            [*CALL, ("weather", "{}")],
            ids=["functions.weather:0", "functions.weather:1"],
        ),
    ),
    "mistral, an array": (
        "mistral",
        None,
        f'Hm [TOOL_CALLS] [{{"name": "weather", "arguments": {PARIS}}}, {{"name": "now"}}]',
        Answer("Hm", calls=[*CALL, ("now", "{}")]),
    ),
    "mistral, names before arguments": (
        "mistral",
        None,
        f"[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{PARIS}[TOOL_CALLS]now{{}}",
        Answer(calls=[*CALL, ("now", "{}")]),
    ),
    "mistral, nothing is called": (
        "mistral",
        None,
        "[TOOL_CALLS] [1]",
        Answer("[TOOL_CALLS] [1]"),
    ),
    "llama3_json": (
        "llama3_json",
        None,
        f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}',
        Answer(calls=[*CALL, ("now", "{}")]),
    ),
    "llama3_json with its tag": (
        "llama3_json",
        None,
        f'I look.\n<|python_tag|>{{"name": "weather", "parameters": {PARIS}}}',
        Answer("I look.", calls=CALL),
    ),
    "llama3_json, any other object is content": (
        "llama3_json",
        None,
        '{"name": "Bob", "parameters": {}} {"name": "now"} ',
        Answer('{"name": "Bob", "parameters": {}} {"name": "now"} '),
    ),
    "harmony": (
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>commentary"
        "<|message|>Looking.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{PARIS}<|call|>",
        Answer("Looking.", "I think.", CALL),
    ),
    "harmony, the recipient first": (
        "openai",
        "openai_gptoss",
        f" to=functions.weather<|channel|>commentary json<|message|>{PARIS}",
        Answer(calls=CALL),
    ),
    "harmony, an answer": (
        "openai",
        "openai_gptoss",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>"
        "The answer.<|return|>",
        Answer("The answer.", "a"),
    ),
    "harmony without channels": ("openai", None, "just text", Answer("just text")),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    _, _, text, expected = CASES[name]
    found = parsed(fresh(name), [text])
    assert (found.content, found.reasoning) == (expected.content, expected.reasoning)
    assert found.calls == expected.calls
    if expected.ids:
        assert found.ids == expected.ids


def fresh(name: str) -> AnswerParser:
    tools, reasoning, _, _ = CASES[name]
    return parser_of(tools, reasoning, reasoning_open=reasoning == "deepseek_r1")


@pytest.mark.parametrize("name", CASES)
def test_single_characters_find_the_same(name: str) -> None:
    text = CASES[name][2]
    whole, cut = parsed(fresh(name), [text]), parsed(fresh(name), list(text))
    assert (cut.content, cut.reasoning, cut.calls) == (whole.content, whole.reasoning, whole.calls)


@pytest.mark.parametrize("name", CASES)
def test_no_marker_of_a_well_formed_call_is_shown_before_it_is_known(name: str) -> None:
    """What has been handed on as content is never taken back: at each point of a stream it is the
    beginning of the whole content."""
    _, _, text, expected = CASES[name]
    parser = fresh(name)
    shown = ""
    for character in text:
        shown += parser.push(character).content
        assert expected.content.startswith(shown)


FRAGMENTS = sorted(
    {
        *(marker for family in TOOL_FAMILIES.values() for marker in family.markers),
        *(mark for f in REASONING_FAMILIES.values() for mark in (f.begin, f.end) if mark),
        *("weather", "now", "city", "functions.weather:0", " to=functions.now", "```json\n", "```"),
        *('{"name": "weather", "arguments": ', '{"name": "now"', '"', "{", "}", "[", "]", ":", ","),
        *(">", "\n", " ", "\\", "é", "1", "true", "analysis", "final", "function", PARIS),
    }
)
SOUP = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=SOUP, cuts=st.lists(st.integers(0, 200), max_size=8))
@pytest.mark.parametrize("tools", TOOL_FAMILIES)
@pytest.mark.parametrize("reasoning", [None, "qwen3"])
def test_any_text_is_read_without_an_error_and_the_same_however_it_is_cut(
    tools: str, reasoning: str | None, text: str, cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = parsed(parser_of(tools, reasoning), [text])
    for cut in (pieces, list(text)):
        found = parsed(parser_of(tools, reasoning), cut)
        assert (found.content, found.reasoning, found.calls) == (
            whole.content,
            whole.reasoning,
            whole.calls,
        )


def test_arguments_are_handed_on_as_they_come() -> None:
    parser = parser_of("hermes")
    parser.push('<tool_call>{"name": "weather", "arguments": ')
    assert [call.arguments for call in parser.push('{"city": "Pa').calls] == ['{"city": "Pa']
    assert [call.arguments for call in parser.push('ris"').calls] == ['ris"']
    parser = parser_of("qwen3_coder")
    parser.push("<tool_call><function=weather><parameter=city>\nP")
    assert [call.arguments for call in parser.push("aris").calls] == ["aris"]


def test_ids_are_new_and_mistrals_are_nine_letters() -> None:
    text = '[TOOL_CALLS][{"name": "now"}, {"name": "now"}]'
    ids = parsed(parser_of("mistral"), [text]).ids
    assert len(set(ids)) == 2
    assert all(len(id) == 9 and id.isalnum() for id in ids)
    text = "[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}"
    assert parsed(parser_of("mistral"), [text]).ids == ["abcdefghi"]


def test_without_parallel_calls_the_first_is_the_only_one() -> None:
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    found = parsed(parser_of("hermes", most_calls=1), [call, call, "and"])
    assert found.calls == [("now", "{}")]
    assert found.content == "and"


def test_enforced_answers() -> None:
    array = f'[{{"name": "weather", "parameters": {PARIS}}}, {{"name": "now", "parameters": {{}}}}]'
    parser = AnswerParser(tools=ToolFamily(enforced_array, ()))
    assert parsed(parser, list(array)).calls == [*CALL, ("now", "{}")]
    parser = AnswerParser(tools=ToolFamily(enforced_call("weather"), ()))
    assert parsed(parser, list(PARIS)).calls == CALL


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ('<tool_call>\n{"name": <function-name>}', "hermes", None),
        ("<tool_call>\n<function=x>\n<parameter=y>", "qwen3_coder", None),
        ("<tool_call>{name}<arg_key> </think>", "glm45", "qwen3"),
        ("<｜tool▁call▁begin｜> </think>", "deepseek_v3", "qwen3"),
        ("<|tool_call_begin|><|tool_call_argument_begin|>", "kimi_k2", None),
        ("<|im_system|>tool_declare<|im_middle|>", "kimi_k2", None),
        ("{%- set dsml_token = '｜DSML｜' -%}", "deepseek_v32", None),
        ("{%- set tc = ns ~ 'minimax:tool_call' -%}", "minimax_m2", None),
        ("[TOOL_CALLS][THINK]", "mistral", "mistral"),
        ("<|start_header_id|>ipython {'name': ..., \"parameters\": ...}", "llama3_json", None),
        ("<|start|>assistant<|channel|>final", "openai", "openai_gptoss"),
        ("<|user|>{{ content }}", None, None),
        (None, None, None),
    ],
)
def test_parsers_are_found_in_the_chat_template(
    template: str | None, tools: str | None, reasoning: str | None
) -> None:
    assert parser_names("auto", "auto", template) == ParserNames(tools, reasoning)
    assert parser_names("none", "none", template) == ParserNames()
    assert parser_names("auto", "none", {"default": template}).tools == tools


def test_the_settings_name_the_parsers_there_are() -> None:
    assert set(get_args(ToolCallParser)) == {"auto", "none", *TOOL_FAMILIES}
    assert set(get_args(ReasoningParser)) == {"auto", "none", *REASONING_FAMILIES}


def test_an_unknown_parser_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"tool_call_parser: there is no 'hermse'.*hermes"):
        parser_names("hermse", "auto", None)
    with pytest.raises(ConfigError, match=r"reasoning_parser: there is no 'x'.*qwen3"):
        parser_names("auto", "x", None)


def test_reasoning_that_the_prompt_opens() -> None:
    names = ParserNames(reasoning="qwen3")
    assert names.opens_reasoning("<|im_start|>assistant\n<think>\n")
    assert not names.opens_reasoning("<think>\n\n</think>\n\n")
    assert not ParserNames().opens_reasoning("<think>\n")
    found = parsed(parser_of(None, "qwen3", reasoning_open=True), ["a</thi", "nk>\nb"])
    assert (found.reasoning, found.content) == ("a", "b")
