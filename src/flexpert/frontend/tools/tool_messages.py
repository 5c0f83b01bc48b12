"""Messages of a conversation with tools, as chat templates want them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flexpert.errors import RequestError


def template_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Without fields that say nothing; arguments of calls as mappings, where clients send JSON
    text; reasoning by both of its names.

    Raises: RequestError: arguments are no JSON object.
    """
    found = {key: value for key, value in message.items() if value is not None or key == "content"}
    if found.get("content") is None:
        found["content"] = ""
    calls = found.get("tool_calls")
    if isinstance(calls, list):
        if calls:
            found["tool_calls"] = [_call(call) for call in calls]
        else:
            del found["tool_calls"]  # templates ask whether there are any by whether it is there
    for one, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if isinstance(found.get(one), str):
            found.setdefault(other, found[one])
    return found


def with_text_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same with the arguments of calls as JSON text, which some templates want (DeepSeek's)."""
    found = []
    for message in messages:
        if isinstance(calls := message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_text_call(call) for call in calls]}
        found.append(dict(message))
    return found


def _text_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _call(call: object) -> object:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RequestError(
            "messages: each of tool_calls is {'id', 'type': 'function', 'function': {'name', "
            "'arguments'}}",
            "messages",
        )
    function = dict(call["function"])
    written = function.get("arguments")
    if written is None or written == "":
        function["arguments"] = {}
    elif isinstance(written, str):
        function["arguments"] = _mapping(written, function.get("name"))
    return {**call, "function": function}


def _mapping(written: str, name: object) -> dict[str, Any]:
    try:
        value = json.loads(written)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(
            f"messages: the arguments of the call of {str(name)[:80]!r} are not a JSON object; "
            "send the text as the model wrote it, or leave the call out if that was broken",
            "messages",
        )
    return value
