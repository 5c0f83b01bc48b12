"""Processes that begin with everything imported, which takes seconds otherwise.

They are forks of one process for each process of tests, which has imported what fork servers, heads
and agents import, and has opened nothing. From there on they are as any other.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, NoReturn
from unittest import mock

import msgspec

from flexpert.cluster.processes import fork_server_process
from flexpert.cluster.processes.early_fork_server import start_fork_server
from flexpert.cluster.processes.fork_server_process import Connected
from flexpert.cluster.processes.lean_imports import trim_imports
from flexpert.config import Config
from flexpert.forking import fork_server

_IMPORTED = (
    "flexpert.cluster.processes.model_report",
    "flexpert.cluster.processes.rank_process",
    "flexpert.cluster.processes.expert_cache_process",
    "flexpert.cluster.head",
    "flexpert.cluster.hosts.agent",
    "flexpert.cli.main",
    "flexpert.server.app",
    "flexpert.server.forwarding",
    "flexpert.server.preprocess_worker",
    "flexpert.server.service_process",
    # as the modules of a model are found by its configuration, when it is opened
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_tokenizers",
)


class Start(msgspec.Struct, frozen=True):
    """Comes with descriptors: where the exit status goes, standard output and error, and of a fork
    server its end of the channel.

    command: of `flexpert`; none: a fork server.
    """

    environment: dict[str, str]
    command: list[str]


class WarmProcess:
    """As `subprocess.Popen` has it. It is a grandchild of this process."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises: TimeoutExpired"""
        with self._lock:
            if self.returncode is None:
                if not select.select([self._status], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired("a warm process", timeout or 0.0)
                self.returncode = int(os.read(self._status, 16) or b"1")
                os.close(self._status)
            return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class WarmForkServer:
    """What a head takes in place of an `EarlyForkServer`, once; should it end, the head starts
    the next."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._taken = False

    def take(self, config: Config) -> Connected | None:
        if self._taken:
            return None
        self._taken = True
        return start_fork_server(config, start=_fork_server)  # type: ignore[arg-type]


@contextlib.contextmanager
def warm_fork_servers(warm: bool = True) -> Iterator[None]:
    """While it is entered, heads of this process get warm fork servers, or cold ones."""
    start = _fork_server if warm else fork_server.start_server
    with mock.patch.dict(start_fork_server.__kwdefaults__ or {}, start=start):
        yield


def flexpert(
    command: Sequence[str],
    environment: Mapping[str, str],
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
) -> WarmProcess:
    """`python -m flexpert`; the fork server of a head is warm, too. Its standard input is empty."""
    start = Start(dict(environment), list(command))
    return _WARM.start(start, stdout, stderr)


def _fork_server(theirs: socket.socket, environment: dict[str, str]) -> WarmProcess:
    return _WARM.start(Start(environment, []), 1, 2, theirs.fileno())


class _Warm:
    """The process that they are forks of, from the first on."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(
        self, start: Start, stdout: IO[bytes] | int, stderr: IO[bytes] | int, *more: int
    ) -> WarmProcess:
        said = [one if isinstance(one, int) else one.fileno() for one in (stdout, stderr)]
        with self._lock:
            if self._channel is None:
                self._channel = _begin()
            read, write = os.pipe()
            try:
                packet = msgspec.msgpack.encode(start)
                socket.send_fds(self._channel, [packet], [write, *said, *more])
                pid = int(self._channel.recv(32))
            finally:
                os.close(write)
        return WarmProcess(pid, read)


_WARM = _Warm()


def _begin() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MALLOC_ARENA_MAX": "2"}
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **alone, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    return ours


# ---- in that process ----------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Until the tests' process closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.disable()
    trim_imports()
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.enable()
    gc.freeze()
    channel = socket.socket(fileno=descriptor)
    children: dict[int, tuple[int, int]] = {}  # pidfd → pid, where its status goes
    while True:
        ready, _, _ = select.select([channel, *children], [], [])
        for pidfd in set(ready) & set(children):
            pid, status = children.pop(pidfd)
            _, ended = os.waitpid(pid, 0)
            with contextlib.suppress(OSError):
                os.write(status, b"%d" % os.waitstatus_to_exitcode(ended))
            os.close(status)
            os.close(pidfd)
        if channel not in ready:
            continue
        packet, given, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not packet:
            os._exit(0)
        pid = os.fork()
        if pid == 0:
            _become(msgspec.msgpack.decode(packet, type=Start), *given[1:])
        children[os.pidfd_open(pid)] = pid, given[0]
        for one in given[1:]:
            os.close(one)
        channel.send(b"%d" % pid)


def _become(start: Start, output: int, errors: int, channel: int = -1) -> NoReturn:
    os.dup2(output, 1)
    os.dup2(errors, 2)
    if not start.command:
        _serve_forks(channel, start.environment)
    _close_but()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(start.environment)
    sys.argv = ["flexpert", *start.command]
    defaults = start_fork_server.__kwdefaults__
    assert defaults is not None
    defaults["start"] = _fork_here
    fork_server_process.begin = lambda: None
    status = 1
    try:
        importlib.import_module("flexpert.__main__").main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    _leave(status)


class _Child:
    """Of the process that has forked it; as `subprocess.Popen` has it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._pidfd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the fork server", timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self._pidfd)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def _fork_here(
    theirs: socket.socket, environment: dict[str, str]
) -> _Child | subprocess.Popen[bytes]:
    """In place of `fork_server.start_server`: with what this process has imported, unless other
    threads are at work, whose half done work a fork would have for ever."""
    if threading.active_count() > 1:
        return fork_server.start_server(theirs, environment)
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        _serve_forks(theirs.fileno(), environment)
    return _Child(pid)


def _serve_forks(channel: int, environment: dict[str, str]) -> NoReturn:
    status = 1
    try:
        _close_but(channel)
        os.environ.clear()
        os.environ.update(environment)
        fork_server.main(channel)
        status = 0
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    _leave(status)


def _close_but(*kept: int) -> None:
    """All descriptors but those of standard input and output."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(descriptor)


def _leave(status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
