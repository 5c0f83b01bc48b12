"""OpenAI's batch files: a request a line, an answer a line; what one that broke off has left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from flexpert.errors import ConfigError
from flexpert.reading import shown

BATCH_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
_LONGEST_ID = 512


class BatchRequest(msgspec.Struct, frozen=True):
    """One line of the input. wrong: why it is not sent; ""."""

    custom_id: str
    url: str
    body: dict[str, Any]
    wrong: str = ""


class BatchResponse(msgspec.Struct, frozen=True):
    """What the service has answered, errors included."""

    status_code: int
    request_id: str
    body: Any


class BatchError(msgspec.Struct, frozen=True):
    """Why there is no answer of the service."""

    code: str
    message: str


class BatchAnswer(msgspec.Struct, frozen=True):
    """One line of the output; response or error is there."""

    id: str
    custom_id: str
    response: BatchResponse | None
    error: BatchError | None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code >= 400


def parse_request(line: bytes, number: int) -> BatchRequest:
    """What is wrong with a line that has a custom_id is told in its answer.

    Raises: ConfigError: it has none, so that nobody could tell its answer.
    """
    try:
        told = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"line {number} of the batch is no JSON: {error}") from None
    name = told.get("custom_id") if isinstance(told, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_ID:
        raise ConfigError(f"line {number} of the batch has no custom_id, a text of its own")
    url, body, method = told.get("url"), told.get("body"), told.get("method")
    wrong = ""
    if method != "POST":
        wrong = f"method must be POST, and is {shown(method)}"
    elif url not in BATCH_PATHS:
        wrong = f"url {shown(url)} is not one of {', '.join(BATCH_PATHS)}"
    elif not isinstance(body, dict):
        wrong = "body must be an object"
    elif body.get("stream"):
        wrong = "stream is not possible in a batch"
    return BatchRequest(name, str(url), body if isinstance(body, dict) else {}, wrong)


def requests_of(lines: Iterable[bytes]) -> Iterator[BatchRequest]:
    """Of all lines that are not empty. Raises: ConfigError: two have one custom_id, or one none."""
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = parse_request(line, number)
        if request.custom_id in seen:
            raise ConfigError(
                f"line {number} of the batch has another's custom_id, {shown(request.custom_id)}"
            )
        seen.add(request.custom_id)
        yield request


def answered(data: bytes) -> tuple[set[str], int]:
    """The ids that an output has answers for, and how many of its bytes are whole lines; what is
    behind them is the rest of a line that was not written to its end.

    Raises: ConfigError: it is no output of a batch.
    """
    whole = data.rfind(b"\n") + 1
    names: set[str] = set()
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            names.add(msgspec.json.decode(line, type=BatchAnswer).custom_id)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"line {number} of the output is no answer: {error}") from None
    return names, whole


def refused(request: BatchRequest, answer_id: str) -> BatchAnswer:
    """The answer to a line that cannot be sent."""
    error = BatchError("invalid_request", request.wrong)
    return BatchAnswer(answer_id, request.custom_id, None, error)
