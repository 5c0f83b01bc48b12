"""The OpenAI API: models, completions, chat; and vLLM's tokenize and detokenize."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from flexpert.engine.request import SamplingParams
from flexpert.errors import FlexpertError, RequestError
from flexpert.server import wire
from flexpert.server.errors import api_error, unknown_model
from flexpert.server.generation import Generation
from flexpert.server.metrics import ServerMetrics
from flexpert.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Prompt,
    TokenizeRequest,
)
from flexpert.server.shapes import ChatShape, Shape, TextShape
from flexpert.server.stream import CLIENT_GONE, DONE, ClientGone, EventStream, event, unless_gone
from flexpert.server.text import TokenText

if TYPE_CHECKING:
    from flexpert.cluster.head import Head

# Characters. A longer text is tokenised in a thread: it would keep every stream waiting.
LONG_TEXT = 20_000


class OpenAIRoutes:
    """The routes over one started head."""

    def __init__(self, head: Head, metrics: ServerMetrics) -> None:
        self._head = head
        self._metrics = metrics
        self._text = TokenText(head.tokenizer)
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

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Continue one or several prompts; choice prompt * n + sample."""
        self._check_model(body.model)
        prompts = [await self._encode(prompt) for prompt in body.prompts]
        params = body.params
        echoes: list[str] = []
        if body.echo:
            texts = [
                prompt if isinstance(prompt, str) else self._text.decode(prompt)
                for prompt in body.prompts
            ]
            echoes = [text for text in texts for _ in range(params.n)]
        id = f"cmpl-{secrets.token_hex(12)}"
        shape = TextShape(
            id,
            int(time.time()),
            self._head.model_name,
            self._text,
            with_usage=body.include_usage,
            echoes=echoes,
        )
        return await self._answer(request, prompts, params, shape, stream=body.stream)

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        prompt = self._text.chat(body.conversation)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        shape = ChatShape(
            id,
            int(time.time()),
            self._head.model_name,
            self._text,
            with_usage=body.include_usage,
        )
        return await self._answer(request, [prompt], body.params, shape, stream=body.stream)

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids of a text or a conversation."""
        self._check_model(body.model)
        if body.prompt is not None:
            ids = await self._encode(body.prompt, add_special_tokens=body.add_special_tokens)
        else:
            messages = [message.model_dump() for message in body.messages or ()]
            ids = self._text.chat(messages, add_generation_prompt=body.add_generation_prompt)
        return wire.json_response(wire.Tokens(len(ids), self._head.info.max_model_len, ids))

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        self._check_model(body.model)
        size = self._text.vocabulary_size
        wrong = next((id for id in body.tokens if not 0 <= id < size), None)
        if wrong is not None:
            raise RequestError(
                f"tokens must be below {size}, the vocabulary's size; {wrong} is not"
            )
        return wire.json_response(wire.Text(self._text.decode(body.tokens)))

    async def _answer(
        self,
        request: Request,
        prompts: list[list[int]],
        params: SamplingParams,
        shape: Shape,
        *,
        stream: bool,
    ) -> Response:
        # the head admits or refuses here, before anything is sent: a refusal has its own status
        generation = Generation(
            self._head, self._text, prompts, params, request_id=shape.id, meter=self._metrics
        )
        if stream:
            return EventStream(_events(generation, shape), generation.cancel)
        with generation:
            try:
                choices = await unless_gone(request.receive, generation.whole())
            except ClientGone:
                request.scope[CLIENT_GONE] = True
                return Response(status_code=499)  # for the request counter; nobody reads it
        return Response(shape.whole(choices, generation.usage), media_type="application/json")

    async def _encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) < LONG_TEXT:
            return self._text.encode(prompt, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self._text.encode, prompt, add_special_tokens=add_special_tokens
        )

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


async def _events(generation: Generation, shape: Shape) -> AsyncGenerator[bytes, None]:
    """The stream's events; what came in one step leaves in one piece."""
    try:
        async with aclosing(generation.parts()) as arriving:
            async for parts in arriving:
                if len(parts) == 1:
                    chunk = shape.chunk(parts[0])
                    if chunk is not None:
                        yield event(chunk)
                    continue
                chunks = [shape.chunk(part) for part in parts]
                if piece := b"".join([event(chunk) for chunk in chunks if chunk is not None]):
                    yield piece
        if shape.with_usage:
            yield event(shape.usage_chunk(generation.usage))
    except FlexpertError as error:
        yield event(api_error(error).body)  # the status has been sent; this is how clients learn
    yield DONE
