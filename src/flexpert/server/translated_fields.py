"""What the bodies of `/v1/responses` and `/v1/messages` share: both become a chat."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

MOST_ITEMS = 16_384
# Unknown fields are kept, so that `fields` finds and refuses them.
OPEN = ConfigDict(
    extra="allow", allow_inf_nan=False, json_schema_extra={"additionalProperties": False}
)
ChatBody = dict[str, Any]
"""A body of `/v1/chat/completions`."""


class Exact(BaseModel):
    """A part of a body: nothing else may be there, but for null."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: one for key, one in value.items() if one is not None}
        return value


class AlsoServed(BaseModel):
    """vLLM's settings, which a chat has; it checks them."""

    seed: Any = None
    stop: Any = None
    min_p: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    chat_template_kwargs: Any = None
    cache_salt: Any = None
    priority: Any = None

    @property
    def also(self) -> ChatBody:
        """Those that are given."""
        names = AlsoServed.model_fields
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def add_piece(messages: list[ChatBody], role: str, text: str, *, glue: str = "\n\n") -> None:
    """A message; neighbouring pieces of the assistant, and of the system, become one."""
    last = messages[-1] if messages else {}
    if last.get("role") != role or role not in ("assistant", "system"):
        messages.append({"role": role, "content": text})
    elif last["content"] and text:
        last["content"] += glue + text
    else:
        last["content"] += text


def add_call(messages: list[ChatBody], id: str, name: str, arguments: str) -> None:
    """A call of the assistant's."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": name, "arguments": arguments}
    calls = messages[-1].setdefault("tool_calls", [])
    calls.append({"id": id, "type": "function", "function": function})


def add_reasoning(messages: list[ChatBody], text: str) -> None:
    """What the assistant thought; a turn of its own begins with it."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not last["content"] and "tool_calls" not in last:
        last["reasoning_content"] = last.get("reasoning_content", "") + text
    else:
        messages.append({"role": "assistant", "content": "", "reasoning_content": text})
