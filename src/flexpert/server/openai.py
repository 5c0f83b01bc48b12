"""The OpenAI API: models, completions, chat; and vLLM's tokenize and detokenize."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from flexpert.errors import FlexpertError
from flexpert.forking.framing import Piece
from flexpert.frontend.generation import Generation, Part
from flexpert.frontend.token_ids import text_of_answers
from flexpert.server import fields, wire
from flexpert.server.answer_place import AnswerPlace
from flexpert.server.dialog_shape import DialogShape
from flexpert.server.forwarding import BODY
from flexpert.server.http_errors import api_error, unknown_model
from flexpert.server.http_metrics import ServerMetrics
from flexpert.server.preprocessing import Continues, Generate, Kind, Outcome, Rendered
from flexpert.server.preprocessors import Preprocessors
from flexpert.server.shapes import ChatShape, ChoiceShape, TextShape
from flexpert.server.stream import DONE, AnswerStream, ClientGone, event, unless_gone
from flexpert.server.trace_settings import TRACE
from flexpert.server.unserved import wrong_content_type

if TYPE_CHECKING:
    from flexpert.cluster.head import Head
    from flexpert.server.tracing.request_trace import RequestTrace

log = logging.getLogger("flexpert.server")

T = TypeVar("T")

_PIECE = 2**15  # bytes


class OpenAIRoutes:
    """The routes over one started head."""

    def __init__(self, head: Head, metrics: ServerMetrics, preprocessors: Preprocessors) -> None:
        self._head = head
        self._metrics = metrics
        self._preprocessors = preprocessors
        self._text = text_of_answers(head.info, head.tables)
        self._created = int(time.time())
        self.router = APIRouter(tags=["openai"])
        add = self.router.add_api_route
        add("/v1/models", self.models, methods=["GET"])
        add("/v1/models/{name:path}", self.model, methods=["GET"])
        add("/v1/completions", self.completions, methods=["POST"])
        add("/v1/chat/completions", self.chat, methods=["POST"])
        add("/tokenize", self.tokenize, methods=["POST"])
        add("/detokenize", self.detokenize, methods=["POST"])

    async def models(self) -> Response:
        """What is served: one model."""
        return wire.json_response(wire.ModelList([self._model()]))

    async def model(self, name: str) -> Response:
        """One model; 404 for any other."""
        self._check_model(name)
        return wire.json_response(self._model())

    async def completions(self, request: Request) -> Response:
        """Continue one or several prompts; choice prompt * n + sample."""
        asked = await self.preprocess(request, "completions", Generate)
        times = asked.params.n
        shape = TextShape(
            _id("cmpl", asked, request),
            int(time.time()),
            self._head.model_name,
            self._text,
            shown=asked.shown,
            prompts=[prompt for prompt in asked.prompt_ids for _ in range(times)],
            echoes=[text for text in asked.echoes for _ in range(times)],
        )
        return await self._answer(request, asked, shape)

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = await self.preprocess(request, "chat", Generate)
        kind = ChatShape if asked.dialog is None else partial(DialogShape, dialog=asked.dialog)
        shape = kind(
            _id("chatcmpl", asked, request),
            int(time.time()),
            self._head.model_name,
            self._text,
            shown=asked.shown,
            prompts=asked.prompt_ids * asked.params.n,
        )
        return await self._answer(request, asked, shape)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or a conversation."""
        found = await self.preprocess(request, "tokenize", Rendered)
        return found.response()

    async def detokenize(self, request: Request) -> Response:
        """Text of token ids."""
        found = await self.preprocess(request, "detokenize", Rendered)
        return found.response()

    async def preprocess(
        self,
        request: Request,
        kind: Kind,
        expected: type[T],
        history: Callable[[str], bytes] | None = None,
    ) -> T:
        """What the body asks for. history: of an earlier response, by its id.

        Raises: ApiError, Overloaded, ClientGone
        """
        content_type = request.headers.get("content-type")
        if not is_json(content_type):
            raise wrong_content_type(content_type)
        claimed = 0
        try:
            pieces: list[Piece] = []
            async for piece in request.stream():
                self._preprocessors.claim(len(piece), claimed)
                claimed += len(piece)
                _gather(pieces, piece)
            request.scope[BODY] = pieces[:]  # should another head have to answer it
            outcome = await self._prepared(request, kind, pieces, history)
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._preprocessors.release(claimed)
        if not isinstance(outcome, expected):
            raise TypeError(f"{kind} was prepared as {type(outcome).__name__}")
        return outcome

    async def _prepared(
        self,
        request: Request,
        kind: Kind,
        pieces: list[Piece],
        history: Callable[[str], bytes] | None,
    ) -> Outcome:
        run = self._preprocessors.run
        began, trace = time.monotonic(), request.scope.get(TRACE)
        try:
            outcome = await unless_gone(request.receive, run(kind, pieces))
            if isinstance(outcome, Continues) and history is not None:
                pieces = [history(outcome.previous), b"\n", *pieces]
                outcome = await unless_gone(request.receive, run("continued_responses", pieces))
        finally:
            if trace is not None:
                trace.preprocessed(began)
        return outcome

    def generation(self, request: Request, asked: Generate, id: str) -> Generation:
        """The choices of a request, not submitted yet. id: of the answer."""
        markers = asked.dialog.markers if asked.dialog is not None else ()
        trace: RequestTrace | None = request.scope.get(TRACE)
        generation = Generation(
            self._head,
            self._text.revealing(markers) if markers else self._text,
            asked.prompt_ids,
            asked.params,
            request_id=id,
            without_answer=asked.without_answer,
            meter=self._metrics,
            tracer=trace,
        )
        if trace is not None:
            trace.generates(generation, asked.stream)
        return generation

    async def _answer(self, request: Request, asked: Generate, shape: ChoiceShape) -> Response:
        generation = self.generation(request, asked, shape.id)
        # the head admits or refuses here, before anything is sent: a refusal has its own status
        await generation.submit()
        request.scope.pop(BODY, None)
        headers = fields.header(asked.ignored)
        if asked.stream:
            place = self._place(request, generation)
            return AnswerStream(generation, ChoiceEvents(generation, shape, place), headers)
        with generation:
            choices = await unless_gone(request.receive, generation.whole())
        body = await shape.answer(choices, generation.usage)
        return Response(body, headers=headers, media_type="application/json")

    def _place(self, request: Request, generation: Generation) -> AnswerPlace | None:
        """Of an answer that the client may ask for again, or does; None: nobody could go on with
        it, its events need no ids."""
        if not self._head.config.cluster.state_dir or len(generation.answers) != 1:
            return None
        return AnswerPlace(generation, request.headers.get("last-event-id", ""))

    @property
    def model_name(self) -> str:
        """As it is served."""
        return self._head.model_name

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._head.model_name:
            raise unknown_model(name)

    def _model(self) -> wire.Model:
        return wire.Model(
            self._head.model_name,
            self._created,
            self._head.info.max_model_len,
            self._head.config.model.model,
        )


def _id(prefix: str, asked: Generate, request: Request) -> str:
    """Of an answer: with the client's own id, if it gave one."""
    header = request.headers.get("x-request-id", "")
    own = asked.request_id or (header if re.fullmatch(r"[!-~]{1,256}", header) else "")
    return f"{prefix}-{own or secrets.token_hex(12)}"


def _gather(pieces: list[Piece], piece: bytes) -> None:
    """Append it; small ones are put together, so that a body is never many of them."""
    if len(piece) >= _PIECE:
        pieces.append(piece)
    elif pieces and isinstance(pieces[-1], bytearray) and len(pieces[-1]) < _PIECE:
        pieces[-1] += piece
    else:
        pieces.append(bytearray(piece))


class ChoiceEvents:
    """Choices of an answer as events: chunks in OpenAI's shapes.

    place: events have ids, and those that the client has had are left out.
    """

    def __init__(
        self, generation: Generation, shape: ChoiceShape, place: AnswerPlace | None = None
    ) -> None:
        self._generation = generation
        self._shape = shape
        self._place = place
        self._continuous = shape.shown.continuous_usage

    def begin(self) -> bytes:
        return b""

    def show(self, parts: list[Part]) -> bytes:
        shape, place = self._shape, self._place
        usage = self._generation.usage if self._continuous else None
        if len(parts) == 1:
            chunk = shape.chunk(parts[0], usage)
            new = place is None or place.advance()
            return event(chunk, id=place.id if place else b"") if chunk is not None and new else b""
        chunks = [shape.chunk(part, usage) for part in parts]
        return b"".join([event(chunk) for chunk in chunks if chunk is not None])

    def end(self) -> bytes:
        shape = self._shape
        if not shape.shown.usage:
            return DONE
        return event(shape.usage_chunk(self._generation.usage)) + DONE

    def fail(self, error: Exception) -> bytes:
        id = self._shape.id
        if not isinstance(error, FlexpertError):
            log.exception("%s failed", id, extra={"request": id})
        # the status has been sent; this is how clients learn
        return event(api_error(error).body) + DONE


def is_json(content_type: str | None) -> bool:
    """Whether a header names JSON; a body without one is taken for it."""
    if content_type is None:
        return True
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
