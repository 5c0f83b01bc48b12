"""`flexpert bench observers`: what it costs a service that it is watched.

One service has the same load in turn, alone and with those who watch it: a page's connection, a
`flexpert top` in a terminal of its own, and a scraper of `/metrics`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from flexpert.bench.cost_rounds import (
    WITH,
    WITHOUT,
    CostComparison,
    CostLoad,
    CostReport,
    Note,
    always,
    compare,
    cost_report,
)
from flexpert.bench.load import Target, exchange, parse_reply
from flexpert.bench.service import Service, own_service
from flexpert.errors import FlexpertError

SCRAPE_S = 1.0
PLACEMENT_S = 5.0  # as the page: `LOADS_MS` in dashboard/app.js
_FIRST_S = 30.0  # until an observer sees the service


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserversPlan:
    """observers: names from OBSERVERS. flags: of the service."""

    load: CostLoad
    observers: Sequence[str]
    flags: tuple[str, ...] = ()


def run_observers(plan: ObserversPlan, note: Note) -> CostReport:
    """Raises: FlexpertError"""
    costs = asyncio.run(_measure(plan, note))
    return cost_report(" + ".join(plan.observers), plan.flags, plan.load, costs)


async def _measure(plan: ObserversPlan, note: Note) -> list[CostComparison]:
    async with own_service(plan.flags, report=note) as service:

        @asynccontextmanager
        async def watched() -> AsyncIterator[Service]:
            async with AsyncExitStack() as stack:
                for name in plan.observers:
                    await stack.enter_async_context(OBSERVERS[name](service.target))
                yield service

        return await compare(plan.load, {WITHOUT: always(service), WITH: watched}, note)


@asynccontextmanager
async def _page(target: Target) -> AsyncIterator[None]:
    """The requests of an open page: its stream, and the placement of the layer it shows."""
    request = target.message("GET", "/cluster/stream")
    async with _looking(target, "/cluster/placement?layer=0", PLACEMENT_S):
        begun = asyncio.Event()
        stream = asyncio.create_task(
            exchange(target, request, stall_s=_FIRST_S, on_data=lambda _: begun.set())
        )
        async with _while_running(stream, begun):
            yield


def _metrics(target: Target) -> AbstractAsyncContextManager[None]:
    return _looking(target, "/metrics", SCRAPE_S)


@asynccontextmanager
async def _looking(target: Target, path: str, every_s: float) -> AsyncIterator[None]:
    """A GET again and again, from the first answer on."""
    begun = asyncio.Event()

    async def look() -> None:
        while True:
            reply = parse_reply(await exchange(target, target.message("GET", path)))
            if reply.status != 200:
                raise FlexpertError(f"{path} answered {reply.status}")
            begun.set()
            await asyncio.sleep(every_s)

    async with _while_running(asyncio.create_task(look()), begun):
        yield


@asynccontextmanager
async def _top(target: Target) -> AsyncIterator[None]:
    """`flexpert top`, with a pseudo-terminal to draw on."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpert", "top"),
        *("--url", f"http://{target.host}:{target.port}"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(theirs)
    drawn = asyncio.Event()
    loop = asyncio.get_running_loop()
    seen = bytearray()

    def read() -> None:
        try:
            seen.extend(os.read(ours, 65536))
        except OSError:  # it has ended
            loop.remove_reader(ours)
            return
        if b"tokens/s" in seen:
            drawn.set()
        del seen[:-4096]

    loop.add_reader(ours, read)
    try:
        async with _while_running(asyncio.create_task(process.wait()), drawn):
            yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        loop.remove_reader(ours)
        os.close(ours)


@asynccontextmanager
async def _while_running(task: asyncio.Task[object], begun: asyncio.Event) -> AsyncIterator[None]:
    """From `begun` on; an observer that ends by itself would make the comparison worthless.

    Raises: FlexpertError
    """
    first = asyncio.create_task(begun.wait())
    try:
        await asyncio.wait((task, first), timeout=_FIRST_S, return_when=asyncio.FIRST_COMPLETED)
        if not begun.is_set():
            raise FlexpertError(f"an observer did not begin{_why(task)}")
        yield
        if task.done():
            raise FlexpertError(f"an observer has ended{_why(task)}")
    finally:
        first.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, FlexpertError):
            await task


def _why(task: asyncio.Task[object]) -> str:
    if not task.done() or task.cancelled():
        return ""
    return f": {task.exception() or task.result()}"


OBSERVERS: dict[str, Callable[[Target], AbstractAsyncContextManager[None]]] = {
    "page": _page,
    "top": _top,
    "metrics": _metrics,
}
"""What can be measured, by name."""
