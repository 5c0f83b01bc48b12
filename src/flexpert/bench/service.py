"""A service of our own for the time of a demonstration or a measurement."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from flexpert.bench.load import Target
from flexpert.errors import FlexpertError

# the line of `server/service_process.py` that says where it listens
READY = "ready: "

_PR_SET_PDEATHSIG = 1
_KEPT_LINES = 2000


@dataclass(frozen=True, slots=True)
class Service:
    """A service that answers. output: the last lines it printed, while it goes on."""

    target: Target
    pid: int
    output: deque[str]


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
    libc = ctypes.CDLL(None)  # before the fork: nothing may be loaded between fork and exec
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpert", "serve", "--host", "127.0.0.1", "--port", "0"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    reader: asyncio.Task[None] | None = None
    try:
        try:
            async with asyncio.timeout(start_timeout_s):
                url = await _ready(process, lines, report)
        except TimeoutError:
            raise FlexpertError(
                f"the service was not ready after {start_timeout_s:g} s{_tail(lines)}"
            ) from None
        reader = asyncio.create_task(_drain(process, lines))
        yield Service(Target.parse(url.removesuffix("/v1"), key), process.pid, lines)
    finally:
        await asyncio.shield(_stop(process, stop_timeout_s))
        if reader:
            reader.cancel()


async def _ready(
    process: asyncio.subprocess.Process,
    lines: deque[str],
    report: Callable[[str], None] | None,
) -> str:
    assert process.stdout is not None
    async for raw in process.stdout:
        line = raw.decode("utf-8", "replace").rstrip()
        if line.startswith(READY):
            return line.removeprefix(READY)
        lines.append(line)
        if report:
            report(line)
    status = await process.wait()
    raise FlexpertError(f"the service did not start (exit status {status}){_tail(lines)}")


async def _drain(process: asyncio.subprocess.Process, lines: deque[str]) -> None:
    assert process.stdout is not None
    async for raw in process.stdout:
        lines.append(raw.decode("utf-8", "replace").rstrip())


def _tail(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return "; its last lines:\n  " + "\n  ".join(list(lines)[-15:])


async def _stop(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            process.kill()
            await process.wait()
        except BaseException:  # a second Ctrl-C: no more patience
            process.kill()
            raise
    with contextlib.suppress(ProcessLookupError):  # whoever of its session is left
        os.killpg(process.pid, signal.SIGKILL)
