"""The fields that ask for structured output: what reaches the head, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.served_head import Running

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
TAG = {
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f>"],
}


def post(server: Running, chat: bool, **fields: Any) -> httpx.Response:
    if chat:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, **fields}
        return httpx.post(f"{server.url}/v1/chat/completions", json=body)
    return httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", **fields})


def grammar(server: Running) -> str | None:
    """What the head was given for the latest request."""
    structure = server.head.submitted[-1][2].structured_outputs
    return None if structure is None else structure.grammar


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("fields", "contained"),
    [
        ({"response_format": {"type": "json_object"}}, '"type":"object"'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": SCHEMA, "strict": True},
                }
            },
            '"required":["name"]',
        ),
        ({"response_format": {"type": "structural_tag", **TAG}}, "<f>"),
        ({"structured_outputs": {"json": SCHEMA}}, '"required":["name"]'),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '"required":["name"]'),
        ({"structured_outputs": {"json_object": True}}, '"type":"object"'),
        ({"structured_outputs": {"regex": "[a-f]+"}}, "[a-f]+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, 'yes\\" | \\"no'),
        ({"structured_outputs": {"grammar": 'root ::= "zzz"'}}, "zzz"),
        ({"structured_outputs": {"structural_tag": json.dumps(TAG)}}, "<f>"),
        ({"guided_json": SCHEMA}, '"required":["name"]'),
        ({"guided_regex": "[a-f]+"}, "[a-f]+"),
        ({"guided_choice": ["yes", "no"]}, 'yes\\" | \\"no'),
        ({"guided_grammar": 'root ::= "zzz"'}, "zzz"),
    ],
)
def test_every_way_of_asking_reaches_the_head(
    server: Running, chat: bool, fields: dict[str, Any], contained: str
) -> None:
    assert post(server, chat, **fields).status_code == 200
    assert contained in (grammar(server) or "")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": None, "structured_outputs": None, "guided_json": None},
        {"response_format": {"type": "text"}},
    ],
)
def test_nothing_is_asked_for_by_nothing(server: Running, fields: dict[str, Any]) -> None:
    assert post(server, True, **fields).status_code == 200
    assert grammar(server) is None


UNIQUE = {"type": "array", "uniqueItems": True}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_json": UNIQUE}, "guided_json", "'uniqueItems' is not supported"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": UNIQUE}}},
        "response_format.json_schema.schema",
        "'uniqueItems' is not supported",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format.json_schema.schema",
        "is missing",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format", "'json_schema'"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"colour": 1}}, "structured_outputs", "colour"),
    ({"response_format": {"type": "text", "colour": 1}}, "response_format.colour", "colour"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "colour": 1}}},
        "response_format.json_schema.colour",
        "colour",
    ),
    ({"guided_choice": []}, "guided_choice", "not empty"),
    ({"guided_grammar": "root ::= other"}, "guided_grammar", "other"),
    ({"guided_regex": "a" * 300_000}, "guided_regex", "300000 characters"),
    (
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
        "guided_regex",
        "response_format and guided_regex cannot be combined",
    ),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "structured output"),
    ({"guided_regex": "a", "min_tokens": 1}, "min_tokens", "structured output"),
]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("fields", "param", "told"), REFUSED)
def test_what_cannot_be_served_is_refused_by_name(
    server: Running, chat: bool, fields: dict[str, Any], param: str, told: str
) -> None:
    refused = post(server, chat, **fields)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == param
    assert told in error["message"]
    assert server.head.submitted == []


def test_a_schema_that_is_nested_without_end_is_refused(server: Running) -> None:
    depth = 5000
    schema = '{"type":"array","items":' * depth + "{}" + "}" * depth
    body = '{"prompt":"x","guided_json":' + schema + "}"
    refused = httpx.post(
        f"{server.url}/v1/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert refused.status_code == 400
