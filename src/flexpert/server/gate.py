"""In front of every route: bearer tokens, the size of bodies, request counts.

Plain ASGI, because a framework's middleware would stand between every token and its socket.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexpert.config import ServerConfig
from flexpert.server.errors import ApiError
from flexpert.server.metrics import ServerMetrics
from flexpert.server.stream import CLIENT_GONE

MAX_BODY_BYTES = 16 * 2**20

# What monitors and browsers ask for without a key. Any other path needs one: a route that is
# added later is closed until somebody decides otherwise.
OPEN_PATHS = frozenset({"/health", "/version", "/metrics", "/docs", "/redoc", "/openapi.json"})
CONTROL_PATHS = ("/cluster", "/scale_elastic_ep", "/is_scaling_elastic_ep")


class Gate:
    """ASGI middleware.

    Args:
        config: api_key and control_key; None leaves its paths open.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: ServerMetrics) -> None:
        self._app = app
        self._api_key = config.api_key
        self._control_key = config.control_key or config.api_key
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # unless the application gets to say otherwise

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                self._check_key(scope)
                limited = _limited(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, counted_send)
            else:
                await self._app(scope, limited, counted_send)
            finally:
                if scope.get(CLIENT_GONE):
                    self._metrics.disconnects.inc()
                # the template, not the path: clients could make up any number of paths
                path = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.requests.labels(scope["method"], path, str(status)).inc()

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if path in OPEN_PATHS:
            return
        control = any(path == one or path.startswith(one + "/") for one in CONTROL_PATHS)
        key = self._control_key if control else self._api_key
        if key is None:
            return
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # in constant time: how long a refusal takes must not tell how much of a key was right
        right = hmac.compare_digest(given.strip().encode(), key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401,
                "missing or wrong API key; send the header 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _limited(scope: Scope, receive: Receive) -> Receive:
    """`receive` that refuses bodies beyond the limit, declared or not.

    Raises:
        ApiError: 413; also from the receive it returns.
    """
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return limited


def _too_large() -> ApiError:
    return ApiError(
        413,
        f"the body exceeds {MAX_BODY_BYTES // 2**20} MiB",
        code="body_too_large",
        headers={"connection": "close"},
    )
