"""Starts and ends rank processes on this machine, through the fork server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from flexpert.cluster import forkserver
from flexpert.cluster.forkserver import Exited, RankSpec, Ready, Started, Unusable
from flexpert.cluster.ports import Work
from flexpert.config import Config
from flexpert.errors import FlexpertError, ModelError

log = logging.getLogger("flexpert")

_ENVIRONMENT = {
    # threads that wait for the next parallel region must sleep: ranks share the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    # whether there is a GPU is asked without CUDA: a process that used it cannot be forked
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # numpy's would start its threads when it is imported; and a fork has but the one that forks
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}


# of /proc/…/stat, after the name
_STATE, _PARENT, _MINOR_FAULTS, _MAJOR_FAULTS = 0, 1, 7, 9


class LocalLauncher:
    """Ranks as forks of one warm process; their ends are seen within milliseconds.

    If that process ends, its ranks end with it, and the next `spawn` starts another one.

    on_exit(rank, status, why) is called when a process is certainly gone (reaped); why: what is
    known beyond its status, or "".
    """

    def __init__(self, on_exit: Callable[[int, int, str], None]) -> None:
        self._on_exit = on_exit
        self._config: Config | None = None
        self._timeout_s = 0.0
        self._children: dict[int, _Child] = {}
        self._waiting: list[RankSpec] = []  # for a fork server that is starting
        self._starting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
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
        self._config, self._timeout_s = config, timeout_s
        await self._start(config, timeout_s)

    async def _start(self, config: Config, timeout_s: float) -> None:
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
        if self._config is None:
            raise FlexpertError("the fork server was never started")
        self._empty.clear()
        self._children[spec.rank] = _Child()
        if self._channel is not None and self._starting is None:
            self._send(self._channel, spec)
            return
        self._waiting.append(spec)
        if self._starting is None:
            self._starting = self._do(self._start_again(self._config))

    async def _start_again(self, config: Config) -> None:
        """Another fork server, and what waits for it."""
        log.warning("a new fork server is started")
        try:
            await self._start(config, self._timeout_s)
            failure = None
        except FlexpertError as error:
            failure = str(error)
            self._disconnect()
            if self._process:
                self._do(self._bury(self._process, {}))
        self._starting = None
        waiting, self._waiting = self._waiting, []
        for spec in waiting:
            if failure is None and self._channel is not None:
                self._send(self._channel, spec)
            else:
                self._gone(spec.rank, 1, failure or "the fork server ended while it started")

    @staticmethod
    def _send(channel: socket.socket, spec: RankSpec) -> None:
        # a server that has just ended is seen when its answer is read
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            channel.send(forkserver.encode(spec))

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def kill(self, rank: int) -> None:
        """SIGKILL; nothing if it is gone already."""
        child = self._children.get(rank)
        if any(spec.rank == rank for spec in self._waiting):
            self._waiting = [spec for spec in self._waiting if spec.rank != rank]
            gone = "the fork server was still starting"
            asyncio.get_running_loop().call_soon(self._gone, rank, -signal.SIGKILL, gone)
        elif child is not None:
            child.kill()

    def work(self, rank: int) -> Work | None:
        """What a rank's process has done so far; None if it is gone or not there yet.

        Its time is not from /proc, whose ticks of 10 ms are long against a short stall timeout.
        """
        child = self._children.get(rank)
        if child is None or child.pidfd is None:
            return None
        pid = child.pid
        try:
            spent_ns = time.clock_gettime_ns(_process_clock(pid))
            return Work(spent_ns / 1e9, _page_faults(pid), _is_runnable(pid))
        except OSError:
            return None

    async def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the ranks to end, kill those that do not, end the fork server. Idempotent."""
        if self._process is None:
            return
        if self._starting is not None:
            self._starting.cancel()
            self._process.kill()
        for spec in self._waiting:
            self._gone(spec.rank, -signal.SIGKILL)
        self._waiting.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        for rank in list(self._children):
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
            assert self._process is not None  # it has just spoken
            self._children[answer.rank].found(answer.pid, parent=self._process.pid)
        elif isinstance(answer, Exited):
            self._gone(answer.rank, answer.status)

    def _gone(self, rank: int, status: int, why: str = "") -> None:
        child = self._children.pop(rank, None)
        if child is not None:
            child.close()
        if not self._children:
            self._empty.set()
        self._on_exit(rank, status, why)

    def _died(self) -> None:
        """The fork server is gone, and with it every rank."""
        self._disconnect()
        if self._ready and not self._ready.done():
            self._ready.set_exception(FlexpertError("the fork server ended while it started"))
        later = {spec.rank for spec in self._waiting}
        ranks = {rank: child for rank, child in self._children.items() if rank not in later}
        if self._process is not None:
            self._do(self._bury(self._process, ranks))

    async def _bury(self, process: subprocess.Popen[bytes], ranks: dict[int, _Child]) -> None:
        """Tell the ends of a fork server's ranks, each when its process is certainly gone.

        The kernel closes the server's socket before it ends the server's children.
        """
        process.kill()
        status = await asyncio.to_thread(process.wait)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        for rank, child in ranks.items():
            await child.end()
            self._gone(rank, -signal.SIGKILL, f"the fork server ended ({how})")


@dataclass(slots=True)
class _Child:
    """A process of the fork server.

    It is signalled through a descriptor of its own, never by a number: its pid may belong to
    somebody else by now, and 0 and -1 mean many processes.

    pidfd: None while the fork is under way, and of one that had ended before it was told.
    """

    pid: int = 0
    pidfd: int | None = None
    doomed: bool = False

    def found(self, pid: int, parent: int) -> None:
        """The fork is done. A pid that is no child of `parent` any more has ended already."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        if _parent(pid) != parent:
            os.close(pidfd)
            return
        self.pid, self.pidfd = pid, pidfd
        if self.doomed:
            self.kill()

    def kill(self) -> None:
        """Now, or as soon as the fork is done."""
        self.doomed = True
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it, though it is not our child, and wait until it has ended."""
        if self.pidfd is None:  # it was not told yet: it has ended with the server
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self.pidfd, ended.set)
        try:
            self.kill()
            await ended.wait()
        finally:
            loop.remove_reader(self.pidfd)

    def close(self) -> None:
        pidfd, self.pidfd = self.pidfd, None
        if pidfd is not None:
            os.close(pidfd)


def _parent(pid: int) -> int | None:
    """Of a process; None if it is gone."""
    try:
        return int(_stat(f"/proc/{pid}")[_PARENT])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _page_faults(pid: int) -> int:
    """Of a process, minor and major. Raises: OSError: it is gone."""
    fields = _stat(f"/proc/{pid}")
    return int(fields[_MINOR_FAULTS]) + int(fields[_MAJOR_FAULTS])


def _process_clock(pid: int) -> int:
    """The clock of a process's processor time, as clock_getcpuclockid(3) names it."""
    return ~pid << 3 | 2


def _is_runnable(pid: int) -> bool:
    """Whether any of its threads runs or waits for a processor. Raises: OSError: it is gone."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):
            if _stat(f"/proc/{pid}/task/{thread}")[_STATE] == "R":
                return True
    return False


def _stat(folder: str) -> list[str]:
    """Of a process or thread, what follows its name, which may hold anything."""
    with open(f"{folder}/stat") as stat:
        return stat.read().rpartition(")")[2].split()
