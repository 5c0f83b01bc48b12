"""Failures as Anthropic's API tells them, for the paths that are its own."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from flexpert.server.http_errors import ApiError

MESSAGES = "/v1/messages"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageErrorDetail(msgspec.Struct):
    """type: for programs; message: for people."""

    type: str
    message: str


class MessageErrorBody(msgspec.Struct):
    """What every failure of `/v1/messages` is told with."""

    error: MessageErrorDetail
    type: str = "error"


def is_message_path(path: str) -> bool:
    """Whether a path is of Anthropic's API."""
    return path == MESSAGES or path.startswith(MESSAGES + "/")


def message_error(error: ApiError) -> bytes:
    """The JSON."""
    other = "invalid_request_error" if error.status_code < 500 else "api_error"
    kind = _TYPES.get(error.status_code, other)
    return msgspec.json.encode(MessageErrorBody(MessageErrorDetail(kind, error.detail)))


def error_response(path: str, error: ApiError) -> Response:
    """A failure in the shape that the path's clients expect."""
    if not is_message_path(path):
        return error.response()
    return Response(
        message_error(error),
        error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
