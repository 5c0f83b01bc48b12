"""Bodies we send: OpenAI's objects as structs, which encode in about a microsecond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
from starlette.responses import Response

from flexpert.cluster.views import ServiceState
from flexpert.frontend.generation import Usage
from flexpert.frontend.logprobs import ChatLogprobs, CompletionLogprobs, PromptLogprobs

TokenIds = Sequence[int] | msgspec.UnsetType  # set if asked for
encode = msgspec.json.Encoder().encode


def json_response(
    body: Any, status: int = 200, *, headers: Mapping[str, str] | None = None
) -> Response:
    """A struct, or what is made of structs, as an answer."""
    return Response(encode(body), status, headers=headers, media_type="application/json")


class TextChoice(msgspec.Struct):
    """A choice of a completion, whole or one chunk's share of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: TokenIds = msgspec.UNSET
    prompt_token_ids: TokenIds = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Remark(msgspec.Struct, omit_defaults=True):
    """What flexpert adds to an answer. degraded: some experts were missing, see docs/http.md."""

    degraded: bool = False


class TextCompletion(msgspec.Struct):
    """`/v1/completions`, whole and chunk alike; usage is left out of chunks unless asked for."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "text_completion"
    flexpert: Remark | msgspec.UnsetType = msgspec.UNSET


class CalledFunction(msgspec.Struct):
    """arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call, whole."""

    id: str
    function: CalledFunction
    type: str = "function"


class FunctionDelta(msgspec.Struct, omit_defaults=True):
    """name: in a call's first delta. arguments: a piece of JSON text."""

    arguments: str | None = None
    name: str | None = None


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """What a call grows by; id and type only in its first."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct):
    """The answer of a chat. Reasoning has two names: vLLM's older and its newer one."""

    content: str | None
    role: str = "assistant"
    refusal: str | None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct):
    """One whole answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatCompletion(msgspec.Struct):
    """`/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"
    prompt_token_ids: TokenIds = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    flexpert: Remark | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, omit_defaults=True):
    """What a chunk adds; role only in a choice's first."""

    role: str | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(msgspec.Struct):
    """One choice's share of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: TokenIds = msgspec.UNSET


class ChatChunk(msgspec.Struct):
    """One event of a streamed chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    object: str = "chat.completion.chunk"
    prompt_token_ids: TokenIds = msgspec.UNSET
    flexpert: Remark | msgspec.UnsetType = msgspec.UNSET


class Model(msgspec.Struct):
    """`/v1/models/{id}`."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: str = "model"
    owned_by: str = "flexpert"


class ModelList(msgspec.Struct):
    """`/v1/models`."""

    data: list[Model]
    object: str = "list"


class Health(msgspec.Struct):
    """`/health`. live: the service may yet recover by itself; ready: requests are answered now."""

    status: Literal["ok", "unavailable"]
    live: bool
    ready: bool
    reason: str | None
    state: ServiceState


class ServerLoad(msgspec.Struct):
    """`/load`, vLLM's. server_load: API requests being answered."""

    server_load: int


class Version(msgspec.Struct):
    """`/version`."""

    version: str


class ScaleMessage(msgspec.Struct):
    """vLLM's `/scale_elastic_ep`."""

    message: str


class ScaleState(msgspec.Struct):
    """`/is_scaling_elastic_ep`, of vLLM and SGLang.

    Of the change that runs, else of the latest that somebody asked for: phase ("idle": there was
    none), error, operation_id, and requested_size in ranks. epoch and effective_ep_size are of the
    service as it is. pending_ep_size and last_error are SGLang's names: the size that a running
    change leads to, and error.
    """

    is_scaling_elastic_ep: bool
    phase: str
    epoch: int
    error: str | None
    requested_size: int | None
    operation_id: str | None
    effective_ep_size: int
    pending_ep_size: int | None
    last_error: str | None


class Tokens(msgspec.Struct):
    """`/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]


class InputTokens(msgspec.Struct):
    """`/v1/messages/count_tokens`."""

    input_tokens: int


class Text(msgspec.Struct):
    """`/detokenize`."""

    prompt: str
