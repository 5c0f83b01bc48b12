"""A request's body → what the engine needs of it, or why it is refused (pure).

All that takes time in proportion to what a client sends happens here: parsing, checking, chat
templates, tokenising. It runs in a process of its own (`preprocess_worker`), never in the head.
What bytes and counts already tell is refused before anything costly is done.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, TypeVar, get_args

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.responses import Response

from flexpert.engine.request import SamplingParams
from flexpert.errors import FlexpertError, RequestError
from flexpert.forking.framing import Piece
from flexpert.frontend.request_limits import (
    RequestLimits,
    check_params,
    encode_prompts,
    token_outside,
    with_bad_tokens,
)
from flexpert.frontend.text import ChatOptions, TokenText
from flexpert.frontend.tools.tool_choice import Dialog, opened
from flexpert.frontend.tools.tool_messages import template_message, with_text_arguments
from flexpert.server import message_fields, response_fields, wire
from flexpert.server.enforcement import enforced, without_reasoning
from flexpert.server.fields import check_fields, header
from flexpert.server.http_errors import (
    ApiError,
    api_error,
    renamed,
    unknown_model,
    validation_error,
)
from flexpert.server.message_fields import CountTokensRequest, MessagesRequest
from flexpert.server.response_fields import ResponsesRequest
from flexpert.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Shown,
    TokenizeRequest,
)
from flexpert.server.translated_fields import ChatBody

log = logging.getLogger("flexpert.server")

Body = TypeVar("Body", bound=BaseModel)
Kind = Literal[
    "completions",
    "chat",
    "tokenize",
    "detokenize",
    "responses",
    "continued_responses",
    "messages",
    "count_tokens",
]
_KIND_NAMES: dict[bytes, Kind] = {kind.encode(): kind for kind in get_args(Kind)}


class Spec(msgspec.Struct, frozen=True):
    """What a worker is started with. niceness: as `nice` takes it."""

    limits: RequestLimits
    niceness: int


class Translated(msgspec.Struct, frozen=True):
    """What the answer to a response or a message needs of its request.

    echo: JSON of the request's fields that stand in the response. history: JSON of all its
    messages. keep: it may be asked for later, and gone on with.
    """

    echo: bytes = b""
    history: bytes = b""
    keep: bool = False


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Sequences to run.

    prompts: token ids, int32. echoes: texts of the prompts, if asked for. without_answer: the
    prompt is all that is asked for. request_id: the client's, or "". ignored: fields that were
    passed over. dialog: how answers are read; None: they are content. translated: of a request that
    is no chat, but is answered as one.
    """

    prompts: list[bytes]
    params: SamplingParams
    stream: bool
    shown: Shown
    echoes: list[str] = []
    without_answer: bool = False
    dialog: Dialog | None = None
    translated: Translated | None = None
    request_id: str = ""
    ignored: list[str] = []

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [unpacked(prompt) for prompt in self.prompts]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """A whole answer, in JSON: a million tokens take the head no time. ignored: see `Generate`."""

    json: bytes
    ignored: list[str] = []

    def response(self) -> Response:
        return Response(self.json, headers=header(self.ignored), media_type="application/json")


class Continues(msgspec.Struct, frozen=True, tag="continues"):
    """It goes on with an earlier response, which the head has: the same body is to be sent as
    "continued_responses" behind that one's history and a line break."""

    previous: str


class RefusedBody(msgspec.Struct, frozen=True, tag="refused"):
    """An `ApiError`."""

    status: int
    message: str
    error_type: str
    param: str | None
    code: str | None

    @property
    def error(self) -> ApiError:
        return ApiError(
            self.status, self.message, type=self.error_type, param=self.param, code=self.code
        )


Outcome = Generate | Rendered | Continues | RefusedBody


class PreprocessReply(msgspec.Struct, frozen=True):
    """worn: the worker has grown so much that another one should take its place."""

    outcome: Outcome
    worn: bool = False


class PreprocessTask(msgspec.Struct, frozen=True):
    """pieces: the body, as it came."""

    kind: Kind
    pieces: Sequence[Piece]

    @property
    def message(self) -> list[Piece]:
        """As it travels to a worker: in pieces, because to put them together takes the head
        milliseconds, and as much memory again."""
        return [self.kind.encode() + b"\n", *self.pieces]


def decode_task(message: bytes) -> PreprocessTask:
    kind, _, body = message.partition(b"\n")
    return PreprocessTask(_KIND_NAMES[kind], (body,))


encode = msgspec.msgpack.encode
decode_reply = msgspec.msgpack.Decoder(PreprocessReply).decode
decode_spec = msgspec.msgpack.Decoder(Spec).decode


def preprocess(task: PreprocessTask, text: TokenText, limits: RequestLimits) -> Outcome:
    """Never raises: whatever a body brings about is its own refusal."""
    try:
        return _KINDS[task.kind](b"".join(task.pieces), text, limits)
    except ValidationError as error:
        return _refused(validation_error(error.errors(include_url=False, include_input=False)))
    except RecursionError:
        return _refused(ApiError(400, "the body is nested too deeply"))
    except MemoryError:
        message = "the request takes more memory to prepare than there is; send less of it"
        return _refused(ApiError(413, message, code="request_too_costly"))
    except Exception as error:
        if not isinstance(error, FlexpertError | ApiError):
            log.exception("a body for %s could not be prepared", task.kind)
        return _refused(api_error(error))


def _completions(body: bytes, text: TokenText, limits: RequestLimits) -> Generate:
    request, ignored = _parsed(CompletionRequest, body, limits)
    params = _checked(request.params(limits.defaults), len(request.prompts), text, limits)
    encoded = encode_prompts(
        request.prompts,
        text,
        limits,
        request.max_tokens if request.max_tokens == 0 else params.max_tokens,
        add_special_tokens=request.add_special_tokens is not False,
        truncate=request.truncate_prompt_tokens,
    )
    prompts, echoes = [], []
    for prompt, ids in zip(request.prompts, encoded, strict=True):
        prompts.append(_packed(ids))
        if request.echo:
            whole = isinstance(prompt, str) and request.truncate_prompt_tokens is None
            echoes.append(str(prompt) if whole else text.decode(ids))
    return Generate(
        prompts,
        params,
        request.stream,
        request.shown,
        echoes=echoes,
        without_answer=request.max_tokens == 0,
        request_id=request.request_id or "",
        ignored=ignored,
    )


def _chat(body: bytes, text: TokenText, limits: RequestLimits) -> Generate:
    request, ignored = _parsed(ChatRequest, body, limits)
    return _generate(request, ignored, text, limits)


def _generate(
    request: ChatRequest, ignored: list[str], text: TokenText, limits: RequestLimits
) -> Generate:
    dialog = request.dialog(limits.parsers)
    params = request.params(limits.defaults)
    if params.structured_outputs is not None and not request.is_free:
        dialog = without_reasoning(dialog)
    params = enforced(params, dialog)
    params = _checked(params, 1, text, limits)
    options = msgspec.structs.replace(request.options, tools=request.shown_tools(dialog))
    rendered = _render(request.messages, text, options)
    dialog = opened(dialog, rendered)
    (prompt,) = encode_prompts(
        [rendered],
        text,
        limits,
        params.max_tokens,
        add_special_tokens=bool(request.add_special_tokens),  # the template has written them
        truncate=request.truncate_prompt_tokens,
    )
    return Generate(
        [_packed(prompt)],
        params,
        request.stream,
        request.shown,
        dialog=None if dialog.is_plain else dialog,
        request_id=request.request_id or "",
        ignored=ignored,
    )


def _responses(body: bytes, text: TokenText, limits: RequestLimits) -> Generate | Continues:
    request, ignored = _parsed(ResponsesRequest, body, limits)
    if request.previous_response_id is not None:
        return Continues(request.previous_response_id)
    return _respond(request, [], ignored, text, limits)


def _continued(body: bytes, text: TokenText, limits: RequestLimits) -> Generate:
    history, _, body = body.partition(b"\n")
    request, ignored = _parsed(ResponsesRequest, body, limits)
    return _respond(request, msgspec.json.decode(history), ignored, text, limits)


def _respond(
    request: ResponsesRequest,
    history: list[ChatBody],
    ignored: list[str],
    text: TokenText,
    limits: RequestLimits,
) -> Generate:
    messages = [*history, *request.messages()]
    with renamed(response_fields.CHAT_NAMES):
        chat = ChatRequest.model_validate(request.chat_body(messages), context=limits)
        generate = _generate(chat, ignored, text, limits)
    translated = Translated(
        wire.encode(request.echo()), wire.encode(messages), request.store is not False
    )
    return msgspec.structs.replace(generate, translated=translated)


def _messages(body: bytes, text: TokenText, limits: RequestLimits) -> Generate:
    request, ignored = _parsed(MessagesRequest, body, limits)
    chat = _message_chat(request, ignored, text, limits)
    with renamed(message_fields.CHAT_NAMES):
        generate = _generate(chat, ignored, text, limits)
    return msgspec.structs.replace(generate, translated=Translated())


def _count_tokens(body: bytes, text: TokenText, limits: RequestLimits) -> Rendered:
    request, ignored = _parsed(CountTokensRequest, body, limits)
    chat = _message_chat(request, ignored, text, limits)
    dialog = chat.dialog(limits.parsers)
    options = msgspec.structs.replace(chat.options, tools=chat.shown_tools(dialog))
    rendered = _render(chat.messages, text, options)
    ids = text.encode_bounded(rendered, limits.max_prompt_tokens, add_special_tokens=False)
    return Rendered(wire.encode(wire.InputTokens(len(ids))), ignored)


def _message_chat(
    request: CountTokensRequest, ignored: list[str], text: TokenText, limits: RequestLimits
) -> ChatRequest:
    if request.thinking is not None and request.thinking.budget_tokens is not None:
        if not limits.lenient:
            raise RequestError(
                "thinking: budget_tokens is not supported by this server: max_tokens bounds the "
                "answer with its reasoning; send {'type': 'adaptive'}",
                "thinking",
            )
        ignored.append("thinking.budget_tokens")
    with renamed(message_fields.CHAT_NAMES):
        body = request.chat_body(switch=text.template_knows("enable_thinking"))
        return ChatRequest.model_validate(body, context=limits)


def _checked(
    params: SamplingParams, prompts: int, text: TokenText, limits: RequestLimits
) -> SamplingParams:
    """Checked, and with tokens for words. Raises: RequestError, ContextOverflow"""
    check_params(params, prompts, limits)
    if params.stop:
        text.check_stop_texts()
    if not params.bad_words:
        return params
    params = with_bad_tokens(params, text)
    check_params(params, prompts, limits)
    return params


def _tokenize(body: bytes, text: TokenText, limits: RequestLimits) -> Rendered:
    request, ignored = _parsed(TokenizeRequest, body, limits)
    if request.prompt is not None:
        source, special = request.prompt, request.add_special_tokens is not False
    else:
        source = _render(request.messages or (), text, request.options)
        special = bool(request.add_special_tokens)
    most = limits.max_prompt_tokens
    ids = text.encode_bounded(source, most, add_special_tokens=special, is_context=False)
    return Rendered(wire.encode(wire.Tokens(len(ids), limits.max_model_len, ids)), ignored)


def _detokenize(body: bytes, text: TokenText, limits: RequestLimits) -> Rendered:
    request, ignored = _parsed(DetokenizeRequest, body, limits)
    size, tokens = text.vocabulary_size, request.tokens
    wrong = token_outside(tokens, size)
    if wrong is not None:
        raise RequestError(
            f"tokens must be below {size}, the vocabulary's size; {wrong} is not", "tokens"
        )
    return Rendered(wire.encode(wire.Text(text.decode(tokens))), ignored)


_KINDS: Mapping[Kind, Callable[[bytes, TokenText, RequestLimits], Outcome]] = {
    "completions": _completions,
    "chat": _chat,
    "tokenize": _tokenize,
    "detokenize": _detokenize,
    "responses": _responses,
    "continued_responses": _continued,
    "messages": _messages,
    "count_tokens": _count_tokens,
}


def _parsed(schema: type[Body], body: bytes, limits: RequestLimits) -> tuple[Body, list[str]]:
    """The request, and the fields that are passed over."""
    request = schema.model_validate_json(body, context=limits)
    name = getattr(request, "model", None)
    if name is not None and name != limits.model:
        raise unknown_model(name)
    return request, check_fields(request, lenient=limits.lenient)


def _render(messages: Sequence[Message], text: TokenText, options: ChatOptions) -> str:
    """A conversation as the chat template writes it; whether it wants the arguments of calls as
    mappings or as text, it tells by failing.

    Raises: RequestError
    """
    talk = [template_message(message.model_dump()) for message in messages]
    try:
        return text.render(talk, options)
    except RequestError:
        if not any("tool_calls" in message for message in talk):
            raise
        with suppress(RequestError):
            return text.render(with_text_arguments(talk), options)
        raise


def _packed(tokens: list[int]) -> bytes:
    return array("i", tokens).tobytes()


def unpacked(tokens: bytes) -> list[int]:
    """Token ids as they travel → a list."""
    ids = array("i")
    ids.frombytes(tokens)
    return ids.tolist()


_LONGEST_MESSAGE = 2000


def _refused(error: ApiError) -> RefusedBody:
    message = error.detail
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}…"
    return RefusedBody(error.status_code, message, error.type, error.param, error.code)
