"""A service of our own for the time of a demonstration or a measurement."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from flexpert.bench.child_process import ChildProcess, own_process
from flexpert.bench.load import Target
from flexpert.errors import FlexpertError

# the line of `server/service_process.py` that says where it listens
READY = "ready: "


@dataclass(frozen=True, slots=True)
class Service:
    """A service that answers. output: the last lines it printed, while it goes on. observers: pids
    of those who watch it for a measurement."""

    target: Target
    pid: int
    output: deque[str]
    observers: tuple[int, ...] = ()


@asynccontextmanager
async def own_service(
    arguments: Sequence[str] = (),
    *,
    key: str | None = None,
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float = 180.0,
    stop_timeout_s: float = 15.0,
    report: Callable[[str], None] | None = None,
) -> AsyncIterator[Service]:
    """`flexpert serve` in a process of its own on a free port; ended however the block ends.

    It runs in its own session, so that Ctrl-C at the terminal reaches only us, and dies with us
    even if we are killed.

    Args:
        arguments: flags of `flexpert serve` besides --host and --port.
        environment: of it, besides our own.
        report: told each line it prints until it is ready.

    Raises:
        FlexpertError: it ended, or was not ready in time; with the last lines it printed.
    """
    command = [sys.executable, "-m", "flexpert", "serve", "--host", "127.0.0.1", "--port", "0"]
    async with own_process([*command, *arguments], environment, stop_timeout_s) as child:
        try:
            async with asyncio.timeout(start_timeout_s):
                url = await _ready(child, report)
        except TimeoutError:
            raise FlexpertError(
                f"the service was not ready after {start_timeout_s:g} s{child.last_words()}"
            ) from None
        child.keep_lines()
        yield Service(Target.parse(url.removesuffix("/v1"), key), child.pid, child.output)


async def _ready(child: ChildProcess, report: Callable[[str], None] | None) -> str:
    async for line in child.lines():
        if line.startswith(READY):
            return line.removeprefix(READY)
        child.output.append(line)
        if report:
            report(line)
    status = await child.end()
    raise FlexpertError(f"the service did not start (exit status {status}){child.last_words()}")
