"""`/v1/responses`, seen through OpenAI's own client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from support.served_head import Running
from test_tools import CALLS, prompt, will_answer

from flexpert.server.http_errors import ApiError
from flexpert.server.stored_responses import StoredResponse, StoredResponses

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
    {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False},
]


@pytest.fixture
def client(tool_server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tool_server.url}/v1", api_key="any", max_retries=0)


def test_a_text(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, "It is fine.")
    response = client.responses.create(
        model="fake",
        input="hi",
        instructions="Be kind.",
        max_output_tokens=50,
        temperature=0.5,
        metadata={"a": "b"},
    )
    assert response.output_text == "It is fine."
    assert (response.status, response.error, response.object) == ("completed", None, "response")
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert response.max_output_tokens == 50
    assert response.usage is not None
    assert response.usage.output_tokens == len("It is fine.") + 1
    assert prompt(tool_server) == "<|system|>Be kind.<|end|><|user|>hi<|end|><|assistant|>"
    assert tool_server.head.submitted[-1][2].temperature == 0.5


def test_an_answer_that_is_cut_off_is_incomplete(
    tool_server: Running, client: openai.OpenAI
) -> None:
    will_answer(tool_server, "It is fine.")
    response = client.responses.create(model="fake", input="hi", max_output_tokens=4)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    message = response.output[0]
    assert message.type == "message"
    assert message.status == "incomplete"


@pytest.mark.parametrize("per_delta", [1, 400])
def test_events_of_a_stream_put_together_are_the_response(
    tool_server: Running, client: openai.OpenAI, per_delta: int
) -> None:
    will_answer(tool_server, f"<think>Hm.</think>{CALLS}", per_delta=per_delta)
    with client.responses.stream(model="fake", input="hi", tools=TOOLS) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == 4
    assert kinds.count("response.output_item.done") == 4
    reasoning, message, weather, now = final.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Hm."
    assert message.type == "message"
    assert final.output_text == "Let me see."
    assert (weather.type, now.type) == ("function_call", "function_call")
    assert json.loads(weather.arguments) == {"city": "Zürich"}
    assert now.arguments == "{}"
    assert len({item.id for item in final.output}) == 4
    assert final.usage is not None
    assert final.usage.output_tokens_details.reasoning_tokens > 0
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == "Let me see."
    whole = client.responses.create(model="fake", input="hi", tools=TOOLS)
    shown = [item.model_dump(exclude={"id", "call_id"}) for item in whole.output]
    streamed = [
        item.model_dump(exclude={"id", "call_id", "parsed_arguments"}) for item in final.output
    ]
    for item in streamed:
        for part in item.get("content") or ():
            part.pop("parsed", None)
    assert streamed == shown


def test_a_conversation_goes_on_with_what_was_called(
    tool_server: Running, client: openai.OpenAI
) -> None:
    """Once stateless, with all of it as input, and once by the earlier response's id."""
    will_answer(tool_server, f"<think>Hm.</think>{CALLS}")
    first = client.responses.create(model="fake", input="hi", tools=TOOLS)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    will_answer(tool_server, "It is sunny.")
    talk: Any = [{"role": "user", "content": "hi"}, *first.output, *results]
    second = client.responses.create(model="fake", input=talk, tools=TOOLS)
    assert second.output_text == "It is sunny."
    stateless = prompt(tool_server)
    assert "<|assistant|>Let me see.[weather city=Zürich][now]<|end|><|tool|>sunny" in stateless
    client.responses.create(model="fake", input=results, tools=TOOLS, previous_response_id=first.id)
    assert prompt(tool_server) == stateless


def test_responses_are_kept_unless_they_are_not_to_be(
    tool_server: Running, client: openai.OpenAI
) -> None:
    will_answer(tool_server, "one")
    kept = client.responses.create(model="fake", input="hi")
    assert client.responses.retrieve(kept.id).output_text == "one"
    streamed = list(client.responses.create(model="fake", input="hi", stream=True))[-1]
    assert streamed.type == "response.completed"
    assert client.responses.retrieve(streamed.response.id).output_text == "one"
    client.responses.delete(kept.id)
    gone = client.responses.create(model="fake", input="hi", store=False)
    for id in (kept.id, gone.id, "resp_none"):
        with pytest.raises(openai.NotFoundError) as error:
            client.responses.retrieve(id)
        assert error.value.code == "response_not_found"
        with pytest.raises(openai.NotFoundError) as error:
            client.responses.create(model="fake", input="hi", previous_response_id=id)
        assert error.value.param == "previous_response_id"


def test_instructions_are_of_one_response_alone(
    tool_server: Running, client: openai.OpenAI
) -> None:
    will_answer(tool_server, "one")
    first = client.responses.create(model="fake", input="hi", instructions="A.")
    client.responses.create(
        model="fake", input="ho", instructions="B.", previous_response_id=first.id
    )
    assert prompt(tool_server) == (
        "<|system|>B.<|end|><|user|>hi<|end|><|assistant|>one<|end|><|user|>ho<|end|><|assistant|>"
    )
    talk: Any = [{"role": "developer", "content": "B."}, {"role": "user", "content": "hi"}]
    client.responses.create(model="fake", input=talk, instructions="A.")
    assert prompt(tool_server).startswith("<|system|>A.\n\nB.<|end|><|user|>hi")


def test_what_is_stored_is_bounded_and_the_oldest_makes_room() -> None:
    stored = StoredResponses(most=10)
    stored.put("a", StoredResponse(b"1234", b""))
    stored.put("b", StoredResponse(b"12", b"34"))
    stored.get("a")
    stored.put("c", StoredResponse(b"1234", b""))
    assert stored.get("a").body == b"1234"
    with pytest.raises(ApiError, match="there is no response 'b'"):
        stored.get("b")
    stored.put("d", StoredResponse(b"x" * 11, b""))
    assert stored.get("c").body == b"1234"


def test_an_answer_of_a_structure_is_parsed(tool_server: Running, client: openai.OpenAI) -> None:
    import pydantic

    class Weather(pydantic.BaseModel):
        city: str

    will_answer(tool_server, '{"city": "Zürich"}')
    response = client.responses.parse(model="fake", input="hi", text_format=Weather)
    assert response.output_parsed == Weather(city="Zürich")
    structure = tool_server.head.submitted[-1][2].structured_outputs
    assert structure is not None
    assert "city" in str(structure.grammar)


def test_what_has_to_be_called_is_enforced(tool_server: Running, client: openai.OpenAI) -> None:
    will_answer(tool_server, '[{"name": "now", "parameters": {}}]')
    asked: Any = {"model": "fake", "input": "hi", "tools": TOOLS}
    (call,) = client.responses.create(**asked, tool_choice="required").output
    assert (call.type, call.name) == ("function_call", "now")
    will_answer(tool_server, '{"city": "Zürich"}')
    named: Any = {"type": "function", "name": "weather"}
    response = client.responses.create(**asked, tool_choice=named)
    (call,) = response.output
    assert (call.type, call.name, call.arguments) == (
        "function_call",
        "weather",
        '{"city": "Zürich"}',
    )
    assert tool_server.head.submitted[-1][2].structured_outputs is not None


def test_a_failure_in_the_middle_is_the_last_event(
    tool_server: Running, client: openai.OpenAI
) -> None:
    tool_server.head.behaviour.fail_after = 3
    events = list(client.responses.create(model="fake", input="hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert events[-1].response.error.message == "rank 3 is gone"
    with pytest.raises(openai.InternalServerError, match="rank 3 is gone"):
        client.responses.create(model="fake", input="hi")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"conversation": "c"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"reasoning": {"summary": "auto"}}, "reasoning"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"max_output_tokens": 5000}, None),
        ({"stop": ["" for _ in range(20)]}, "stop"),
    ],
)
def test_what_is_not_served_is_refused_by_the_name_it_was_sent_with(
    tool_server: Running, body: dict[str, Any], param: str | None
) -> None:
    refused = httpx.post(f"{tool_server.url}/v1/responses", json={"input": "hi"} | body)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == param
