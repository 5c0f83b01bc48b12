"""Tools as langchain's ChatOpenAI binds them."""

from __future__ import annotations

from typing import Any

import pytest
from support.served_head import Running
from test_tools import CALLS, TOOLS, prompt, will_answer

langchain = pytest.importorskip("langchain_openai")


def model(server: Running, **more: Any) -> Any:
    return langchain.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="any", model="fake", max_retries=0, **more
    )


@pytest.mark.parametrize("responses", [False, True])
def test_bound_tools_are_called(tool_server: Running, responses: bool) -> None:
    will_answer(tool_server, CALLS, per_delta=3)
    bound = model(tool_server, use_responses_api=responses).bind_tools(TOOLS)
    streamed = None
    for chunk in bound.stream("hi"):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (bound.invoke("hi"), streamed):
        assert message is not None
        assert [(call["name"], call["args"]) for call in message.tool_calls] == [
            ("weather", {"city": "Zürich"}),
            ("now", {}),
        ]
        assert message.text == "Let me see."


def test_a_conversation_goes_on_with_results(tool_server: Running) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    will_answer(tool_server, CALLS)
    bound = model(tool_server).bind_tools(TOOLS)
    called = bound.invoke("hi")
    will_answer(tool_server, "It is sunny.")
    results = [ToolMessage("sunny", tool_call_id=call["id"]) for call in called.tool_calls]
    answer = bound.invoke([HumanMessage("hi"), called, *results])
    assert answer.content == "It is sunny."
    assert "[weather city=Zürich][now]<|end|><|tool|>sunny" in prompt(tool_server)


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_structured_output_in_its_three_methods(tool_server: Running, method: str) -> None:
    from pydantic import BaseModel

    class Weather(BaseModel):
        """The weather of a city."""

        city: str

    will_answer(tool_server, '{"city": "Zürich"}')
    structured = model(tool_server).with_structured_output(Weather, method=method)
    assert structured.invoke("hi, answer in JSON") == Weather(city="Zürich")
    assert tool_server.head.submitted[-1][2].structured_outputs is not None
