"""Starts and ends child processes on this machine, ranks and others, through the fork server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec

from flexpert import errors
from flexpert.cluster.interfaces import Work
from flexpert.cluster.processes.early_fork_server import EarlyForkServer, start_fork_server
from flexpert.config import Config
from flexpert.errors import FlexpertError, ModelError
from flexpert.forking import fork_server
from flexpert.forking.fork_server import (
    Exited,
    Fork,
    Kill,
    Logged,
    Ready,
    Reconnect,
    Refused,
    Started,
    Taken,
    Unusable,
)
from flexpert.forking.framing import BadFrame, check_protocol

log = logging.getLogger("flexpert")

# of /proc/…/stat, after the name
_STATE, _MINOR_FAULTS, _MAJOR_FAULTS = 0, 7, 9

OnExit = Callable[[int, str], None]
_TRY_AGAIN_S = 0.05
_OTHERS = 2**16  # children that are no ranks are numbered from here


class LocalLauncher:
    """Children as forks of one warm process; their ends are seen within milliseconds.

    If that process ends, its children end with it, and the next `fork` starts another one.

    on_exit(rank, status, why) is called when a rank's process is certainly gone (reaped), or could
    not be started; why: what is known beyond its status, or "".
    early: a fork server that is starting already; `start` takes it if it has the same settings.
    reconnects: ranks can be given new connections (`attach`), also without a state directory.
    """

    def __init__(
        self,
        on_exit: Callable[[int, int, str], None],
        early: EarlyForkServer | None = None,
        *,
        reconnects: bool = False,
    ) -> None:
        self._on_exit = on_exit
        self._early = early
        self._reconnects = reconnects
        self._config: Config | None = None
        self._timeout_s = 0.0
        self._children: dict[int, _Child] = {}  # a rank's number is its id
        self._numbers = itertools.count(_OTHERS)
        self._waiting: list[_Waiting] = []  # for a fork server that is starting
        self._starting: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._process: subprocess.Popen[bytes] | _TakenProcess | None = None
        self._taking = False  # what another head has started is being told
        self._channel: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._empty = asyncio.Event()
        self._empty.set()

    async def start(self, config: Config, timeout_s: float) -> None:
        """Start the fork server, or take the early one, and wait until it has imported everything.

        Raises:
            ModelError, ConfigError: the model cannot be opened, or the machine has no such device.
            FlexpertError: it could not be started, died or took longer than timeout_s.
        """
        self._config, self._timeout_s = config, timeout_s
        await self._start(config, timeout_s)

    async def _start(self, config: Config, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        try:
            taken = self._early.take(config) if self._early else None
            self._process, ours = taken or start_fork_server(config, reconnects=self._reconnects)
        except OSError as error:
            why = fork_server.refusal(error)
            raise FlexpertError(f"the fork server cannot be started: {why}") from None
        ours.setblocking(False)
        self._channel = ours
        self._ready = loop.create_future()
        loop.add_reader(ours, self._receive)
        try:
            await asyncio.wait_for(self._ready, timeout_s)
        except TimeoutError:
            raise FlexpertError(
                f"torch and transformers were not imported within {timeout_s:.0f} s; "
                "raise cluster.start_timeout"
            ) from None

    async def take_over(
        self, config: Config, connect: Callable[[], socket.socket], timeout_s: float
    ) -> frozenset[int]:
        """Take the fork server of a head that has ended, and its children. Returns the ranks among
        them; children that are none are killed.

        connect: to that fork server.

        Raises:
            FlexpertError: it is of another version, or does not answer.
        """
        self._config, self._timeout_s = config, timeout_s
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            try:
                self._channel = connect()
            except OSError as error:
                raise FlexpertError(f"the ranks cannot be reached: {error.strerror}") from None
            self._channel.setblocking(False)
            self._ready = loop.create_future()
            loop.add_reader(self._channel, self._receive)
            try:
                await asyncio.wait_for(self._ready, max(0.1, deadline - loop.time()))
                break
            except ModelError as error:  # it has not seen yet that the head before is gone
                self._disconnect()
                if loop.time() > deadline:
                    raise FlexpertError(str(error)) from None
                await asyncio.sleep(_TRY_AGAIN_S)
            except TimeoutError:
                self._disconnect()
                raise FlexpertError(
                    f"the ranks' fork server did not answer within {timeout_s:g} s"
                ) from None
        # the numbers of those that are ended may still be told
        self._numbers = itertools.count(max([_OTHERS - 1, *self._children]) + 1)
        for number in list(self._children):
            if number >= _OTHERS:
                self.kill(number)
        return frozenset(number for number in self._children if number < _OTHERS)

    def attach(self, rank: int, end: socket.socket) -> None:
        """Hand a rank that can have one its end of a new connection; closed here in any case."""
        if self._channel is None:  # it has ended, and its children with it
            end.close()
            return
        with end, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._channel, [fork_server.encode(Reconnect(rank))], [end.fileno()])

    def spawn(self, rank: int, entry: str, spec: bytes, end: socket.socket) -> None:
        """Fork a rank; its end is told through on_exit even if it never came up.

        Args:
            entry, spec: what it runs, see `fork_server.Fork`.
            end: its end of a connection to the head; closed here in any case.
        """
        config = self._config
        kept = self._reconnects or (config is not None and config.cluster.state_dir is not None)
        self._fork(rank, entry, spec, end, self._exit_of(rank), kept=kept)

    def _exit_of(self, rank: int) -> OnExit:
        return lambda status, why: self._on_exit(rank, status, why)

    def fork(self, entry: str, spec: bytes, end: socket.socket, on_exit: OnExit) -> int:
        """As `spawn`, for a child that is no rank, whose imports the next of its kind shares.
        Returns its number, for `kill`."""
        number = next(self._numbers)
        self._fork(number, entry, spec, end, on_exit, shares=True)
        return number

    def _fork(
        self,
        number: int,
        entry: str,
        spec: bytes,
        end: socket.socket,
        on_exit: OnExit,
        *,
        kept: bool = False,
        shares: bool = False,
    ) -> None:
        if self._config is None:
            raise FlexpertError("the fork server was never started")
        self._empty.clear()
        self._children[number] = _Child(on_exit)
        waiting = _Waiting(Fork(number, entry, spec, kept=kept, shares=shares), end)
        if self._channel is not None and self._starting is None:
            self._send(self._channel, waiting)
            return
        self._waiting.append(waiting)
        if self._starting is None:
            self._starting = self._do(self._start_again(self._config))

    async def _start_again(self, config: Config) -> None:
        """Another fork server, and what waits for it."""
        log.warning("a new fork server is started")
        failure: str | None = None
        try:
            await self._start(config, self._timeout_s)
        except Exception as error:
            if not isinstance(error, FlexpertError):
                log.exception("the fork server could not be started")
            failure = str(error) or type(error).__name__
            self._disconnect()
            if self._process:
                self._do(self._bury(self._process, {}))
        self._starting = None
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            if failure is None and self._channel is not None:
                self._send(self._channel, one)
            else:
                one.end.close()
                why = failure or "the fork server ended while it started"
                self._gone(one.request.child, 1, why)

    def _send(self, channel: socket.socket, one: _Waiting) -> None:
        with one.end:
            try:
                socket.send_fds(channel, [fork_server.encode(one.request)], [one.end.fileno()])
            except (BrokenPipeError, ConnectionResetError):
                pass  # a server that has just ended is seen when its answer is read
            except OSError as error:
                why = f"the fork server cannot be asked: {error.strerror}"
                asyncio.get_running_loop().call_soon(self._gone, one.request.child, 1, why)

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("processes could not be started or buried", exc_info=error)

    def kill(self, number: int) -> None:
        """SIGKILL to a rank or another child; nothing if it is gone already."""
        child = self._children.get(number)
        for one in self._waiting:
            if one.request.child == number:
                self._waiting.remove(one)
                one.end.close()
                gone = "the fork server was still starting"
                asyncio.get_running_loop().call_soon(self._gone, number, -signal.SIGKILL, gone)
                return
        if child is not None:
            child.kill()
            if child.pid and child.pidfd is None and self._channel is not None:
                with contextlib.suppress(OSError):  # it has exited, and its children with it
                    self._channel.send(fork_server.encode(Kill(number)))

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
            return Work(spent_ns / 1e9, _page_faults(pid), _runnable_threads(pid))
        except OSError:
            return None

    def leave(self) -> None:
        """The children are left to another head; nothing here can end them any more."""
        if self._channel is not None:
            self._disconnect()
        self._process = None
        for child in self._children.values():
            child.close()
        self._children.clear()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Wait for the ranks to end, kill those that do not, end the fork server. Idempotent.

        Ranks have been told to end; other children work for nobody any more and are killed.
        """
        if self._process is None:
            return
        if self._starting is not None:
            self._starting.cancel()
            self._process.kill()
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.end.close()
            self._gone(one.request.child, -signal.SIGKILL)
        for number in list(self._children):
            if number >= _OTHERS:  # nobody has told those to end
                self.kill(number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        for number in list(self._children):
            self.kill(number)
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
                packet, descriptors, _, _ = socket.recv_fds(
                    self._channel, 1 << 20, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                if not isinstance(error, ConnectionResetError):
                    log.error("the fork server cannot be heard: %s", error.strerror)
                packet, descriptors = b"", []
            if not packet:
                self._died()
                return
            try:
                answer = fork_server.decode_answer(packet)
            except msgspec.MsgspecError as error:
                # what else it has said or will say is no better, and its children end with it
                log.error("the fork server is not understood and is terminated: %s", error)
                for descriptor in descriptors:
                    os.close(descriptor)
                self._died()
                return
            self._handle(answer, descriptors)

    def _handle(self, answer: fork_server.Answer, descriptors: list[int]) -> None:
        if isinstance(answer, Ready):
            self._taking = False
            if self._ready and not self._ready.done():
                self._ready.set_result(None)
        elif isinstance(answer, Logged):
            logging.getLogger(answer.logger).log(answer.level, "%s", answer.text)
        elif isinstance(answer, Unusable):
            if self._ready and not self._ready.done():
                kind = getattr(errors, answer.kind, FlexpertError)
                self._ready.set_exception(kind(answer.error))
        elif isinstance(answer, Taken):
            self._take(answer)
        elif isinstance(answer, Started):
            if self._taking and answer.child not in self._children:
                self._empty.clear()
                rank = answer.child < _OTHERS
                on_exit = self._exit_of(answer.child) if rank else _unheard
                self._children[answer.child] = _Child(on_exit)
            pidfd = descriptors[0] if descriptors else None  # None: there was none left
            child = self._children.get(answer.child)
            if child is None:  # we never asked for it, or it has been told as gone
                if pidfd is not None:
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.close(pidfd)
                return
            child.found(answer.pid, pidfd)
            if child.doomed:
                self.kill(answer.child)
        elif isinstance(answer, Refused):
            self._gone(answer.child, 1, answer.error)
        elif isinstance(answer, Exited):
            self._gone(answer.child, answer.status)

    def _take(self, answer: Taken) -> None:
        """Of a fork server that another head has started."""
        try:
            check_protocol(answer.protocol)
            self._process = _TakenProcess(answer.pid)
        except (BadFrame, OSError) as error:
            if self._ready and not self._ready.done():
                self._ready.set_exception(FlexpertError(f"the ranks cannot be taken over: {error}"))
            return
        self._taking = True

    def _gone(self, number: int, status: int, why: str = "") -> None:
        child = self._children.pop(number, None)
        if not self._children:
            self._empty.set()
        if child is not None:
            child.close()
            try:
                child.on_exit(status, why)
            except Exception:  # the others' ends are to be told all the same
                log.exception("the end of a process (pid %d) could not be handled", child.pid)

    def _died(self) -> None:
        """The fork server is gone, and with it every rank."""
        self._disconnect()
        if self._ready and not self._ready.done():
            self._ready.set_exception(FlexpertError("the fork server ended while it started"))
        later = {one.request.child for one in self._waiting}
        children = {n: child for n, child in self._children.items() if n not in later}
        if self._process is not None:
            self._do(self._bury(self._process, children))

    async def _bury(
        self, process: subprocess.Popen[bytes] | _TakenProcess, children: dict[int, _Child]
    ) -> None:
        """Tell the ends of a fork server's children, each when its process is certainly gone.

        The kernel closes the server's socket before it ends the server's children.
        """
        process.kill()
        status = await asyncio.to_thread(process.wait)
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        for number, child in children.items():
            try:
                await child.end()
            except OSError as error:  # it has no descriptor to be waited for with
                log.error("pid %d was not waited for: %s", child.pid, error.strerror)
            self._gone(number, -signal.SIGKILL, f"the fork server ended ({how})")


def _unheard(status: int, why: str) -> None:
    """Nobody waits for the end of what served another head."""


class _TakenProcess:
    """A fork server that is not this process' child: its end is seen, its status is not.

    Raises: OSError: it is gone already.
    """

    def __init__(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Raises: subprocess.TimeoutExpired"""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired("fork server", timeout or 0.0)
        return 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Fork
    end: socket.socket


@dataclass(slots=True)
class _Child:
    """A process of the fork server. on_exit(status, why): when it is gone.

    It is signalled through a descriptor of its own, never by a number: its pid may belong to
    somebody else by now, and 0 and -1 mean many processes.

    pid: 0 while the fork is under way. pidfd: None then, and if there was no descriptor for it.
    """

    on_exit: OnExit
    pid: int = 0
    pidfd: int | None = None
    doomed: bool = False

    def found(self, pid: int, pidfd: int | None) -> None:
        """The fork is done."""
        self.pid, self.pidfd = pid, pidfd

    def kill(self) -> None:
        """Now, or as soon as the fork is done."""
        self.doomed = True
        if self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it, though it is not our child, and wait until it has exited."""
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


def _page_faults(pid: int) -> int:
    """Of a process, minor and major. Raises: OSError: it is gone."""
    fields = _stat(f"/proc/{pid}")
    return int(fields[_MINOR_FAULTS]) + int(fields[_MAJOR_FAULTS])


def _process_clock(pid: int) -> int:
    """The clock of a process's processor time, as clock_getcpuclockid(3) names it."""
    return ~pid << 3 | 2


def _runnable_threads(pid: int) -> frozenset[int]:
    """Its threads that run or wait for a processor. Raises: OSError: it is gone."""
    runnable = set()
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if _stat(f"/proc/{pid}/task/{thread}")[_STATE] == "R":
                runnable.add(int(thread))
    return frozenset(runnable)


def _stat(folder: str) -> list[str]:
    """Of a process or thread, what follows its name, which may hold anything."""
    with open(f"{folder}/stat") as stat:
        return stat.read().rpartition(")")[2].split()
