"""All routes over one head, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from http import HTTPMethod
from typing import TYPE_CHECKING, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

import flexpert
from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.views import Readiness
from flexpert.errors import FlexpertError
from flexpert.frontend.request_limits import RequestLimits
from flexpert.frontend.tools.answer_parser import parser_names
from flexpert.server import fields, wire
from flexpert.server.control import ControlRoutes
from flexpert.server.dashboard_routes import PageRoute, dashboard_routes
from flexpert.server.forwarding import BODY, ForwardedAnswer, hand_responses_over, keep_response
from flexpert.server.gate import Gate
from flexpert.server.http_errors import ApiError, api_error, validation_error
from flexpert.server.http_metrics import ServerMetrics
from flexpert.server.keys import BearerKeys, read_keys
from flexpert.server.live_feed import LiveFeed
from flexpert.server.message_errors import error_response
from flexpert.server.messages_api import MessagesRoutes
from flexpert.server.metrics_text import MetricsText
from flexpert.server.openai import OpenAIRoutes, is_json
from flexpert.server.openapi import DescribedAPI
from flexpert.server.preprocessors import Preprocessors
from flexpert.server.responses_api import ResponsesRoutes
from flexpert.server.stream import CLIENT_GONE, ClientGone
from flexpert.server.unserved import unknown_path, wrong_content_type, wrong_method
from flexpert.server.vllm_metrics import named

if TYPE_CHECKING:
    from flexpert.cluster.head import Head
    from flexpert.server.tracing.service_tracing import ServiceTracing

log = logging.getLogger("flexpert.server")

MOST_PROMPT_TOKENS = 2**20  # of one request, unless the settings say otherwise


def create_app(
    head: Head, keys: BearerKeys | None = None, tracing: ServiceTracing | None = None
) -> FastAPI:
    """The HTTP side of a head that has been started.

    Args:
        keys: default: those that the head's settings name.
        tracing: None: nothing is traced.

    `app.state.closing` is an asyncio.Event; set it before shutting the server down, so that
    event streams end. `app.state.preprocessors` may be started ahead, and must be closed.
    `app.state.metrics` are the `ServerMetrics`. `app.state.feed` keeps figures once it is started.
    """
    app = DescribedAPI(title="flexpert", version=flexpert.__version__, redirect_slashes=False)
    metrics = ServerMetrics()
    app.state.closing = asyncio.Event()
    app.state.metrics = metrics
    if tracing is not None:
        head.tracer = tracing
    head.registries.append(metrics.registry)
    app.state.preprocessors = _preprocessors(head)
    openai = OpenAIRoutes(head, metrics, app.state.preprocessors)
    app.include_router(openai.router)
    responses = ResponsesRoutes(openai)
    app.include_router(responses.router)
    app.include_router(MessagesRoutes(openai).router)
    app.state.feed = LiveFeed(head, metrics, app.state.closing)
    app.include_router(ControlRoutes(head, app.state.closing, app.state.feed, tracing).router)
    app.router.routes += dashboard_routes()
    _add_service_routes(app, head, metrics)
    config = head.config.server
    app.add_middleware(
        Gate, config=config, keys=keys or read_keys(config), metrics=metrics, tracing=tracing
    )
    if config.origins:  # in front of the gate: a browser asks without a key what it may send
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[fields.IGNORED_HEADER, "retry-after"],
        )
    for kind in (FlexpertError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    head.succession.on_handed.append(app.state.preprocessors.hand_over)
    hand_responses_over(responses.stored, head.succession)
    head.succession.serve_app(app, partial(keep_response, responses.stored))

    async def on_handed_over(request: Request, error: Exception) -> Response:
        return ForwardedAnswer(head.succession, request.scope.pop(BODY, []))

    app.add_exception_handler(ServiceHandedOver, on_handed_over)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return app


def _preprocessors(head: Head) -> Preprocessors:
    server = head.config.server
    template = head.tables.chat_template if head.tables else None
    parsers = parser_names(server.tool_call_parser, server.reasoning_parser, template)

    def limits() -> RequestLimits:
        context = head.info.max_model_len
        return RequestLimits(
            model=head.model_name,
            vocab=head.info.vocab,
            max_model_len=context,
            max_choices=server.max_choices,
            max_prompt_tokens=server.max_prompt_tokens or max(MOST_PROMPT_TOKENS, context),
            defaults=head.sampling_defaults,
            lenient=server.lenient,
            trust_chat_template=server.trust_request_chat_template,
            skip_tokenizer=head.config.model.skip_tokenizer_init,
            parsers=parsers,
        )

    return Preprocessors(head, limits, server.preprocess_timeout)


def _add_service_routes(app: FastAPI, head: Head, metrics: ServerMetrics) -> None:
    text = MetricsText()

    async def health() -> Response:
        """200 while requests are answered, through every change of the cluster; else 503."""
        state = head.readiness()
        return _health(state, well=state.ready)

    async def live() -> Response:
        """503 once the service has failed for good: only a new process helps."""
        state = head.readiness()
        return _health(state, well=state.live)

    async def version() -> Response:
        """flexpert's."""
        return wire.json_response(wire.Version(flexpert.__version__))

    async def load() -> Response:
        """vLLM's: API requests being answered."""
        return wire.json_response(wire.ServerLoad(metrics.at_once["api"]))

    async def prometheus() -> Response:
        """For prometheus: ranks, engine, cluster and HTTP."""
        shown = named(head.measured(), head.model_name, head.config.server.metrics_names)
        return Response(text.of(shown), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.add_api_route("/health", health, methods=["GET"], tags=["service"])
    app.add_api_route("/health/ready", health, methods=["GET"], tags=["service"])
    app.add_api_route("/health/live", live, methods=["GET"], tags=["service"])
    for method in ("GET", "POST"):  # as SageMaker and vLLM have it
        app.add_api_route("/ping", health, methods=[method], tags=["service"])
    app.add_api_route("/load", load, methods=["GET"], tags=["service"])
    app.add_api_route("/version", version, methods=["GET"], tags=["service"])
    app.add_api_route("/metrics", prometheus, methods=["GET"], tags=["service"])


def _health(state: Readiness, *, well: bool) -> Response:
    status: Literal["ok", "unavailable"] = "ok" if well else "unavailable"
    body = wire.Health(
        status, live=state.live, ready=state.ready, reason=state.reason, state=state.state
    )
    return wire.json_response(body, 200 if well else 503)


async def _on_error(request: Request, error: Exception) -> Response:
    path = request.scope["path"]
    answer = api_error(error)
    if answer.status_code >= 500:
        log.error("%s %r: %s", request.method, path, error)
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):  # no route fits
        if answer.status_code == 404:
            answer = unknown_path(path, _paths(request.app.router))
        elif answer.status_code == 405:
            # starlette names the methods of the first route of this path only
            answer = wrong_method(request.method, path, _methods(request))
    return error_response(path, answer)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    request.scope[CLIENT_GONE] = True
    return Response(status_code=499)  # for the request counter; nobody reads it


def _paths(router: object) -> list[str]:
    """All that a router serves, with those of the routers that were included in it."""
    found: list[str] = []
    for route in getattr(router, "routes", ()):
        if isinstance(route, PageRoute):  # for browsers alone
            continue
        included = getattr(route, "original_router", None)
        found += [route.path] if included is None else _paths(included)
    return found


def _methods(request: Request) -> list[str]:
    """All that the request's path may be asked with."""
    routes = request.app.router.routes
    return [
        method
        for method in HTTPMethod
        if any(r.matches({**request.scope, "method": method})[0] is Match.FULL for r in routes)
    ]


async def _on_validation_error(request: Request, error: Exception) -> Response:
    given = request.headers.get("content-type")
    findings = error.errors() if isinstance(error, RequestValidationError) else [{}]
    of_body = not findings[0].get("loc") or findings[0]["loc"][0] == "body"
    if of_body and (given is None or not is_json(given)):  # FastAPI has not parsed such a body
        return wrong_content_type(given).response()
    return validation_error(findings).response()
