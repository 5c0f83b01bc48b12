"""Requests on connections of a head that was taken over are answered by the one that goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexpert.cluster.handover.follower import LinkLost
from flexpert.cluster.handover.messages import KeptResponse
from flexpert.cluster.handover.succession import Succession
from flexpert.forking.framing import Piece
from flexpert.server.http_errors import ApiError
from flexpert.server.stored_responses import StoredResponse, StoredResponses

log = logging.getLogger("flexpert.server")

# Key in the ASGI scope: the pieces of a body that has been read, until its request is submitted.
BODY = "flexpert.body"

_CLOSE = (b"connection", b"close")


class Forwarding:
    """ASGI, outermost: to the application, or to the head that goes on."""

    def __init__(self, app: ASGIApp, succession: Succession) -> None:
        self._app = app
        self._succession = succession
        self._handed = succession.handed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._handed.is_set():
            await forward(self._succession, scope, receive, send)
        else:
            await self._app(scope, receive, send)


class ForwardedAnswer(Response):
    """To a request that had begun here. body: what has been read of it; all of it."""

    def __init__(self, succession: Succession, body: Sequence[Piece]) -> None:
        super().__init__()
        self._succession = succession
        self._read = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await forward(self._succession, scope, receive, send, self._read)


def hand_responses_over(stored: StoredResponses, succession: Succession) -> None:
    """What is stored, or comes later, goes to the head that goes on as soon as there is one."""

    def give(id: str, response: StoredResponse) -> None:
        succession.follower.keep(KeptResponse(id, response.body, response.history))

    def give_all() -> None:
        for id, response in stored.items():
            give(id, response)
        stored.on_put = give

    succession.on_handed.append(give_all)


def keep_response(stored: StoredResponses, response: KeptResponse) -> None:
    """Of a head that was taken over."""
    stored.put(response.id, StoredResponse(response.body, response.history))


async def forward(
    succession: Succession,
    scope: Scope,
    receive: Receive,
    send: Send,
    body: Sequence[Piece] | None = None,
) -> None:
    """The other head's answer; the connection ends with it, so that the next request goes there."""
    begun = False

    async def tell(message: Message) -> None:
        nonlocal begun
        if message["type"] == "http.response.start":
            begun = True
            headers = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
            message = {**message, "headers": [*headers, _CLOSE]}
        await send(message)

    try:
        await succession.follower.forward(scope, receive, tell, body)
    except LinkLost as error:
        log.warning("%s %r was not answered: %s", scope["method"], scope["path"], error)
        if begun:
            raise
        refused = ApiError(
            503, f"{error}; ask again", type="service_unavailable", headers={"retry-after": "1"}
        )
        await refused.response()(scope, receive, tell)
