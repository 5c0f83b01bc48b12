"""Tools and reasoning on /v1/chat/completions, seen through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from support.served_head import Running

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS: Any = [WEATHER, NOW]
TALK: Any = [{"role": "user", "content": "hi"}]
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
def client(tool_server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="any", max_retries=0)


def will_answer(server: Running, text: str, *, per_delta: int = 1) -> None:
    """Every sequence answers with this text and ends."""
    server.head.behaviour.answer = [
        *server.head.tokenizer.encode(text),
        server.head.tokenizer.eos_token_id,
    ]
    server.head.behaviour.per_delta = per_delta


def prompt(server: Running) -> str:
    """As the engine got it."""
    return str(server.head.tokenizer.decode(server.head.submitted[-1][1]))


def test_calls_at_once(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, CALLS)
    answer = client.chat.completions.create(model="fake", messages=TALK, tools=TOOLS, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        calls = choice.message.tool_calls
        assert calls is not None
        assert [(call.function.name, call.function.arguments) for call in calls] == [
            ("weather", '{"city": "Zürich"}'),
            ("now", "{}"),
        ]
        assert len({call.id for call in calls}) == 2
    assert '"name": "weather"' in prompt(tool_server)


@pytest.mark.parametrize("per_delta", [1, 5, 400])
def test_calls_streamed(tool_server: Running, client: openai.OpenAI, per_delta: int) -> None:
    will_answer(tool_server, CALLS, per_delta=per_delta)
    with client.chat.completions.stream(model="fake", messages=TALK, tools=TOOLS) as stream:
        contents = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion().choices[0]
    assert "".join(contents) == final.message.content == "Let me see."
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls is not None
    assert [json.loads(call.function.arguments) for call in final.message.tool_calls] == [
        {"city": "Zürich"},
        {},
    ]


def test_arguments_come_piece_by_piece(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, CALLS)
    chunks = client.chat.completions.create(
        model="fake", messages=TALK, tools=TOOLS, stream=True, logprobs=True
    )
    deltas = [chunk.choices[0] for chunk in chunks]
    records = [record for d in deltas for record in (d.logprobs.content if d.logprobs else [])]
    assert len(records) == len(tool_server.head.tokenizer.encode(CALLS))
    calls = [call for d in deltas for call in d.delta.tool_calls or ()]
    first = [call for call in calls if call.id]
    assert [(c.index, c.type, c.function.name) for c in first if c.function] == [
        (0, "function", "weather"),
        (1, "function", "now"),
    ]
    assert len([call for call in calls if call.index == 0]) > 10
    assert [d.finish_reason for d in deltas if d.finish_reason] == ["tool_calls"]


def test_reasoning_has_both_of_its_names(tool_server: Running) -> None:
    will_answer(tool_server, "<think>\nWhy?\n</think>\n\nBecause.")
    body: dict[str, Any] = {"messages": TALK}
    url = f"{tool_server.url}/v1/chat/completions"
    message = httpx.post(url, json=body).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Because.", "Why?")
    assert message["reasoning_content"] == "Why?"
    assert "tool_calls" not in message
    lines = httpx.post(url, json=body | {"stream": True}).text.splitlines()
    deltas = [
        json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")
    ]
    assert deltas[0]["role"] == "assistant"
    for name, text in (
        ("content", "Because."),
        ("reasoning", "Why?"),
        ("reasoning_content", "Why?"),
    ):
        assert "".join(delta.get(name, "") for delta in deltas) == text
    body |= {"include_reasoning": False}
    message = httpx.post(url, json=body).json()["choices"][0]["message"]
    assert message == {"content": "Because.", "role": "assistant", "refusal": None}


def test_an_answer_that_is_cut_off_in_a_call(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, CALLS)
    answer = client.chat.completions.create(
        model="fake", messages=TALK, tools=TOOLS, max_tokens=70
    ).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert '{"city": "Zürich"}'.startswith(call.function.arguments)


def test_a_conversation_with_calls_goes_on(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, CALLS)
    first = client.chat.completions.create(model="fake", messages=TALK, tools=TOOLS)
    message = first.choices[0].message
    assert message.tool_calls is not None
    will_answer(tool_server, "It is sunny.")
    talk = [*TALK, message.model_dump()]
    for call in message.tool_calls:
        talk.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    answer = client.chat.completions.create(model="fake", messages=talk, tools=TOOLS)
    assert answer.choices[0].message.content == "It is sunny."
    assert answer.choices[0].finish_reason == "stop"
    assert "<|assistant|>Let me see.[weather city=Zürich][now]<|end|><|tool|>sunny" in prompt(
        tool_server
    )


def test_only_what_is_allowed_is_shown_to_the_model(
    tool_server: Running, client: openai.OpenAI
) -> None:
    will_answer(tool_server, "fine")
    allowed: Any = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "auto",
            "tools": [{"type": "function", "function": {"name": "now"}}],
        },
    }
    client.chat.completions.create(model="fake", messages=TALK, tools=TOOLS, tool_choice=allowed)
    assert "now" in prompt(tool_server)
    assert "weather" not in prompt(tool_server)
    client.chat.completions.create(model="fake", messages=TALK, tools=TOOLS, tool_choice="none")
    assert "now" not in prompt(tool_server)


STRICT = {"type": "function", "function": {"name": "now", "strict": True}}
PARIS = '{"city": "Paris"}'


@pytest.mark.parametrize(
    ("choice", "text", "called"),
    [
        (
            "required",
            f'[{{"name": "weather", "parameters": {PARIS}}}, '
            '{"name": "now", "parameters": {}}]',
            [("weather", PARIS), ("now", "{}")],
        ),
        ({"type": "function", "function": {"name": "weather"}}, PARIS, [("weather", PARIS)]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_has_to_be_called_is_enforced_and_read(
    tool_server: Running,
    client: openai.OpenAI,
    choice: Any,
    text: str,
    called: list[tuple[str, str]],
    stream: bool,
) -> None:
    """The fake engine enforces nothing: the grammar that it gets is what counts."""
    will_answer(tool_server, text)
    asked: Any = {"model": "fake", "messages": TALK, "tools": TOOLS, "tool_choice": choice}
    if stream:
        with client.chat.completions.stream(**asked) as events:
            answer = events.get_final_completion().choices[0]
    else:
        answer = client.chat.completions.create(**asked).choices[0]
    calls = answer.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == called
    assert answer.finish_reason == "tool_calls"
    assert not answer.message.content
    structure = tool_server.head.submitted[-1][2].structured_outputs
    assert structure is not None
    assert structure.kinds == ["grammar"]
    assert "city" in str(structure.grammar)


def test_strict_functions_are_enforced_in_free_text(
    tool_server: Running, client: openai.OpenAI
) -> None:
    import pydantic

    class Weather(pydantic.BaseModel):
        """The weather of a city."""

        city: str

    will_answer(tool_server, CALLS.partition('\n<tool_call>\n{"name": "now')[0])
    tools: Any = [openai.pydantic_function_tool(Weather, name="weather")]
    answer = client.chat.completions.parse(model="fake", messages=TALK, tools=tools).choices[0]
    assert answer.message.tool_calls
    assert answer.message.tool_calls[0].function.parsed_arguments == Weather(city="Zürich")
    structure = tool_server.head.submitted[-1][2].structured_outputs
    assert structure is not None
    assert "tool_call" in str(structure.grammar)


def test_a_structure_leaves_no_room_for_reasoning(tool_server: Running) -> None:
    url = f"{tool_server.url}/v1/chat/completions"
    will_answer(tool_server, "{}")
    json_object = {"response_format": {"type": "json_object"}}
    body = {"messages": TALK, "chat_template_kwargs": {"think": True}}
    answer = httpx.post(url, json=body | json_object).json()["choices"][0]["message"]
    assert answer["content"] == "{}"
    for extra in ({"tools": [STRICT]}, {"tools": [NOW], "tool_choice": "required"}):
        refused = httpx.post(url, json={"messages": TALK} | json_object | extra).json()["error"]
        assert "cannot be combined" in refused["message"]


NAMED = {"type": "function", "function": {"name": "weather"}}
BROKEN_CALL = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{"}}]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "function"),
        ({"tools": [NOW, NOW]}, "tools", "twice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "pattern"),
        ({"tools": [NOW | {"cache": 1}]}, "tools", "cache"),
        ({"tool_choice": "required"}, "tool_choice", "goes with tools"),
        ({"tools": [NOW], "tool_choice": NAMED}, "tool_choice", "none of tools"),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", ""),
        (
            {"messages": [{"role": "assistant", "tool_calls": BROKEN_CALL}]},
            "messages",
            "not a JSON object",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}, "messages", "tool_calls"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tool_server: Running, body: dict[str, Any], param: str, says: str
) -> None:
    refused = httpx.post(f"{tool_server.url}/v1/chat/completions", json={"messages": TALK} | body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert says in refused.json()["error"]["message"]


def test_without_a_parser_tools_are_refused_and_said_how_to_have_them(server: Running) -> None:
    refused = httpx.post(
        f"{server.url}/v1/chat/completions", json={"messages": TALK, "tools": TOOLS}
    ).json()["error"]
    assert refused["param"] == "tools"
    assert "--tool-call-parser" in refused["message"]
