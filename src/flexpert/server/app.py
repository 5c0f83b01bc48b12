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

if TYPE_CHECKING:
    from flexpert.cluster.head import Head

log = logging.getLogger("flexpert.server")


def create_app(head: Head) -> FastAPI:
    """The HTTP side of a head that has been started.

    `app.state.closing` is an asyncio.Event; set it before shutting the server down, so that
    event streams end.
    """
    app = FastAPI(title="flexpert", version=flexpert.__version__)
    metrics = ServerMetrics()
    app.state.closing = asyncio.Event()
    app.include_router(OpenAIRoutes(head, metrics).router)
    app.include_router(ControlRoutes(head, app.state.closing).router)
    _add_service_routes(app, head, metrics)
    app.add_middleware(Gate, config=head.config.server, metrics=metrics)
    for kind in (FlexpertError, HTTPException, Exception):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    return app


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


async def _on_validation_error(request: Request, error: Exception) -> Response:
    findings = error.errors() if isinstance(error, RequestValidationError) else [{}]
    return validation_error(findings).response()
