"""No field of `/v1/responses` and `/v1/messages` is dropped: it is served, or refused by name."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from support.served_head import Running

from flexpert.server.fields import REFUSED
from flexpert.server.message_fields import CountTokensRequest, MessagesRequest
from flexpert.server.response_fields import ResponsesRequest
from flexpert.server.schemas import ChatRequest

TALK = [{"role": "user", "content": "hi"}]
ENDPOINTS: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/responses": (ResponsesRequest, {"input": "hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"messages": TALK, "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"messages": TALK}),
}
OF_OTHERS = {name for schema, _ in ENDPOINTS.values() for name in schema.model_fields}
OF_OTHERS |= set(ChatRequest.model_fields)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_not_served_is_refused_by_name(tool_server: Running, path: str) -> None:
    schema, least = ENDPOINTS[path]
    names = (OF_OTHERS | set(REFUSED) | {"no_such_field"}) - set(schema.model_fields)
    with httpx.Client(base_url=tool_server.url) as client:
        for name in sorted(names):
            refused = client.post(path, json={**least, name: ["something"]})
            assert refused.status_code == 400, name
            assert name in refused.json()["error"]["message"]
            assert client.post(path, json={**least, name: None}).status_code == 200, name
    assert not tool_server.head.running


PASSED_ON: dict[str, tuple[Any, str, Any]] = {
    "temperature": (0.5, "temperature", 0.5),
    "top_p": (0.5, "top_p", 0.5),
    "top_k": (7, "top_k", 7),
    "seed": (7, "seed", 7),
    "min_p": (0.25, "min_p", 0.25),
    "min_tokens": (1, "min_tokens", 1),
    "ignore_eos": (True, "ignore_eos", True),
    "stop": ("end", "stop", ("end",)),
    "stop_token_ids": ([5], "stop_token_ids", (5,)),
    "presence_penalty": (0.5, "presence_penalty", 0.5),
    "frequency_penalty": (0.5, "frequency_penalty", 0.5),
    "repetition_penalty": (1.5, "repetition_penalty", 1.5),
    "cache_salt": ("mine", "cache_salt", "mine"),
}


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("field", PASSED_ON)
def test_settings_of_sampling_reach_the_engine(tool_server: Running, path: str, field: str) -> None:
    sent, name, expected = PASSED_ON[field]
    answered = httpx.post(tool_server.url + path, json={**ENDPOINTS[path][1], field: sent})
    assert answered.status_code == 200, answered.text
    assert getattr(tool_server.head.submitted[-1][2], name) == expected


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_the_template_gets_what_it_knows(tool_server: Running, path: str) -> None:
    def prompt(**more: Any) -> str:
        answered = httpx.post(tool_server.url + path, json=ENDPOINTS[path][1] | more)
        assert answered.status_code == 200, answered.text
        return str(tool_server.head.tokenizer.decode(tool_server.head.submitted[-1][1]))

    assert prompt(chat_template_kwargs={"think": True}).endswith("<|assistant|><think>")
    assert prompt(priority=0) == "<|user|>hi<|end|><|assistant|>"
    unknown = {"chat_template_kwargs": {"thinkk": True}}
    refused = httpx.post(tool_server.url + path, json=ENDPOINTS[path][1] | unknown)
    assert refused.status_code == 400
