"""OpenAI's `/v1/responses`."""

from __future__ import annotations

import secrets
import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from flexpert.engine.request import FINISH_LENGTH
from flexpert.frontend.generation import Usage
from flexpert.server import fields, wire
from flexpert.server.answer_blocks import Block, BlockEvent, chat_message
from flexpert.server.block_answer import BlockAnswer, BlockEvents, whole_answer
from flexpert.server.forwarding import BODY
from flexpert.server.http_errors import ApiError
from flexpert.server.openai import OpenAIRoutes
from flexpert.server.preprocessing import Generate, Translated
from flexpert.server.stored_responses import StoredResponse, StoredResponses
from flexpert.server.stream import AnswerStream, event, unless_gone

_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponseObject(msgspec.Struct):
    """`/v1/responses`; what of the request stands in it comes behind these fields."""

    id: str
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    completed_at: int | None = None
    object: str = "response"
    flexpert: wire.Remark | msgspec.UnsetType = msgspec.UNSET


class ResponseEvent(msgspec.Struct):
    """An event of a streamed response; each type has fields of its own."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct):
    """`DELETE /v1/responses/{id}`."""

    id: str
    object: str = "response"
    deleted: bool = True


class ResponsesRoutes:
    """The routes, beside those of `api`."""

    def __init__(self, api: OpenAIRoutes) -> None:
        self._api = api
        self.stored = self._stored = StoredResponses()
        self.router = APIRouter(tags=["openai"])
        add = self.router.add_api_route
        add("/v1/responses", self.create, methods=["POST"])
        add("/v1/responses/{id}", self.retrieve, methods=["GET"])
        add("/v1/responses/{id}", self.delete, methods=["DELETE"])

    async def create(self, request: Request) -> Response:
        """Answer a conversation, or go on with an earlier response's."""
        asked = await self._api.preprocess(request, "responses", Generate, self._history)
        key = secrets.token_hex(24)
        answer = BlockAnswer(asked)
        shape = ResponseShape(key, self._api.model_name, asked, self._stored)
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

    async def retrieve(self, id: str) -> Response:
        """One that was stored."""
        return Response(self._stored.get(id).body, media_type="application/json")

    async def delete(self, id: str) -> Response:
        """Forget one that was stored."""
        self._stored.delete(id)
        return wire.json_response(DeletedResponse(id))

    def _history(self, id: str) -> bytes:
        return self._stored.get(id, "previous_response_id").history


class ResponseShape:
    """How one is told. key: what is random in its ids."""

    def __init__(self, key: str, model: str, asked: Generate, stored: StoredResponses) -> None:
        self.id = f"resp_{key}"
        self._key = key
        self._created = int(time.time())
        self._model = model
        self._request = asked.translated or Translated()
        self._stored = stored
        self._number = 0

    def begin(self, usage: Usage) -> bytes:
        body = msgspec.Raw(self._body("in_progress", []))
        created = self._event("response.created", response=body)
        return created + self._event("response.in_progress", response=body)

    def show(self, event: BlockEvent) -> bytes:
        block = event.block
        match event.kind:
            case "begin":
                return self._begin(block)
            case "delta":
                return self._delta(block, event.delta)
            case "end":
                return self._end(block)

    def end(self, answer: BlockAnswer, usage: Usage) -> bytes:
        body = self.whole(answer, usage)
        cut = answer.finish == FINISH_LENGTH
        kind = "response.incomplete" if cut else "response.completed"
        return self._event(kind, response=msgspec.Raw(body))

    def fail(self, answer: BlockAnswer, error: ApiError) -> bytes:
        told = {"code": error.code or error.type, "message": error.detail}
        body = self._body("failed", self._items(answer, "incomplete"), error=told)
        return self._event("response.failed", response=msgspec.Raw(body))

    def whole(self, answer: BlockAnswer, usage: Usage) -> bytes:
        """The response, which is stored if that was asked for."""
        cut = answer.finish == FINISH_LENGTH
        status = "incomplete" if cut else "completed"
        body = self._body(
            status,
            self._items(answer, status),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=_usage(usage, answer.reasoning_tokens),
            completed_at=None if cut else int(time.time()),
            flexpert=wire.Remark(degraded=True) if answer.degraded else msgspec.UNSET,
        )
        if self._request.keep:
            message = wire.encode(chat_message(answer.blocks))
            history = self._request.history[:-1] + b"," + message + b"]"
            self._stored.put(self.id, StoredResponse(body, history))
        return body

    def _body(self, status: str, output: list[dict[str, Any]], **more: Any) -> bytes:
        own = ResponseObject(self.id, self._created, status, self._model, output, **more)
        return wire.encode(own)[:-1] + b"," + self._request.echo[1:]

    def _items(self, answer: BlockAnswer, status: str) -> list[dict[str, Any]]:
        items = [self._item(block, "completed") for block in answer.blocks]
        if items:
            items[-1]["status"] = status
        return items

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        match block.kind:
            case "reasoning":
                content = [_part(block)] if block.text else []
                return item | {"type": "reasoning", "summary": [], "content": content}
            case "text":
                content = [_part(block)] if status != "in_progress" else []
                return item | {"type": "message", "role": "assistant", "content": content}
            case "call":
                call = {"call_id": block.id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | call

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._key}{block.index}"

    def _begin(self, block: Block) -> bytes:
        item = self._item(block, "in_progress")
        events = self._event("response.output_item.added", output_index=block.index, item=item)
        if block.kind != "call":
            events += self._part_event("response.content_part.added", block, part=_part(block))
        return events

    def _delta(self, block: Block, delta: str) -> bytes:
        match block.kind:
            case "reasoning":
                return self._part_event("response.reasoning_text.delta", block, delta=delta)
            case "text":
                kind = "response.output_text.delta"
                return self._part_event(kind, block, delta=delta, logprobs=[])
            case "call":
                kind = "response.function_call_arguments.delta"
                return self._item_event(kind, block, delta=delta)

    def _end(self, block: Block) -> bytes:
        match block.kind:
            case "reasoning":
                events = self._part_event("response.reasoning_text.done", block, text=block.text)
            case "text":
                kind = "response.output_text.done"
                events = self._part_event(kind, block, text=block.text, logprobs=[])
            case "call":
                kind = "response.function_call_arguments.done"
                events = self._item_event(kind, block, arguments=block.text, name=block.name)
        if block.kind != "call":
            events += self._part_event("response.content_part.done", block, part=_part(block))
        item = self._item(block, "completed")
        return events + self._event(
            "response.output_item.done", output_index=block.index, item=item
        )

    def _part_event(self, kind: str, block: Block, **more: Any) -> bytes:
        return self._item_event(kind, block, content_index=0, **more)

    def _item_event(self, kind: str, block: Block, **more: Any) -> bytes:
        return self._event(kind, item_id=self._item_id(block), output_index=block.index, **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return event(wire.encode(data), name=kind)


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _usage(usage: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
