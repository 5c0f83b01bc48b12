"""The body of `POST /v1/responses`, and the chat that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

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

_LONGEST_ID = 256  # characters


class TextPart(Exact):
    """A piece of text."""

    type: Literal["input_text", "output_text", "reasoning_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


TextParts = Annotated[list[TextPart], counted(MOST_ITEMS)]


class InputMessage(Exact):
    """A turn."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | TextParts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Exact):
    """A call that the model has made. arguments: JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Exact):
    """What a call has come to."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | TextParts
    id: str | None = None
    status: str | None = None


class InputReasoning(Exact):
    """What the model thought."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    content: TextParts | None = None
    status: str | None = None


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class ResponseTool(Exact):
    """A function that may be called."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseNamedTool(Exact):
    """A function by its name."""

    type: Literal["function"]
    name: str


class ResponseAllowedTools(Exact):
    """Some of the tools, and whether one of them has to be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ResponseNamedTool], counted(MOST_TOOLS)]


class ReasoningOptions(Exact):
    """effort: as the chat template knows it."""

    effort: str | None = None


class TextFormat(BaseModel):
    """OpenAI's `response_format`, less nested."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @property
    def response_format(self) -> ChatBody:
        """As a chat has it."""
        if self.type != "json_schema":
            return {"type": self.type}
        inner = self.model_dump(by_alias=True, exclude_none=True, exclude={"type"})
        return {"type": self.type, "json_schema": inner}


class TextOptions(Exact):
    """What the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponseStreamOptions(Exact):
    """OpenAI's padding of events, which are never padded here."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(AlsoServed):
    """`POST /v1/responses`."""

    model_config = OPEN

    model: Annotated[str, counted(512)] | None = None
    input: str | Annotated[list[InputItem], counted(MOST_ITEMS)]
    instructions: str | None = None
    previous_response_id: Annotated[str, counted(_LONGEST_ID)] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Any = None
    tools: Annotated[list[ResponseTool], counted(MOST_TOOLS)] | None = None
    tool_choice: (
        Literal["none", "auto", "required"] | ResponseNamedTool | ResponseAllowedTools | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[str, str], counted(16)] | None = None
    background: Literal[False] | None = None
    include: Annotated[list[Any], Field(max_length=0)] | None = None
    top_logprobs: Literal[0] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # By their definition these do not change an answer.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def messages(self) -> list[ChatBody]:
        """The input as messages of a chat.

        Raises: RequestError: there is none.
        """
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        found: list[ChatBody] = []
        for item in self.input:
            _add(found, item)
        if not found:
            raise RequestError("input must not be empty", "input")
        return found

    def chat_body(self, messages: list[ChatBody]) -> ChatBody:
        """The chat it stands for. messages: all, those before `input` included."""
        talk: list[ChatBody] = []
        if self.instructions:
            talk.append({"role": "system", "content": self.instructions})
            if messages[0]["role"] == "system":  # templates know one, in the first place
                add_piece(talk, "system", messages[0]["content"])
                messages = messages[1:]
        body: ChatBody = {"messages": [*talk, *messages], **self.also}
        body["max_completion_tokens"] = self.max_output_tokens
        for name in ("model", "stream", "temperature", "top_p", "top_k", "parallel_tool_calls"):
            body[name] = getattr(self, name)
        body["tools"] = [_tool(tool) for tool in self.tools or ()]
        body["tool_choice"] = _choice(self.tool_choice)
        body["reasoning_effort"] = self.reasoning.effort if self.reasoning else None
        if self.text and self.text.format:
            body["response_format"] = self.text.format.response_format
        return {name: value for name, value in body.items() if value is not None}

    def echo(self) -> ChatBody:
        """What of the request stands in the response."""
        tools = [
            {"parameters": None, "strict": False, **tool.model_dump(exclude_none=True)}
            for tool in self.tools or ()
        ]
        choice = self.tool_choice
        shown = choice.model_dump() if isinstance(choice, BaseModel) else choice or "auto"
        text = self.text.format if self.text else None
        return {
            "instructions": self.instructions,
            "metadata": self.metadata or {},
            "previous_response_id": self.previous_response_id,
            "max_output_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": tools,
            "tool_choice": shown,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None},
            "text": {
                "format": text.model_dump(by_alias=True, exclude_none=True)
                if text
                else {"type": "text"}
            },
            "truncation": "disabled",
            "background": False,
            "store": self.store is not False,
            "service_tier": "default",
            "user": self.user,
        }


CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}
"""Field of a chat → the one here that it came from."""


def _add(messages: list[ChatBody], item: Any) -> None:
    match item:
        case InputMessage():
            role = "system" if item.role == "developer" else item.role
            add_piece(messages, role, _text(item.content))
        case InputCall():
            add_call(messages, item.call_id, item.name, item.arguments)
        case InputCallOutput():
            content = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        case InputReasoning() if item.content:
            add_reasoning(messages, _text(item.content))


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool(tool: ResponseTool) -> ChatBody:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _choice(choice: object) -> object:
    match choice:
        case ResponseNamedTool():
            return {"type": "function", "function": {"name": choice.name}}
        case ResponseAllowedTools():
            tools = [{"type": "function", "function": {"name": one.name}} for one in choice.tools]
            allowed = {"mode": choice.mode, "tools": tools}
            return {"type": "allowed_tools", "allowed_tools": allowed}
        case _:
            return choice
