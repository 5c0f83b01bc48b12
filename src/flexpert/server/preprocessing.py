"""A request's body → what the engine needs of it, or why it is refused (pure).

All that takes time in proportion to what a client sends happens here: parsing, checking, chat
templates, tokenising. It runs in a process of its own (`preprocess_worker`), never in the head.
What bytes and counts already tell is refused before anything costly is done.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

import msgspec
from pydantic import BaseModel, ValidationError

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
from flexpert.frontend.text import TokenText
from flexpert.server import wire
from flexpert.server.fields import check_fields
from flexpert.server.http_errors import ApiError, api_error, unknown_model, validation_error
from flexpert.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Message,
    Shown,
    TokenizeRequest,
)

log = logging.getLogger("flexpert.server")

Body = TypeVar("Body", bound=BaseModel)
Kind = Literal["completions", "chat", "tokenize", "detokenize"]
_KIND_NAMES: dict[bytes, Kind] = {kind.encode(): kind for kind in get_args(Kind)}


class Spec(msgspec.Struct, frozen=True):
    """What a worker is started with. niceness: as `nice` takes it."""

    limits: RequestLimits
    niceness: int


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Sequences to run.

    prompts: token ids, int32. echoes: texts of the prompts, if asked for. without_answer: the
    prompt is all that is asked for. request_id: the client's, or "". ignored: fields that were
    passed over.
    """

    prompts: list[bytes]
    params: SamplingParams
    stream: bool
    shown: Shown
    echoes: list[str] = []
    without_answer: bool = False
    request_id: str = ""
    ignored: list[str] = []

    @property
    def prompt_ids(self) -> list[list[int]]:
        return [unpacked(prompt) for prompt in self.prompts]


class Rendered(msgspec.Struct, frozen=True, tag="rendered"):
    """A whole answer, in JSON: a million tokens take the head no time."""

    json: bytes


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


Outcome = Generate | Rendered | RefusedBody


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
    params = _checked(request.params(limits.defaults), 1, text, limits)
    rendered = text.render(_conversation(request.messages), request.options)
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
        request_id=request.request_id or "",
        ignored=ignored,
    )


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
    request, _ = _parsed(TokenizeRequest, body, limits)
    if request.prompt is not None:
        source, special = request.prompt, request.add_special_tokens is not False
    else:
        source = text.render(_conversation(request.messages or ()), request.options)
        special = bool(request.add_special_tokens)
    most = limits.max_prompt_tokens
    ids = text.encode_bounded(source, most, add_special_tokens=special, is_context=False)
    return Rendered(wire.encode(wire.Tokens(len(ids), limits.max_model_len, ids)))


def _detokenize(body: bytes, text: TokenText, limits: RequestLimits) -> Rendered:
    request, _ = _parsed(DetokenizeRequest, body, limits)
    size, tokens = text.vocabulary_size, request.tokens
    wrong = token_outside(tokens, size)
    if wrong is not None:
        raise RequestError(
            f"tokens must be below {size}, the vocabulary's size; {wrong} is not", "tokens"
        )
    return Rendered(wire.encode(wire.Text(text.decode(tokens))))


_KINDS: Mapping[Kind, Callable[[bytes, TokenText, RequestLimits], Outcome]] = {
    "completions": _completions,
    "chat": _chat,
    "tokenize": _tokenize,
    "detokenize": _detokenize,
}


def _parsed(schema: type[Body], body: bytes, limits: RequestLimits) -> tuple[Body, list[str]]:
    """The request, and the fields that are passed over."""
    request = schema.model_validate_json(body, context=limits)
    name = getattr(request, "model", None)
    if name is not None and name != limits.model:
        raise unknown_model(name)
    return request, check_fields(request, lenient=limits.lenient)


def _conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As chat templates want it."""
    return [message.model_dump() for message in messages]


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
