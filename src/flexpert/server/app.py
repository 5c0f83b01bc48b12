"""All routes over one head, as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import flexpert
from flexpert.errors import FlexpertError
from flexpert.server import wire
from flexpert.server.control import ControlRoutes
from flexpert.server.errors import ApiError, api_error, validation_error
from flexpert.server.gate import Gate
from flexpert.server.metrics import ServerMetrics
from flexpert.server.openai import OpenAIRoutes
from flexpert.server.preprocessing import Limits
from flexpert.server.preprocessors import Preprocessors
from flexpert.server.stream import CLIENT_GONE, ClientGone

if TYPE_CHECKING:
    from flexpert.cluster.head import Head

log = logging.getLogger("flexpert.server")

MOST_PROMPT_TOKENS = 2**20  # of one request, unless the settings say otherwise


def create_app(head: Head) -> FastAPI:
    """The HTTP side of a head that has been started.

    `app.state.closing` is an asyncio.Event; set it before shutting the server down, so that
    event streams end. `app.state.preprocessors` may be started ahead, and must be closed.
    """
    app = FastAPI(title="flexpert", version=flexpert.__version__)
    metrics = ServerMetrics()
    app.state.closing = asyncio.Event()
    app.state.preprocessors = _preprocessors(head)
    app.include_router(OpenAIRoutes(head, metrics, app.state.preprocessors).router)
    app.include_router(ControlRoutes(head, app.state.closing).router)
    _add_service_routes(app, head, metrics)
    app.add_middleware(Gate, config=head.config.server, metrics=metrics)
    for kind in (FlexpertError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(ClientGone, _on_client_gone)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return app


def _preprocessors(head: Head) -> Preprocessors:
    server = head.config.server

    def limits() -> Limits:
        context = head.info.max_model_len
        return Limits(
            model=head.model_name,
            vocab=head.info.vocab,
            max_model_len=context,
            max_choices=server.max_choices,
            max_prompt_tokens=server.max_prompt_tokens or max(MOST_PROMPT_TOKENS, context),
        )

    return Preprocessors(head, limits, server.preprocess_timeout_s)


def _add_service_routes(app: FastAPI, head: Head, metrics: ServerMetrics) -> None:
    async def health() -> Response:
        """200 while requests are accepted, through every change of the cluster; else 503."""
        if not head.serving:
            message = "the service does not accept requests"
            raise ApiError(503, message, type="service_unavailable")
        return wire.json_response(wire.Health())

    async def version() -> Response:
        """flexpert's."""
        return wire.json_response(wire.Version(flexpert.__version__))

    async def prometheus() -> Response:
        """For prometheus: ranks, engine, cluster and HTTP."""
        return metrics.response(head.registry)

    app.add_api_route("/health", health, methods=["GET"], tags=["service"])
    app.add_api_route("/version", version, methods=["GET"], tags=["service"])
    app.add_api_route("/metrics", prometheus, methods=["GET"], tags=["service"])


async def _on_error(request: Request, error: Exception) -> Response:
    answer = api_error(error)
    if answer.status_code >= 500:
        log.error("%s %s: %s", request.method, request.url.path, error)
    return answer.response()


async def _on_client_gone(request: Request, error: Exception) -> Response:
    request.scope[CLIENT_GONE] = True
    return Response(status_code=499)  # for the request counter; nobody reads it


async def _on_validation_error(request: Request, error: Exception) -> Response:
    findings = error.errors() if isinstance(error, RequestValidationError) else [{}]
    return validation_error(findings).response()
