"""`flexpert bench observers`: what it costs a service that it is watched.

One service has the same load in turn, alone and with those who watch it: a page's connection, a
`flexpert top` in a terminal of its own, and a scraper of `/metrics`, each a process of its own. On
machines of few cores they take from the service what they need themselves; what the service pays is
its own processor time.
"""

from __future__ import annotations

import asyncio
import os
import pty
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from flexpert.bench.child_process import ChildProcess, own_process
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
from flexpert.bench.load import Target
from flexpert.bench.observer_process import WATCHING
from flexpert.bench.service import Service, own_service
from flexpert.errors import FlexpertError

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
                pids = [
                    await stack.enter_async_context(OBSERVERS[name](service.target))
                    for name in plan.observers
                ]
                yield replace(service, observers=tuple(pids))

        return await compare(plan.load, {WITHOUT: always(service), WITH: watched}, note)


@asynccontextmanager
async def _observer(name: str, target: Target) -> AsyncIterator[int]:
    command = [sys.executable, "-m", "flexpert.bench.observer_process", name, target.url]
    async with own_process(command) as child:
        begun = asyncio.Event()
        child.keep_lines(lambda line: begun.set() if line == WATCHING else None)
        async with _while_running(child, begun):
            yield child.pid


def _page(target: Target) -> AbstractAsyncContextManager[int]:
    return _observer("page", target)


def _metrics(target: Target) -> AbstractAsyncContextManager[int]:
    return _observer("metrics", target)


@asynccontextmanager
async def _top(target: Target) -> AsyncIterator[int]:
    """`flexpert top`, with a pseudo-terminal to draw on."""
    ours, theirs = pty.openpty()
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
    environment = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "flexpert", "top", "--url", target.url]
    try:
        async with own_process(command, environment, terminal=theirs) as child:
            os.close(theirs)
            async with _while_running(child, drawn):
                yield child.pid
    finally:
        loop.remove_reader(ours)
        os.close(ours)


@asynccontextmanager
async def _while_running(child: ChildProcess, begun: asyncio.Event) -> AsyncIterator[None]:
    """From `begun` on; an observer that ends by itself would make the comparison worthless.

    Raises: FlexpertError
    """
    first = asyncio.create_task(begun.wait())
    end = asyncio.create_task(child.process.wait())
    try:
        await asyncio.wait((end, first), timeout=_FIRST_S, return_when=asyncio.FIRST_COMPLETED)
        if not begun.is_set():
            raise FlexpertError(f"an observer did not begin{await _why(child)}")
        yield
        if end.done():
            raise FlexpertError(f"an observer has ended{await _why(child)}")
    finally:
        first.cancel()
        end.cancel()


async def _why(child: ChildProcess) -> str:
    if child.process.returncode is not None:
        await child.end()
    return child.last_words()


OBSERVERS: dict[str, Callable[[Target], AbstractAsyncContextManager[int]]] = {
    "page": _page,
    "top": _top,
    "metrics": _metrics,
}
"""What can be measured, by name; each gives the pid of who watches."""
