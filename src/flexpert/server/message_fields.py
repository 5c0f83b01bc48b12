"""The body of `POST /v1/messages`, Anthropic's, and the chat that it stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from flexpert.errors import RequestError
from flexpert.server.tool_fields import MOST_TOOLS, counted
from flexpert.server.translated_fields import (
    MOST_ITEMS,
    OPEN,
    AlsoServed,
    ChatBody,
    Exact,
    add_call,
    add_piece,
    add_reasoning,
)


class _Cached(Exact):
    # where a prefix is to be cached: all of them are, if there is room
    cache_control: dict[str, Any] | None = None


class TextBlock(_Cached):
    """A piece of text."""

    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ToolUseBlock(_Cached):
    """A call that the model has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ToolResultBlock(_Cached):
    """What a call has come to."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[TextBlock], counted(MOST_ITEMS)] | None = None
    is_error: bool | None = None


class ThinkingBlock(Exact):
    """What the model thought. signature: not checked, all of it came from the client."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


ContentBlock = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")
]


class MessageTurn(Exact):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], counted(MOST_ITEMS)]


class MessageTool(_Cached):
    """A function that may be called."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class MessageToolChoice(Exact):
    """What has to be called. name: with "tool"."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingOptions(Exact):
    """Whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class MessageMetadata(Exact):
    """Who asks."""

    user_id: str | None = None


class CountTokensRequest(BaseModel):
    """`POST /v1/messages/count_tokens`."""

    model_config = OPEN

    model: Annotated[str, counted(512)] | None = None
    messages: Annotated[list[MessageTurn], counted(MOST_ITEMS)] = Field(min_length=1)
    system: str | Annotated[list[TextBlock], counted(MOST_ITEMS)] | None = None
    tools: Annotated[list[MessageTool], counted(MOST_TOOLS)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: ThinkingOptions | None = None
    cache_control: dict[str, Any] | None = None

    def chat_body(self, *, switch: bool) -> ChatBody:
        """The chat it stands for. switch: the chat template knows `enable_thinking`."""
        body: ChatBody = {
            "messages": self._messages(),
            "tools": [_tool(t) for t in self.tools or ()],
        }
        if self.model is not None:
            body["model"] = self.model
        if body["messages"][-1]["role"] == "assistant":  # the answer goes on with it
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if self.tool_choice is not None:
            body["tool_choice"] = _choice(self.tool_choice)
            body["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        thinks = self.thinking is not None and self.thinking.type != "disabled"
        hidden = self.thinking is not None and self.thinking.display == "omitted"
        body["include_reasoning"] = thinks and not hidden
        if switch:
            body["chat_template_kwargs"] = {"enable_thinking": thinks}
        return body

    def _messages(self) -> list[ChatBody]:
        found: list[ChatBody] = []
        if self.system:
            add_piece(found, "system", _text(self.system))
        for turn in self.messages:
            if isinstance(turn.content, str):
                add_piece(found, turn.role, turn.content)
            else:
                _add(found, turn.role, turn.content)
        return found


class MessagesRequest(CountTokensRequest, AlsoServed):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[str], counted(16)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Any = None
    service_tier: Literal["auto", "standard_only"] | None = None
    metadata: MessageMetadata | None = None

    def chat_body(self, *, switch: bool) -> ChatBody:
        """The chat it stands for. switch: the chat template knows `enable_thinking`."""
        body = super().chat_body(switch=switch)
        body |= {"max_tokens": self.max_tokens}
        own = body.get("chat_template_kwargs", {})
        body |= self.also
        if own:
            body["chat_template_kwargs"] = own | (self.chat_template_kwargs or {})
        for name in ("stream", "temperature", "top_p", "top_k"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        if self.stop_sequences:
            # shown, so that it can be told which one was met
            body |= {"stop": self.stop_sequences, "include_stop_str_in_output": True}
        return body


_ROLES: Mapping[type, tuple[str, ...]] = {
    TextBlock: ("user", "assistant", "system"),
    ToolUseBlock: ("assistant",),
    ThinkingBlock: ("assistant",),
    ToolResultBlock: ("user",),
}

CHAT_NAMES = {"stop": "stop_sequences"}
"""Field of a chat → the one here that it came from."""


def _add(messages: list[ChatBody], role: str, blocks: list[Any]) -> None:
    """A turn of blocks; results of calls are messages of their own, and come first.

    Raises: RequestError: it has what the other's turns have.
    """
    texts = []
    for block in blocks:
        if role not in _ROLES[type(block)]:
            raise RequestError(f"messages: a turn of the {role} has no {block.type}", "messages")
        match block:
            case TextBlock() if role == "assistant":
                add_piece(messages, role, block.text, glue="")
            case TextBlock():
                texts.append(block.text)
            case ToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False)
                add_call(messages, block.id, block.name, arguments)
            case ThinkingBlock():
                add_reasoning(messages, block.thinking)
            case ToolResultBlock():
                text = _text(block.content or "")
                content = f"Error: {text}" if block.is_error else text
                messages.append(
                    {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
                )
    if texts or not blocks:
        messages.append({"role": role, "content": "".join(texts)})


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _tool(tool: MessageTool) -> ChatBody:
    function: ChatBody = {"name": tool.name, "parameters": tool.input_schema}
    for name in ("description", "strict"):
        if (value := getattr(tool, name)) is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _choice(choice: MessageToolChoice) -> object:
    match choice.type:
        case "tool":
            return {"type": "function", "function": {"name": choice.name}}
        case "any":
            return "required"
        case kind:
            return kind
