"""Fork servers that begin with everything imported, which takes seconds otherwise.

They are forks of one process for each process of tests, which has imported what fork servers import
and opened nothing. From there on they are as any other: they are told their model, and open it.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping
from typing import NoReturn

import msgspec

from flexpert.cluster.processes.early_fork_server import Connected, start_fork_server
from flexpert.config import Config
from flexpert.forking import fork_server

# as the model's own modules: they are found by its configuration, when it is opened
_IMPORTED = (
    "flexpert.cluster.processes.rank_process",
    "flexpert.cluster.processes.expert_cache_process",
    "flexpert.server.preprocess_worker",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.auto.modeling_auto",
    "transformers.tokenization_utils_tokenizers",
)


class Start(msgspec.Struct, frozen=True):
    """Comes with descriptors: the server's end of its channel, where its exit status goes, and its
    standard output and error."""

    environment: dict[str, str]
    kept: bool


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
                    raise subprocess.TimeoutExpired("fork server", timeout or 0.0)
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
        return start_fork_server(config, start=_WARM.start)  # type: ignore[arg-type]


class _Warm:
    """The process that they are forks of, from the first on."""

    def __init__(self) -> None:
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(
        self, theirs: socket.socket, environment: Mapping[str, str], *, kept: bool
    ) -> WarmProcess:
        with self._lock:
            channel = self._channel or self._begin(environment)
            read, write = os.pipe()
            try:
                packet = msgspec.msgpack.encode(Start(dict(environment), kept))
                socket.send_fds(channel, [packet], [theirs.fileno(), write, 1, 2])
                pid = int(channel.recv(32))
            finally:
                os.close(write)
        return WarmProcess(pid, read)

    def _begin(self, environment: Mapping[str, str]) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._channel = ours
        return ours


_WARM = _Warm()


def serve(descriptor: int) -> None:
    """Until the tests' process closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for name in _IMPORTED:
        importlib.import_module(name)
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
            own = [channel.fileno(), *children, *(status for _, status in children.values())]
            _become(msgspec.msgpack.decode(packet, type=Start), given, own)
        children[os.pidfd_open(pid)] = pid, given[1]
        for one in (given[0], *given[2:]):
            os.close(one)
        channel.send(b"%d" % pid)


def _become(start: Start, given: list[int], not_ours: list[int]) -> NoReturn:
    status = 1
    try:
        if start.kept:
            os.setsid()
        theirs, told, output, errors = given
        os.dup2(output, 1)
        os.dup2(errors, 2)
        for descriptor in (*not_ours, told, output, errors):
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(start.environment)
        fork_server.main(theirs)
        status = 0
    except BaseException:  # noqa: BLE001 - the last frame of this process
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
