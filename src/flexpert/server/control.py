"""The control API: the cluster, its changes and events; and vLLM's elastic endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query, Request, Response

from flexpert.cluster.handover.messages import ServiceHandedOver
from flexpert.cluster.views import ClusterEvent, OperationView
from flexpert.errors import OperationError
from flexpert.server import wire
from flexpert.server.http_errors import SERVER, ApiError
from flexpert.server.live_feed import LiveFeed
from flexpert.server.schemas import ElasticScaleRequest, OperationRequest
from flexpert.server.stream import GeneratedEvents, event

if TYPE_CHECKING:
    from flexpert.cluster.head import Head
    from flexpert.server.tracing.service_tracing import ServiceTracing

KEEP_ALIVE_S = 15.0
MOST_LAYERS = 4096


class ControlRoutes:
    """The routes over one head.

    Args:
        closing: set when the server shuts down; ends the event streams, which would never end.
        feed: what is shown live.
        tracing: None: nothing is traced.
    """

    def __init__(
        self,
        head: Head,
        closing: asyncio.Event,
        feed: LiveFeed,
        tracing: ServiceTracing | None = None,
    ) -> None:
        self._head = head
        self._tracing = tracing
        self._closing = closing
        self._feed = feed
        self.router = APIRouter(tags=["control"])
        add = self.router.add_api_route
        add("/cluster", self.cluster, methods=["GET"])
        add("/cluster/balance", self.balance, methods=["GET"])
        add("/cluster/events", self.events, methods=["GET"])
        add("/cluster/stream", self.stream, methods=["GET"])
        add("/cluster/placement", self.placement, methods=["GET"])
        add("/cluster/operations", self.begin, methods=["POST"], status_code=202)
        add("/cluster/operations/{id}", self.operation, methods=["GET"])
        add("/cluster/operations/{id}", self.cancel, methods=["DELETE"])
        add("/scale_elastic_ep", self.scale_elastic_ep, methods=["POST"])
        for method in ("GET", "POST"):  # SGLang's clients ask with the one, vLLM's with the other
            add("/is_scaling_elastic_ep", self.is_scaling_elastic_ep, methods=[method])

    async def cluster(self) -> Response:
        """Epoch, ranks, placement, and the operation that runs."""
        return wire.json_response(self._head.cluster())

    async def balance(self) -> Response:
        """How often each expert was chosen lately, and what a rebalance would move and gain."""
        return wire.json_response(self._head.proposed_rebalance())

    async def stream(self) -> Response:
        """Server-sent events for a page that shows the service live: first "snapshot", the whole
        with the latest operations and figures; each second "change", what is different; between
        them what happens, as in `/cluster/events`. Who reads too slowly is told "overrun"."""
        self._feed.check_room()
        self._head.cluster()  # an error has a status only now
        return GeneratedEvents(self._feed.watch())

    async def placement(self, layer: Annotated[int, Query(ge=0, le=MOST_LAYERS)] = 0) -> Response:
        """Which rank holds which expert of one MoE layer, counted from 0."""
        return wire.json_response(self._head.layer_placement(layer))

    async def begin(self, request: Request, body: OperationRequest) -> Response:
        """Start a change: 202; 409 while another runs, or if the operation_id is that of another;
        400 if it can never be reached. dry_run: only say what it would move, 200."""
        if body.dry_run:
            preview = await self._head.preview_operation(
                ranks=body.ranks, add=body.add, remove=body.remove, rebalance=body.rebalance
            )
            return wire.json_response(preview)
        if body.rebalance:
            operation = self._head.rebalance(body.operation_id)
        else:
            operation = await self._head.request_operation(
                ranks=body.ranks, add=body.add, remove=body.remove, operation_id=body.operation_id
            )
        if self._tracing is not None:
            self._tracing.asked_for(operation, request.scope)
        location = {"location": f"/cluster/operations/{operation.id}"}
        return wire.json_response(operation, 202, headers=location)

    async def operation(self, id: str) -> Response:
        """How a change goes."""
        return wire.json_response(self._head.operation(id))

    async def cancel(self, id: str) -> Response:
        """Undo a change that has not been committed; 409 afterwards."""
        return wire.json_response(self._head.cancel_operation(id))

    async def events(
        self, request: Request, since: Annotated[int | None, Query(ge=0)] = None
    ) -> Response:
        """Server-sent events: first "cluster", the whole view, then what happens, as it does.

        since: the number of the latest event that is known, or the cursor of a view: what came
        after it, and no view. A client that connects again may say it as `Last-Event-ID`.
        """
        last = request.headers.get("last-event-id", "")
        if since is None and last.isascii() and last.isdecimal():
            since = int(last[:20])
        if since is not None:
            self._head.check_cursor(since)
        return GeneratedEvents(self._events(since))

    async def scale_elastic_ep(self, request: Request, body: ElasticScaleRequest) -> Response:
        """vLLM's and SGLang's way: change the number of ranks and wait until that is done.

        As in vLLM 408 means that the size is what it was, so a change that this request began
        is taken back, unless it is already being committed.
        """
        before = self._head.cluster().operation
        operation = await self._head.request_operation(
            ranks=body.size, operation_id=body.operation_id
        )
        if self._tracing is not None:
            self._tracing.asked_for(operation, request.scope)
        ours = before is None or before.id != operation.id
        try:
            async with asyncio.timeout(body.drain_timeout):
                operation = await self._head.wait_operation(operation.id)
        except TimeoutError:
            if ours:
                with suppress(OperationError):
                    operation = self._head.cancel_operation(operation.id)
            raise _too_late(operation, body.drain_timeout) from None
        if operation.state != "done":
            message = f"scaling {operation.state}: {operation.error or 'no reason was given'}"
            raise ApiError(500, message, type=SERVER, code="operation_failed")
        return wire.json_response(wire.ScaleMessage(f"scaled to {body.size} data parallel ranks"))

    async def is_scaling_elastic_ep(self) -> Response:
        """vLLM's and SGLang's question whether a change runs, and how it goes."""
        cluster = self._head.cluster()
        shown = cluster.operation or self._head.latest_request
        size = len(shown.target) if shown else None
        error = shown.error if shown else None
        state = wire.ScaleState(
            is_scaling_elastic_ep=cluster.operation is not None,
            phase=shown.phase if shown else "idle",
            epoch=cluster.epoch,
            error=error,
            requested_size=size,
            operation_id=shown.id if shown else None,
            effective_ep_size=sum(rank.state in ("active", "leaving") for rank in cluster.ranks),
            pending_ep_size=size if cluster.operation else None,
            last_error=error,
        )
        return wire.json_response(state)

    async def _events(self, since: int | None = None) -> AsyncGenerator[bytes, None]:
        source = self._head.events(since)
        upcoming = asyncio.ensure_future(_next(source))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.sleep(0)  # it listens before we look: nothing can fall in between
            if since is None:
                try:
                    view = self._head.cluster()
                except ServiceHandedOver:
                    return  # the client asks again, and comes to the head that goes on
                yield event(wire.encode(view), name="cluster")
            else:
                yield b": goes on\n\n"  # the client sees that it is listened to
            while True:
                await asyncio.wait(
                    (upcoming, closing),
                    timeout=KEEP_ALIVE_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if closing.done():
                    return
                if not upcoming.done():
                    yield b": keep-alive\n\n"
                    continue
                item = upcoming.result()
                if item is None:
                    return
                upcoming = asyncio.ensure_future(_next(source))
                number = b"%d" % item.number if item.number else b""
                yield event(wire.encode(item), name=item.kind, id=number)
        finally:
            upcoming.cancel()  # ends the head's iterator, which waits inside
            closing.cancel()


async def _next(source: AsyncIterator[ClusterEvent]) -> ClusterEvent | None:
    return await anext(source, None)


def _too_late(operation: OperationView, limit_s: float) -> ApiError:
    fate = "it was taken back" if operation.state == "cancelled" else "it goes on"
    return ApiError(
        408,
        f"operation {operation.id} was not done within {limit_s} s (phase {operation.phase}); "
        f"{fate}, see GET /cluster/operations/{operation.id}",
        code="operation_timeout",
    )
