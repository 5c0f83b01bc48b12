"""Anthropic's `/v1/messages`."""

from __future__ import annotations

import json
import secrets
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from flexpert.engine.request import FINISH_LENGTH
from flexpert.frontend.generation import Usage
from flexpert.server import fields, wire
from flexpert.server.answer_blocks import Block, BlockEvent
from flexpert.server.block_answer import BlockAnswer, BlockEvents, whole_answer
from flexpert.server.forwarding import BODY
from flexpert.server.http_errors import ApiError
from flexpert.server.message_errors import message_error
from flexpert.server.openai import OpenAIRoutes
from flexpert.server.preprocessing import Generate, Rendered
from flexpert.server.stream import AnswerStream, event, unless_gone


class MessageObject(msgspec.Struct):
    """`/v1/messages`."""

    id: str
    model: str
    content: list[dict[str, Any]]
    usage: dict[str, Any]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    type: str = "message"
    role: str = "assistant"
    flexpert: wire.Remark | msgspec.UnsetType = msgspec.UNSET


class MessageEvent(msgspec.Struct):
    """An event of a streamed message; each type has fields of its own."""

    type: str


class MessagesRoutes:
    """The routes, beside those of `api`."""

    def __init__(self, api: OpenAIRoutes) -> None:
        self._api = api
        self.router = APIRouter(tags=["anthropic"])
        add = self.router.add_api_route
        add("/v1/messages", self.create, methods=["POST"])
        add("/v1/messages/count_tokens", self.count_tokens, methods=["POST"])

    async def create(self, request: Request) -> Response:
        """Answer a conversation."""
        asked = await self._api.preprocess(request, "messages", Generate)
        answer = BlockAnswer(asked)
        shape = MessageShape(f"msg_{secrets.token_hex(12)}", self._api.model_name)
        generation = self._api.generation(request, asked, shape.id)
        await generation.submit()
        request.scope.pop(BODY, None)
        headers = fields.header(asked.ignored)
        if asked.stream:
            return AnswerStream(generation, BlockEvents(generation, answer, shape), headers)
        with generation:
            await unless_gone(request.receive, whole_answer(generation, answer))
        body = shape.whole(answer, generation.usage)
        return Response(body, headers=headers, media_type="application/json")

    async def count_tokens(self, request: Request) -> Response:
        """Tokens of a conversation as the model would get it."""
        found = await self._api.preprocess(request, "count_tokens", Rendered)
        return found.response()


class MessageShape:
    """How one is told."""

    def __init__(self, id: str, model: str) -> None:
        self.id = id
        self._model = model

    def begin(self, usage: Usage) -> bytes:
        message = MessageObject(self.id, self._model, [], _usage(usage))
        return _event("message_start", message=message)

    def show(self, event: BlockEvent) -> bytes:
        block = event.block
        match event.kind:
            case "begin":
                empty = msgspec.structs.replace(block, pieces=[])
                return _event(
                    "content_block_start", index=block.index, content_block=_content(empty)
                )
            case "delta":
                delta = _delta(block, event.delta)
                return _event("content_block_delta", index=block.index, delta=delta)
            case "end":
                return _event("content_block_stop", index=block.index)

    def end(self, answer: BlockAnswer, usage: Usage) -> bytes:
        delta = {"stop_reason": _stop_reason(answer), "stop_sequence": answer.stopped_by}
        more = {"flexpert": wire.Remark(degraded=True)} if answer.degraded else {}
        last = _event("message_delta", delta=delta, usage=_usage(usage), **more)
        return last + _event("message_stop")

    def fail(self, answer: BlockAnswer, error: ApiError) -> bytes:
        return event(message_error(error), name="error")

    def whole(self, answer: BlockAnswer, usage: Usage) -> bytes:
        """JSON of the message at once."""
        return wire.encode(
            MessageObject(
                self.id,
                self._model,
                [_content(block) for block in answer.blocks],
                _usage(usage),
                _stop_reason(answer),
                answer.stopped_by,
                flexpert=wire.Remark(degraded=True) if answer.degraded else msgspec.UNSET,
            )
        )


def _stop_reason(answer: BlockAnswer) -> str:
    if answer.finish == FINISH_LENGTH:
        return "max_tokens"
    if answer.stopped_by is not None:
        return "stop_sequence"
    return "tool_use" if answer.has_calls else "end_turn"


def _content(block: Block) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "text":
            return {"type": "text", "text": block.text}
        case "call":
            called = {"id": block.id, "name": block.name, "input": _input(block.text)}
            return {"type": "tool_use"} | called


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as an object, which they have to be here; others are the only member of one."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"INVALID_JSON": arguments}


def _delta(block: Block, text: str) -> dict[str, Any]:
    match block.kind:
        case "reasoning":
            return {"type": "thinking_delta", "thinking": text}
        case "text":
            return {"type": "text_delta", "text": text}
        case "call":
            return {"type": "input_json_delta", "partial_json": text}


def _usage(usage: Usage) -> dict[str, Any]:
    """Anthropic counts what came from its cache apart."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _event(kind: str, **more: Any) -> bytes:
    return event(wire.encode({"type": kind, **more}), name=kind)
