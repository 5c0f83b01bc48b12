"""A server in a process of its own for the time of a measurement, whatever server it is."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

_PR_SET_PDEATHSIG = 1
_KEPT_LINES = 2000


@dataclass(slots=True)
class ChildProcess:
    """output: the last lines of what it printed that were read."""

    process: asyncio.subprocess.Process
    output: deque[str] = field(default_factory=lambda: deque(maxlen=_KEPT_LINES))
    _reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    async def lines(self) -> AsyncIterator[str]:
        """What it prints, as long as it prints."""
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            yield raw.decode("utf-8", "replace").rstrip()

    def keep_lines(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Read on from now, so that its pipe is never full. tell: gets each line, too."""

        async def read() -> None:
            async for line in self.lines():
                self.output.append(line)
                tell(line)

        self._reader = asyncio.create_task(read())

    async def end(self) -> int:
        """Its exit status, once it has ended and all it printed was read."""
        status = await self.process.wait()
        if self._reader is not None:
            await self._reader
        return status

    def last_words(self) -> str:
        """For the end of a message."""
        if not self.output:
            return ""
        return "; its last lines:\n  " + "\n  ".join(list(self.output)[-15:])

    async def stop(self, timeout_s: float) -> None:
        """It and all of its session."""
        process = self.process
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

    def stop_reading(self) -> None:
        if self._reader is not None:
            self._reader.cancel()


@asynccontextmanager
async def own_process(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stop_timeout_s: float = 15,
    *,
    terminal: int | None = None,
) -> AsyncIterator[ChildProcess]:
    """A process that is ended however the block ends; whoever has it reads what it prints.

    It runs in its own session, so that Ctrl-C at the terminal reaches only us, and dies with us
    even if we are killed.

    Args:
        environment: of it, besides our own.
        terminal: a descriptor that it reads from and writes to, if it is to draw on one.

    Raises:
        OSError: the program cannot be run.
    """
    libc = ctypes.CDLL(None)  # before the fork: nothing may be loaded between fork and exec
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL if terminal is None else terminal,
        stdout=asyncio.subprocess.PIPE if terminal is None else terminal,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    child = ChildProcess(process)
    try:
        yield child
    finally:
        await asyncio.shield(child.stop(stop_timeout_s))
        child.stop_reading()
