"""`/v1/messages`, seen through Anthropic's own client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from support.served_head import Running
from test_tools import CALLS, prompt, will_answer

anthropic = pytest.importorskip("anthropic")

TOOLS: Any = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
    {"name": "now", "input_schema": {"type": "object"}},
]
TALK: Any = [{"role": "user", "content": "hi"}]
WARM: Any = {"temperature": 0.5}
THINK: Any = {"type": "adaptive"}

USE: Any = {"type": "tool_use", "id": "1", "name": "now", "input": {}}


@pytest.fixture
def client(tool_server: Running) -> Any:
    return anthropic.Anthropic(base_url=tool_server.url, api_key="any", max_retries=0)


def test_a_text(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, "<think>Hm.</think>It is fine.")
    message = client.messages.create(
        model="fake",
        max_tokens=50,
        messages=TALK,
        system="Be kind.",
        extra_body={"temperature": 0.5},
    )
    assert (message.type, message.role, message.model) == ("message", "assistant", "fake")
    (block,) = message.content
    assert (block.type, block.text) == ("text", "It is fine.")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.input_tokens == len(tool_server.head.submitted[-1][1])
    assert message.usage.output_tokens == len(tool_server.head.behaviour.answer or ())
    assert prompt(tool_server) == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"
    assert tool_server.head.submitted[-1][2].temperature == 0.5


def test_thinking_is_shown_where_it_is_asked_for(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, "<think>Hm.</think>It is fine.")
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": TALK}
    thought, said = client.messages.create(**asked, thinking=THINK).content
    assert (thought.type, thought.thinking) == ("thinking", "Hm.")
    assert (said.type, said.text) == ("text", "It is fine.")
    for option in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}):
        (said,) = client.messages.create(**asked, thinking=option).content
        assert said.text == "It is fine."
    with pytest.raises(anthropic.BadRequestError, match="budget_tokens"):
        client.messages.create(**asked, thinking={"type": "enabled", "budget_tokens": 20})


@pytest.mark.parametrize("per_delta", [1, 400])
def test_events_of_a_stream_put_together_are_the_message(
    tool_server: Running, client: Any, per_delta: int
) -> None:
    will_answer(tool_server, f"<think>Hm.</think>{CALLS}", per_delta=per_delta)
    asked: Any = {"model": "fake", "max_tokens": 500, "messages": TALK, "tools": TOOLS}
    with client.messages.stream(**asked, thinking=THINK) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == "Let me see."
    whole = client.messages.create(**asked, thinking=THINK)
    for message in (final, whole):
        thought, said, weather, now = message.content
        assert (thought.type, thought.thinking) == ("thinking", "Hm.")
        assert (said.type, said.text) == ("text", "Let me see.")
        assert (weather.type, weather.name, weather.input) == (
            "tool_use",
            "weather",
            {"city": "Zürich"},
        )
        assert (now.name, now.input) == ("now", {})
        assert message.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_a_conversation_goes_on_with_what_was_called(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, CALLS)
    asked: Any = {"model": "fake", "max_tokens": 500, "tools": TOOLS}
    first = client.messages.create(**asked, messages=TALK)
    will_answer(tool_server, "It is sunny.")
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sunny"}
        for block in first.content
        if block.type == "tool_use"
    ]
    results[1] |= {"is_error": True, "content": [{"type": "text", "text": "none"}]}
    talk = [
        *TALK,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [*results, {"type": "text", "text": "And?"}]},
    ]
    second = client.messages.create(**asked, messages=talk)
    assert second.content[0].text == "It is sunny."
    assert prompt(tool_server).endswith(
        "<|user|>hi<|end|><|assistant|>Let me see.[weather city=Zürich][now]<|end|>"
        "<|tool|>sunny<|end|><|tool|>Error: none<|end|><|user|>And?<|end|><|assistant|>"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_the_stop_sequence_that_was_met_is_told(
    tool_server: Running, client: Any, stream: bool
) -> None:
    will_answer(tool_server, "one two three")
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": TALK}
    asked |= {"stop_sequences": ["never", " three", "two th"]}
    if stream:
        with client.messages.stream(**asked) as events:
            message = events.get_final_message()
    else:
        message = client.messages.create(**asked)
    assert message.content[0].text == "one "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "two th")


def test_an_answer_that_is_cut_off(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, CALLS)
    message = client.messages.create(model="fake", max_tokens=78, messages=TALK, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert list(message.content[1].input) == ["INVALID_JSON"]


def test_an_answer_goes_on_with_the_last_turn(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, " fine")
    talk = [*TALK, {"role": "assistant", "content": "It is"}]
    message = client.messages.create(model="fake", max_tokens=9, messages=talk)
    assert message.content[0].text == " fine"
    assert prompt(tool_server).endswith("<|assistant|>It is")


def test_tokens_are_counted_as_the_model_would_get_them(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, "x")
    asked: Any = {"model": "fake", "messages": TALK, "system": "s", "tools": TOOLS}
    counted = client.messages.count_tokens(**asked).input_tokens
    client.messages.create(**asked, max_tokens=5)
    assert counted == len(tool_server.head.submitted[-1][1])


def test_tools_are_chosen(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, CALLS)
    asked: Any = {"model": "fake", "max_tokens": 500, "messages": TALK, "tools": TOOLS}
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    message = client.messages.create(**asked, tool_choice=choice)
    assert [block.type for block in message.content] == ["text", "tool_use"]
    client.messages.create(**asked, tool_choice={"type": "none"})
    assert "weather" not in prompt(tool_server)
    will_answer(tool_server, '{"city": "Zürich"}')
    choice = {"type": "tool", "name": "weather"}
    (block,) = client.messages.create(**asked, tool_choice=choice).content
    assert (block.name, block.input) == ("weather", {"city": "Zürich"})
    will_answer(tool_server, '[{"name": "now", "parameters": {}}]')
    (block,) = client.messages.create(**asked, tool_choice={"type": "any"}).content
    assert (block.name, block.input) == ("now", {})
    assert tool_server.head.submitted[-1][2].structured_outputs is not None


def test_refusals_have_the_shape_of_this_api(
    tool_server: Running, closed_server: Running, client: Any
) -> None:
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(model="other", max_tokens=5, messages=TALK)
    assert error.value.body["error"]["type"] == "not_found_error"
    url = f"{tool_server.url}/v1/messages"
    least: dict[str, Any] = {"max_tokens": 5, "messages": TALK}
    for body, says in (
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"container": "c"}, "container"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "has no tool_use"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tool_choice": {"type": "tool", "name": "x"}, "tools": TOOLS}, "tool_choice"),
    ):
        refused = httpx.post(url, json=least | body)
        assert refused.status_code == 400, refused.text
        told = refused.json()
        assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
        assert says in told["error"]["message"]
    assert httpx.get(url).json()["type"] == "error"
    stranger = httpx.post(f"{closed_server.url}/v1/messages", json=least)
    assert (stranger.status_code, stranger.json()["error"]["type"]) == (
        401,
        "authentication_error",
    )
    known = anthropic.Anthropic(base_url=closed_server.url, api_key="key", max_retries=0)
    assert known.messages.create(model="fake", max_tokens=5, messages=TALK).content
    for path in ("/v1/models", "/cluster"):
        header = {"x-api-key": "control"}
        assert httpx.get(closed_server.url + path, headers=header).status_code == 401


def test_a_turn_without_anything(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, "x")
    empty: Any = [{"role": "user", "content": []}]
    client.messages.create(model="fake", max_tokens=5, messages=empty)
    assert prompt(tool_server) == "<|user|><|end|><|assistant|>"


def test_a_failure_in_the_middle_is_the_last_event(tool_server: Running, client: Any) -> None:
    tool_server.head.behaviour.fail_after = 3
    with (
        pytest.raises(anthropic.APIStatusError, match="rank 3 is gone"),
        client.messages.stream(model="fake", max_tokens=9, messages=TALK) as stream,
    ):
        list(stream)


def test_a_conversations_cache_control_changes_nothing(tool_server: Running, client: Any) -> None:
    will_answer(tool_server, "x")
    cached: Any = {"cache_control": {"type": "ephemeral"}}
    client.messages.create(
        model="fake",
        max_tokens=5,
        system=[{"type": "text", "text": "s", **cached}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "hi", **cached}]}],
    )
    assert prompt(tool_server) == "<|system|>s<|end|><|user|>hi<|end|><|assistant|>"
