"""The description of the API, `/openapi.json`: what each route answers, and with which status.

FastAPI knows the routes; what they give it cannot see, because our answers are structs that go past
it, nor the bodies that are parsed in a process of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from flexpert.cluster.views import (
    ChangePreview,
    ClusterEvent,
    ClusterView,
    LayerPlacement,
    OperationView,
    RebalanceView,
)
from flexpert.server import messages_api, responses_api, wire
from flexpert.server.gate import OPEN_PATHS
from flexpert.server.http_errors import ErrorBody
from flexpert.server.live_view import LiveSnapshot
from flexpert.server.message_errors import MessageErrorBody
from flexpert.server.message_fields import CountTokensRequest, MessagesRequest
from flexpert.server.response_fields import ResponsesRequest
from flexpert.server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_EVENTS = "text/event-stream"
_SCHEME = "bearer"

# What any request may be answered by the protocol and the gate, or if something breaks.
_ANY = (400, 405, 408, 413, 431, 500, 503)
_BEHIND_A_KEY = (401, 429)
_HEADERS = {
    401: {"WWW-Authenticate": "always Bearer"},
    405: {"Allow": "the methods of this path"},
    429: {"Retry-After": "seconds"},
}


@dataclass(frozen=True, slots=True)
class Answers:
    """What one operation is answered with.

    body: the struct of a success. events: what each event of a stream holds, where the operation
    can stream. text: it is text, not JSON. errors: statuses beyond those of any request. asks: the
    body it takes, if it parses that by itself. failure: the struct of one. also: of a 200, where
    success has two.
    """

    body: type | None = None
    events: type | None = None
    text: bool = False
    status: int = 200
    errors: tuple[int, ...] = ()
    asks: type[BaseModel] | None = None
    failure: type = ErrorBody
    also: type | None = None


ANSWERS: Mapping[tuple[str, str], Answers] = {
    ("get", "/v1/models"): Answers(wire.ModelList),
    ("get", "/v1/models/{name}"): Answers(wire.Model, errors=(404,)),
    ("post", "/v1/completions"): Answers(
        wire.TextCompletion,
        events=wire.TextCompletion,
        errors=(404, 415),
        asks=CompletionRequest,
    ),
    ("post", "/v1/chat/completions"): Answers(
        wire.ChatCompletion, events=wire.ChatChunk, errors=(404, 415), asks=ChatRequest
    ),
    ("post", "/v1/responses"): Answers(
        responses_api.ResponseObject,
        events=responses_api.ResponseEvent,
        errors=(404, 415),
        asks=ResponsesRequest,
    ),
    ("get", "/v1/responses/{id}"): Answers(responses_api.ResponseObject, errors=(404,)),
    ("delete", "/v1/responses/{id}"): Answers(responses_api.DeletedResponse, errors=(404,)),
    ("post", "/v1/messages"): Answers(
        messages_api.MessageObject,
        events=messages_api.MessageEvent,
        errors=(404, 415),
        asks=MessagesRequest,
        failure=MessageErrorBody,
    ),
    ("post", "/v1/messages/count_tokens"): Answers(
        wire.InputTokens, errors=(404, 415), asks=CountTokensRequest, failure=MessageErrorBody
    ),
    ("post", "/tokenize"): Answers(wire.Tokens, errors=(404, 415), asks=TokenizeRequest),
    ("post", "/detokenize"): Answers(wire.Text, errors=(404, 415), asks=DetokenizeRequest),
    ("get", "/health"): Answers(wire.Health),
    ("get", "/health/ready"): Answers(wire.Health),
    ("get", "/health/live"): Answers(wire.Health),
    ("get", "/ping"): Answers(wire.Health),
    ("post", "/ping"): Answers(wire.Health),
    ("get", "/load"): Answers(wire.ServerLoad),
    ("get", "/version"): Answers(wire.Version),
    ("get", "/metrics"): Answers(text=True),
    ("get", "/cluster"): Answers(ClusterView),
    ("get", "/cluster/events"): Answers(events=ClusterEvent, errors=(410,)),
    ("get", "/cluster/balance"): Answers(RebalanceView),
    ("get", "/cluster/stream"): Answers(events=LiveSnapshot),
    ("get", "/cluster/placement"): Answers(LayerPlacement),
    ("post", "/cluster/operations"): Answers(
        OperationView, status=202, errors=(409, 415), also=ChangePreview
    ),
    ("get", "/cluster/operations/{id}"): Answers(OperationView, errors=(404,)),
    ("delete", "/cluster/operations/{id}"): Answers(OperationView, errors=(404, 409)),
    ("post", "/scale_elastic_ep"): Answers(wire.ScaleMessage, errors=(409, 415)),
    ("get", "/is_scaling_elastic_ep"): Answers(wire.ScaleState),
    ("post", "/is_scaling_elastic_ep"): Answers(wire.ScaleState),
}


class DescribedAPI(FastAPI):
    """FastAPI whose description says what is answered."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = _described(super().openapi())
        return self.openapi_schema


def _described(description: dict[str, Any]) -> dict[str, Any]:
    structs = {
        kind for a in ANSWERS.values() for kind in (a.body, a.events, a.also) if kind is not None
    }
    ordered = sorted({*structs, ErrorBody, MessageErrorBody}, key=lambda kind: kind.__name__)
    _, schemas = msgspec.json.schema_components(ordered, ref_template=_REF)
    components = description.setdefault("components", {})
    known = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's, which never leave here
        known.pop(name, None)
    known.update(schemas)
    mode: Literal["validation"] = "validation"
    asked = [(a.asks, mode) for a in ANSWERS.values() if a.asks is not None]
    _, bodies = models_json_schema(asked, ref_template="#/components/schemas/{model}")
    known.update(bodies["$defs"])
    components["securitySchemes"] = {_SCHEME: {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            answers = ANSWERS.get((method, path))
            if answers is not None:
                operation["responses"] = _responses(path, answers)
                if answers.asks is not None:
                    schema = {"$ref": _REF.format(name=answers.asks.__name__)}
                    operation["requestBody"] = {
                        "required": True,
                        "content": {_JSON: {"schema": schema}},
                    }
            if path not in OPEN_PATHS:
                operation["security"] = [{}, {_SCHEME: []}]  # a service may have no keys
    return description


def _responses(path: str, answers: Answers) -> dict[str, Any]:
    found = {str(answers.status): _success(answers)}
    if answers.also is not None:
        schema = {"schema": _reference(answers.also)}
        found["200"] = {"description": HTTPStatus.OK.phrase, "content": {_JSON: schema}}
    statuses = {*_ANY, *answers.errors}
    if path not in OPEN_PATHS:
        statuses.update(_BEHIND_A_KEY)
    for status in sorted(statuses):
        found[str(status)] = _failure(status, answers.failure)
    if answers.body is wire.Health:
        either = [_reference(wire.Health), _reference(ErrorBody)]
        found["503"]["content"] = {_JSON: {"schema": {"anyOf": either}}}
    return found


def _success(answers: Answers) -> dict[str, Any]:
    content: dict[str, Any] = {}
    meaning = HTTPStatus(answers.status).phrase
    if answers.body is not None:
        content[_JSON] = {"schema": _reference(answers.body)}
    if answers.events is not None:
        data: dict[str, Any] = {
            "type": "string",
            "contentMediaType": _JSON,
            "contentSchema": _reference(answers.events),
        }
        if answers.asks is not None:  # OpenAI's way to end a stream
            data = {"anyOf": [data, {"const": "[DONE]"}]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content[_EVENTS] = {"itemSchema": event}  # of OpenAPI 3.2; older readers pass it over
    if answers.text:
        content["text/plain"] = {"schema": {"type": "string"}}
    response: dict[str, Any] = {"description": meaning, "content": content}
    if answers.status == HTTPStatus.ACCEPTED:
        response["headers"] = _headers({"Location": "where the operation can be watched"})
    return response


def _failure(status: int, body: type) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": HTTPStatus(status).phrase,
        "content": {_JSON: {"schema": _reference(body)}},
    }
    if status in _HEADERS:
        response["headers"] = _headers(_HEADERS[status])
    return response


def _headers(meanings: Mapping[str, str]) -> dict[str, Any]:
    return {
        name: {"description": meaning, "schema": {"type": "string"}}
        for name, meaning in meanings.items()
    }


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
