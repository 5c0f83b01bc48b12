"""Every failure as OpenAI's error body: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from flexpert.errors import (
    ContextOverflow,
    CursorLost,
    FlexpertError,
    OperationConflict,
    OperationRefused,
    Overloaded,
    RequestError,
    ServiceStopped,
    UnknownOperation,
)

INVALID = "invalid_request_error"
SERVER = "server_error"

_EMPTY = "EOF while parsing a value at line 1 column 0"  # pydantic's, of a body of no bytes


class ErrorDetail(msgspec.Struct):
    """message: for people; type, code: for programs; param: the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """What every failure is told with."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A failure with its HTTP status; param: the field at fault, code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.type = type
        self.param = param
        self.code = code

    @property
    def body(self) -> bytes:
        """The JSON."""
        error = ErrorDetail(self.detail, self.type, self.param, self.code)
        return msgspec.json.encode(ErrorBody(error))

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            self.body, self.status_code, headers=self.headers, media_type="application/json"
        )


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception; of an unexpected one, nothing but that it happened."""
    match error:
        case ApiError():
            return error
        case HTTPException():
            kind = INVALID if error.status_code < 500 else SERVER
            return ApiError(error.status_code, error.detail, type=kind, headers=error.headers)
        case ContextOverflow():
            return ApiError(400, str(error), code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.field)
        case OperationConflict():
            return ApiError(409, str(error), code="operation_conflict")
        case OperationRefused():
            return ApiError(400, str(error), code="operation_refused")
        case CursorLost():
            return ApiError(410, str(error), code="cursor_lost")
        case UnknownOperation():
            return ApiError(404, str(error), code="operation_not_found")
        case Overloaded():
            after = {"retry-after": "1"}
            return ApiError(
                429, str(error), type="rate_limit_error", code="overloaded", headers=after
            )
        case ServiceStopped():
            return ApiError(503, str(error), type="service_unavailable")
        case FlexpertError():
            return ApiError(500, str(error), type=SERVER)
        case _:
            message = "internal error; the server's log has the details"
            return ApiError(500, message, type=SERVER)


def validation_error(errors: Sequence[Any]) -> ApiError:
    """Pydantic's findings (`ValidationError.errors()`) with the first field at fault named."""
    first = errors[0]
    if first["type"] == "json_invalid":
        wrong = first["ctx"]["error"]
        if wrong == _EMPTY:
            return ApiError(400, "the body is empty; it must be a JSON object")
        return ApiError(400, f"the body is not valid JSON: {wrong}")
    path = [str(item) for item in first["loc"] if item not in ("body", "query")]
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return ApiError(400, f"the body: {message}")
    return ApiError(400, f"{'.'.join(path)}: {message}", param=path[0])


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Refusals of a request that was translated into another one name the fields that its client
    has sent. names: field there → field here.

    Raises: ApiError
    """
    try:
        yield
    except ContextOverflow:
        raise
    except (ValidationError, RequestError) as error:
        if isinstance(error, ValidationError):
            found = validation_error(error.errors(include_url=False, include_input=False))
        else:
            found = api_error(error)
        if found.param is not None and found.param in names:
            name, other = found.param, names[found.param]
            found.param = other
            if found.detail.startswith(name):
                found.detail = other + found.detail.removeprefix(name)
        raise found from None


def unknown_model(name: str) -> ApiError:
    """404 as OpenAI words it to programs."""
    message = f"the model {name!r} does not exist; GET /v1/models lists what is served"
    return ApiError(404, message, param="model", code="model_not_found")
