"""What became of a service's ranks while it was measured, from the events that its head keeps.

Nobody listens during the measurement: a head that is listened to says more, and that costs it time.
"""

from __future__ import annotations

import asyncio
import contextlib
from time import perf_counter
from typing import Any

import msgspec

from flexpert.bench.load import (
    LoadError,
    Target,
    call,
    error_message,
    events_so_far,
    exchange,
    parse_reply,
)
from flexpert.cluster.views import ClusterEvent, ClusterView, OperationView

_READ_S = 30.0
_LOOK_S = 0.02
BACK_S = 60.0
RUNNING = ("preparing", "committing")


async def cluster_now(target: Target) -> ClusterView:
    """Raises: LoadError: it does not answer, or is no service of flexpert."""
    status, answer = await call(target, "GET", "/cluster")
    try:
        if status == 200:
            return msgspec.convert(answer, ClusterView, strict=False)  # keys of JSON are texts
    except msgspec.ValidationError:
        pass
    raise LoadError(f"/cluster answered {status}: {error_message(msgspec.json.encode(answer))}")


async def all_back(target: Target) -> None:
    """Wait until no rank is missing and no change runs, for `BACK_S` at most. Raises: LoadError"""
    until = perf_counter() + BACK_S
    while perf_counter() < until:
        view = await cluster_now(target)
        active = sorted(rank.id for rank in view.ranks if rank.state == "active")
        if view.operation is None and active == sorted(view.desired):
            return
        await asyncio.sleep(_LOOK_S)


async def change_ranks(target: Target, body: dict[str, Any]) -> OperationView:
    """A change from its begin to its end. Raises: LoadError: it is refused."""
    status, answer = await call(target, "POST", "/cluster/operations", body)
    while status < 300:
        operation = msgspec.convert(answer, OperationView)
        if operation.state not in RUNNING:
            return operation
        await asyncio.sleep(_LOOK_S)
        status, answer = await call(target, "GET", f"/cluster/operations/{operation.id}")
    raise LoadError(f"HTTP {status}: {error_message(msgspec.json.encode(answer))}")


async def events_since(target: Target, cursor: int) -> list[ClusterEvent]:
    """What has happened since a view with that cursor.

    Raises: LoadError: it is not known any more.
    """
    latest = (await cluster_now(target)).cursor
    if latest <= cursor:
        return []
    pieces: list[tuple[float, bytes]] = []
    events: list[ClusterEvent] = []
    whole = asyncio.Event()
    marker = f"\nid: {latest}\n".encode()
    seen = bytearray()

    def on_data(data: bytes) -> None:
        pieces.append((0.0, data))
        seen.extend(data)
        if marker in seen:
            decode = msgspec.json.Decoder(ClusterEvent).decode
            events[:] = [decode(text) for _, text in events_so_far(pieces)]
            if events and events[-1].number >= latest:
                whole.set()

    request = target.message("GET", f"/cluster/events?since={cursor}")
    reading = asyncio.create_task(exchange(target, request, stall_s=_READ_S, on_data=on_data))
    waiting = asyncio.create_task(whole.wait())
    try:
        await asyncio.wait((reading, waiting), timeout=_READ_S, return_when=asyncio.FIRST_COMPLETED)
        if not whole.is_set():
            said = parse_reply(reading.result()).body if reading.done() else b"nothing in time"
            raise LoadError(f"/cluster/events answered {error_message(said)}")
    finally:
        for task in (reading, waiting):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LoadError):
                await task
    return events
