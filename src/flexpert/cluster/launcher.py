"""Starts and ends rank processes on this machine, through the fork server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from flexpert.cluster import forkserver
from flexpert.cluster.forkserver import Exited, RankSpec, Ready, Started, Unusable
from flexpert.config import Config
from flexpert.errors import FlexpertError, ModelError

# Threads that wait for the next parallel region must sleep: ranks share the cores.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "2",
}


class LocalLauncher:
    """Ranks as forks of one warm process; their ends are seen within milliseconds.

    on_exit(rank, status) is called when a process is certainly gone (reaped).
    """

    def __init__(self, on_exit: Callable[[int, int], None]) -> None:
        self._on_exit = on_exit
        self._pids: dict[int, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self, config: Config, timeout_s: float) -> None:
        """Start the fork server and wait until it has imported everything.

        Raises:
            ModelError: the model cannot be opened.
            FlexpertError: it died or took longer than timeout_s.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flexpert.cluster.forkserver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
            )
        ours.setblocking(False)
        self._channel = ours
        self._ready = loop.create_future()
        loop.add_reader(ours, self._receive)
        ours.send(config.model_dump_json().encode())
        try:
            await asyncio.wait_for(self._ready, timeout_s)
        except TimeoutError:
            raise FlexpertError(
                f"torch and transformers were not imported within {timeout_s:.0f} s; "
                "raise cluster.start_timeout_s"
            ) from None

    def spawn(self, spec: RankSpec) -> None:
        """Fork a rank; its end is told through on_exit even if it never came up."""
        if self._channel is None:
            raise FlexpertError("the fork server is not running")
        self._empty.clear()
        self._pids[spec.rank] = 0
        self._channel.send(forkserver.encode(spec))

    def kill(self, rank: int) -> None:
        """SIGKILL; nothing if it is gone already."""
        pid = self._pids.get(rank)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        elif pid == 0:  # the fork is under way: as soon as its pid is known
            self._pids[rank] = -1

    def progress(self, rank: int) -> object:
        """Nanoseconds of processor time of a rank so far; None if it is gone.

        Not from /proc: its ticks of 10 ms hide the little that a rank does which only says that it
        lives, or which gets little of a busy machine. One that wants a processor and gets none is
        starved, not stalled: what is returned for it equals nothing.
        """
        pid = self._pids.get(rank, 0)
        if pid <= 0:
            return None
        try:
            return object() if _is_runnable(pid) else time.clock_gettime_ns(_process_clock(pid))
        except OSError:
            return None

    async def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the ranks to end, kill those that do not, end the fork server. Idempotent."""
        if self._process is None:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        for rank in list(self._pids):
            self.kill(rank)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        self._disconnect()
        process, self._process = self._process, None
        try:
            await asyncio.to_thread(process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _disconnect(self) -> None:
        if self._channel is not None:
            asyncio.get_running_loop().remove_reader(self._channel)
            self._channel.close()
            self._channel = None

    def _receive(self) -> None:
        assert self._channel is not None
        while True:
            try:
                packet = self._channel.recv(1 << 20)
            except BlockingIOError:
                return
            except ConnectionResetError:
                packet = b""
            if not packet:
                self._died()
                return
            self._handle(packet)

    def _handle(self, packet: bytes) -> None:
        answer = forkserver.decode_answer(packet)
        if isinstance(answer, Ready):
            if self._ready and not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(answer, Unusable):
            if self._ready and not self._ready.done():
                self._ready.set_exception(ModelError(answer.error))
        elif isinstance(answer, Started):
            wanted = self._pids.get(answer.rank) != -1
            self._pids[answer.rank] = answer.pid
            if not wanted:
                self.kill(answer.rank)
        elif isinstance(answer, Exited):
            self._gone(answer.rank, answer.status)

    def _gone(self, rank: int, status: int) -> None:
        self._pids.pop(rank, None)
        if not self._pids:
            self._empty.set()
        self._on_exit(rank, status)

    def _died(self) -> None:
        """The fork server is gone, and with it every rank."""
        self._disconnect()
        if self._ready and not self._ready.done():
            self._ready.set_exception(FlexpertError("the fork server ended while it started"))
        for rank in list(self._pids):
            self._gone(rank, -signal.SIGKILL)


def _process_clock(pid: int) -> int:
    """The clock of a process's processor time, as clock_getcpuclockid(3) names it."""
    return ~pid << 3 | 2


def _is_runnable(pid: int) -> bool:
    """Whether any of its threads runs or waits for a processor. Raises: OSError: it is gone."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with (
            contextlib.suppress(FileNotFoundError),
            open(f"/proc/{pid}/task/{thread}/stat") as stat,
        ):
            if stat.read().rpartition(")")[2].split()[0] == "R":
                return True
    return False
