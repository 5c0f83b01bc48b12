"""What a request's choice of tools lets a model write."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from flexpert.engine.output_grammar import AnswerMatcher, GrammarCache, resolve
from flexpert.engine.request import StructuredOutputsParams
from flexpert.errors import RequestError
from flexpert.frontend.tools.answer_parser import ParserNames
from flexpert.frontend.tools.tool_choice import Dialog
from flexpert.models.source import ModelSource

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "place": {"$ref": "#/$defs/Place"}},
        "required": ["city"],
        "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
    "now": {},
}
PARIS = {"name": "weather", "parameters": {"city": "Paris", "place": {"x": 1}}}
NOW = {"name": "now", "parameters": {}}


def valid(structure: dict[str, Any] | None, answer: object) -> bool:
    assert structure is not None
    (schema,) = structure.values()
    return bool(jsonschema.Draft202012Validator(schema).is_valid(answer))


def calls(dialog: Dialog, text: str) -> list[tuple[str | None, str]]:
    parser = dialog.parser()
    found = [*parser.push(text).calls, *parser.finish().calls]
    return [(call.name, call.arguments) for call in found]


def test_required_is_a_list_of_at_least_one_call() -> None:
    dialog = Dialog(tools=TOOLS, choice="required")
    assert valid(dialog.structure, [PARIS])
    assert valid(dialog.structure, [NOW, PARIS])
    for wrong in (
        [],
        PARIS,
        "text",
        [{"name": "other", "parameters": {}}],
        [{"name": "weather", "parameters": {}}],
        [{"name": "now"}],
        [{"name": "weather", "parameters": {"city": "x", "place": {"x": "y"}}}],
    ):
        assert not valid(dialog.structure, wrong), wrong
    one = Dialog(tools=TOOLS, choice="required", parallel=False)
    assert valid(one.structure, [NOW])
    assert not valid(one.structure, [NOW, NOW])


def test_a_named_function_is_its_arguments() -> None:
    dialog = Dialog(tools=TOOLS, choice="named", named="weather")
    assert valid(dialog.structure, PARIS["parameters"])
    assert not valid(dialog.structure, {})
    assert valid(Dialog(tools=TOOLS, choice="named", named="now").structure, {})


def test_what_is_dictated_is_read_from_the_first_token_on() -> None:
    """Whatever the model's own parsers, and even if the prompt has opened its reasoning."""
    names = ParserNames("hermes", "deepseek_r1")
    dialog = Dialog(names, TOOLS, "required", reasoning_open=True)
    assert calls(dialog, json.dumps([PARIS, NOW])) == [
        ("weather", json.dumps(PARIS["parameters"])),
        ("now", "{}"),
    ]
    dialog = Dialog(names, TOOLS, "named", "weather", reasoning_open=True)
    assert calls(dialog, '{"city": "Paris"}') == [("weather", '{"city": "Paris"}')]
    assert not dialog.markers


def test_strict_functions_are_tags_in_free_text() -> None:
    dialog = Dialog(ParserNames("hermes"), TOOLS, "auto", strict=("weather",))
    assert dialog.structure is not None
    tags = dialog.structure["structural_tag"]
    weather, now = tags["structures"]
    assert weather["schema"] == TOOLS["weather"]
    assert now["schema"] == {"type": "object"}
    text = weather["begin"] + '{"city": "Paris"}' + weather["end"]
    assert all(one["begin"].startswith(tags["triggers"][0]) for one in tags["structures"])
    assert calls(dialog, text) == [("weather", '{"city": "Paris"}')]
    with pytest.raises(RequestError, match="strict is not served for the parser mistral"):
        _ = Dialog(ParserNames("mistral"), TOOLS, "auto", strict=("now",)).structure


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return ModelSource.open("tiny")


@pytest.fixture(scope="module")
def grammars(source: ModelSource) -> GrammarCache:
    return GrammarCache(lambda: source.grammar_tokens)


HERMES = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
CITY = '{"city": "Paris"}'
SEVERAL = Dialog(ParserNames("hermes"), TOOLS, "auto", strict=("weather",))


@pytest.mark.parametrize(
    ("dialog", "answer", "possible"),
    [
        (Dialog(tools=TOOLS, choice="required"), json.dumps([PARIS, NOW]), True),
        (Dialog(tools=TOOLS, choice="required"), json.dumps([]), False),
        (Dialog(tools=TOOLS, choice="required"), '[{"name": "weather", "parameters": {}}]', False),
        (Dialog(tools=TOOLS, choice="required", parallel=False), json.dumps([NOW, NOW]), False),
        (Dialog(tools=TOOLS, choice="named", named="weather"), CITY, True),
        (Dialog(tools=TOOLS, choice="named", named="now"), "{}", True),
        (Dialog(tools=TOOLS, choice="named", named="now"), '{"x": 1}', False),
        (SEVERAL, "Just text.", True),
        (SEVERAL, f"Let me see. {HERMES % CITY}", True),
        (SEVERAL, HERMES.replace("weather", "now") % '{"any": 1}', True),
        (SEVERAL, f"{HERMES % CITY}\n{HERMES % CITY}", True),
        (SEVERAL, HERMES % '{"town": "Paris"}', False),
        (SEVERAL, HERMES.replace("weather", "other") % "{}", False),
    ],
)
def test_the_engine_of_structured_output_takes_what_is_enforced(
    source: ModelSource, grammars: GrammarCache, dialog: Dialog, answer: str, possible: bool
) -> None:
    structure = dialog.structure
    assert structure is not None
    matcher = AnswerMatcher(resolve(StructuredOutputsParams(**structure)))
    tokens = source.tokenizer().encode(answer, add_special_tokens=False)
    try:
        said = matcher.advance(tokens, grammars)
    except RequestError:
        assert not possible
        return
    bits = np.unpackbits(np.frombuffer(said.compute_bitmask(), dtype=np.uint8), bitorder="little")
    may_end = all(bits[token] for token in source.info.eos_token_ids)
    assert may_end == possible


def test_nothing_is_enforced_where_a_model_may_choose() -> None:
    assert Dialog(ParserNames("hermes"), TOOLS, "auto").structure is None
    assert Dialog(tools=TOOLS, choice="none", strict=("now",)).structure is None


def test_definitions_of_several_functions_have_to_agree() -> None:
    other = {"type": "object", "$defs": {"Place": {"type": "string"}}}
    dialog = Dialog(tools=TOOLS | {"other": other}, choice="required")
    with pytest.raises(RequestError, match="Place means different things"):
        _ = dialog.structure
