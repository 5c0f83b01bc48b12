"""Messages with calls, as different chat templates want them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_head import byte_level_tokenizer

from flexpert.errors import RequestError
from flexpert.frontend.request_limits import RequestLimits
from flexpert.frontend.text import TokenText
from flexpert.frontend.tools.tool_messages import template_message, with_text_arguments
from flexpert.server.preprocessing import Generate, PreprocessTask, RefusedBody, preprocess

CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"é": 1}'}}


def test_arguments_become_mappings_and_what_says_nothing_is_left_out() -> None:
    sent = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}
    shown = template_message(sent)
    assert list(shown) == ["role", "content", "tool_calls"]
    assert shown["content"] == ""
    assert shown["tool_calls"][0]["function"]["arguments"] == {"é": 1}
    assert sent["tool_calls"] == [CALL], "what was sent is as it was"
    assert with_text_arguments([shown])[0]["tool_calls"] == [CALL]
    assert template_message({"role": "assistant", "content": "x", "tool_calls": []}) == {
        "role": "assistant",
        "content": "x",
    }


@pytest.mark.parametrize("arguments", [None, ""])
def test_a_call_without_arguments_has_none(arguments: str | None) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    shown = template_message({"role": "assistant", "tool_calls": [call]})
    assert shown["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_reaches_the_template_by_both_of_its_names(name: str) -> None:
    shown = template_message({"role": "assistant", "content": "x", name: "why"})
    assert (shown["reasoning"], shown["reasoning_content"]) == ("why", "why")


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"'])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"function": {"name": "now", "arguments": arguments}}
    with pytest.raises(RequestError, match="not a JSON object"):
        template_message({"role": "assistant", "tool_calls": [call]})


LOOP = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
ENDS = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        (LOOP + "{{ c.function.arguments | tojson }}" + ENDS, 'hi{"é": 1}'),
        (LOOP + "{{ '<' + c.function.arguments + '>' }}" + ENDS, 'hi<{"é": 1}>'),
        (LOOP + "{{ raise_exception('never') }}" + ENDS, None),
    ],
)
def test_a_template_gets_arguments_as_it_wants_them(template: str, shown: str | None) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [CALL]},
    ]
    body = json.dumps({"messages": messages}).encode()
    limits = RequestLimits("fake", 300, 128, 8, 128)
    outcome = preprocess(PreprocessTask("chat", (body,)), TokenText(tokenizer), limits)
    if shown is None:
        assert isinstance(outcome, RefusedBody)
        assert "never" in outcome.message
    else:
        assert isinstance(outcome, Generate)
        assert tokenizer.decode(outcome.prompt_ids[0]) == shown
