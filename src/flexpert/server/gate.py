"""In front of every route: bearer tokens, requests at once, the size of bodies, request counts.

Plain ASGI, because a framework's middleware would stand between every token and its socket.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexpert.config import ServerConfig
from flexpert.server import dashboard_files
from flexpert.server.forwarding import BODY
from flexpert.server.http_errors import ApiError
from flexpert.server.http_metrics import ServerMetrics
from flexpert.server.keys import BearerKeys, is_right
from flexpert.server.message_errors import error_response, is_message_path
from flexpert.server.protocol import BODY_FAILED
from flexpert.server.stream import CLIENT_GONE

if TYPE_CHECKING:
    from flexpert.server.tracing.request_trace import RequestTrace
    from flexpert.server.tracing.service_tracing import ServiceTracing

# What monitors and browsers ask for without a key. Any other path needs one: a route that is
# added later is closed until somebody decides otherwise.
OPEN_PATHS = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/version",
        "/ping",
        "/load",
        "/metrics",
        "/docs",
        "/redoc",
        "/openapi.json",
    }
)
_WITHOUT_KEY = OPEN_PATHS | dashboard_files.PATHS
CONTROL_PATHS = ("/cluster", "/scale_elastic_ep", "/is_scaling_elastic_ep")

# Bytes. They are parsed on the event loop, and the longest that makes sense names 4096 ranks.
MOST_CONTROL_BODY = 64 * 2**10


class Gate:
    """ASGI middleware.

    Args:
        keys: one that is None leaves its paths open.
        tracing: None: no request is traced.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServerConfig,
        keys: BearerKeys,
        metrics: ServerMetrics,
        tracing: ServiceTracing | None = None,
    ) -> None:
        self._app = app
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._at_once = metrics.at_once
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # unless the application gets to say otherwise
        trace: RequestTrace | None = None
        most = self._config.max_body
        if _is_control(scope["path"]):
            most = min(most, MOST_CONTROL_BODY)
        body = _Body(scope, receive, most)

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                body.answered = True
                if not body.complete:  # whatever else comes is not read as another request
                    message = {**message, "headers": [*message["headers"], _CLOSE]}
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                with self._admitted(scope):
                    body.check()
                    if self._tracing is not None:
                        trace = self._tracing.request(scope)
                    await self._app(scope, body.receive, counted_send)
            except ApiError as error:
                await error_response(scope["path"], error)(scope, receive, counted_send)
            finally:
                if scope.get(CLIENT_GONE):
                    self._metrics.disconnects.inc()
                # the template, not the path: clients could make up any number of paths
                path = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.requests.labels(scope["method"], path, str(status)).inc()
                if trace is not None:
                    trace.end(status, client_gone=CLIENT_GONE in scope)

    @contextmanager
    def _admitted(self, scope: Scope) -> Iterator[None]:
        """For the time of a request that its key, and the number of others, allow.

        Raises:
            ApiError: 401, 429.
        """
        path = scope["path"]
        if path in _WITHOUT_KEY:
            yield
            return
        control = _is_control(path)
        _check_key(scope, self._keys.control if control else self._keys.api)
        # apart, so that a flood of requests does not keep the operator from scaling
        group = "control" if control else "api"
        most = self._config.max_requests_per_key
        if self._at_once[group] >= most:
            raise ApiError(
                429,
                f"{most} requests are being answered, the most at once for one key, or for "
                "everybody where there are no keys (server.max_requests_per_key); try again later",
                type="rate_limit_error",
                code="too_many_requests",
                headers={"retry-after": "1"},
            )
        self._at_once[group] += 1
        try:
            yield
        finally:
            self._at_once[group] -= 1


def _is_control(path: str) -> bool:
    return any(path == one or path.startswith(one + "/") for one in CONTROL_PATHS)


def _check_key(scope: Scope, key: bytes | None) -> None:
    if key is None:
        return
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    right = is_right(given.strip(), key) and scheme.lower() == b"bearer"
    if is_message_path(scope["path"]):
        right |= is_right(_header(scope, b"x-api-key").strip(), key)
    if not right:
        raise ApiError(
            401,
            "missing or wrong API key; send the header 'Authorization: Bearer <key>'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


_CLOSE = (b"connection", b"close")


class _Body:
    """A request's body on its way to the application.

    complete: nothing more of it comes. answered: set by the gate when the answer begins.
    """

    def __init__(self, scope: Scope, receive: Receive, limit: int) -> None:
        self._scope = scope
        self._receive = receive
        self._limit = limit
        self._received = 0
        self._control = _is_control(scope["path"])
        self._declared = _header(scope, b"content-length")
        chunked = _header(scope, b"transfer-encoding")
        self.complete = not chunked and self._declared.strip(b"0") == b""
        self.answered = False

    def check(self) -> None:
        """Raises ApiError for a body that is too large by its headers, or has failed already."""
        if (error := self._failure()) is not None:
            raise error
        declared = self._declared
        # no more digits than int() takes; the parser has refused what is no number
        if declared.isdigit() and (len(declared) > 19 or int(declared) > self._limit):
            raise self._too_large()

    async def receive(self) -> Message:
        """The next piece.

        Raises:
            ApiError: 413; or what ended it, see `protocol.BODY_FAILED`.
        """
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        self._received += len(message.get("body", b""))
        if self._control:  # short; another head may have to answer it
            self._scope.setdefault(BODY, []).append(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        error = self._failure()
        if error is None and self._received > self._limit:
            error = self._too_large()
        if error is None:
            return message
        if self.answered:
            return {"type": "http.disconnect"}
        raise error

    def _failure(self) -> ApiError | None:
        failure: ApiError | None = self._scope.get(BODY_FAILED)
        return failure

    def _too_large(self) -> ApiError:
        setting = "" if _is_control(self._scope["path"]) else " (server.max_body)"
        limit = f"{self._limit} bytes{setting}"
        return ApiError(413, f"the body exceeds {limit}", code="body_too_large")


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header of that name, as it was sent; b"" if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")
