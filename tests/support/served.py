"""`flexpert serve` as a process of its own, under limits that a test sets; and as another user."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

import flexpert
from support import warm

SOURCES = Path(flexpert.__file__).parent.parent
SERVICE_UID, OTHER_UID = 61_801, 61_802  # nobody has them, and they need no account

ROOT = os.geteuid() == 0
UNPRIVILEGED = (
    *("setpriv", "--reuid", str(SERVICE_UID), "--regid", str(SERVICE_UID), "--clear-groups"),
    # as for any user: but that it finds Python where only root may look
    *("--bounding-set", "-all,+dac_read_search"),
    *("--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"),
)
CAN_BE_ANOTHER = ROOT and shutil.which("setpriv") is not None


@dataclass
class Served:
    """log: what it has said, unless that goes elsewhere."""

    process: subprocess.Popen[bytes] | warm.WarmProcess
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def http(self, method: str, path: str, body: object = None) -> httpx.Response:
        return httpx.request(method, self.url + path, json=body, headers=self.headers, timeout=30)

    def answer(self) -> str:
        """To a prompt, which is given whole."""
        body = {"prompt": "In the beginning", "max_tokens": 16, "temperature": 0}
        answered = self.http("POST", "/v1/completions", body)
        assert answered.status_code == 200, answered.text
        assert answered.json()["usage"]["completion_tokens"] == 16
        return str(answered.json()["choices"][0]["text"])

    def scale(self, ranks: int) -> dict[str, Any]:
        """The operation when it is over."""
        begun = self.http("POST", "/cluster/operations", {"ranks": ranks}).json()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            operation: dict[str, Any] = self.http(
                "GET", f"/cluster/operations/{begun['id']}"
            ).json()
            if operation["state"] in ("done", "failed", "cancelled"):
                return operation
            time.sleep(0.05)
        raise AssertionError(f"the change did not end: {operation}")

    def ranks(self) -> dict[int, int]:
        """Id → pid of the active ones."""
        ranks = self.http("GET", "/cluster").json()["ranks"]
        return {rank["id"]: rank["pid"] for rank in ranks if rank["state"] == "active"}

    def processes(self) -> list[psutil.Process]:
        """The head, the fork server and all that it has forked."""
        head = psutil.Process(self.process.pid)
        return [head, *head.children(recursive=True)]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


def wait_until_ready(served: Served) -> None:
    deadline = time.monotonic() + 400
    while served.process.poll() is None and time.monotonic() < deadline:
        try:
            if served.http("GET", "/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError(f"it does not serve: {served.log.read_text()}")


@contextmanager
def served(
    *flags: str,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    key: str | None = None,
    port: int | None = None,
    ready: bool = True,
) -> Iterator[Served]:
    """It serves the embedded model on two ranks. prefix: a command that starts another.

    environment: beside what it needs. port: default: a free one. stdout, stderr: default: its log.
    ready: it is waited for.
    """
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        log = Path(folder, "log")
        with log.open("wb") as said:
            command = ["serve", "--port", str(port), "--ranks", "2", "--max-ranks", "4"]
            process = _start(
                [*command, "--kv-memory", "32MiB", *flags],
                prefix,
                {
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(SOURCES),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    **(environment or {"HOME": folder}),
                },
                said if stdout is None else stdout,
                said if stderr is None else stderr,
            )
        headers = {"authorization": f"Bearer {key}"} if key else {}
        service = Served(process, f"http://127.0.0.1:{port}", log, headers)
        try:
            if ready:
                wait_until_ready(service)
            yield service
        finally:
            service.process.terminate()
            try:
                service.process.wait(30)
            except subprocess.TimeoutExpired:
                service.process.kill()
                service.process.wait()


def _start(
    command: Sequence[str],
    prefix: Sequence[str],
    environment: Mapping[str, str],
    stdout: int | IO[bytes],
    stderr: int | IO[bytes],
) -> subprocess.Popen[bytes] | warm.WarmProcess:
    if not prefix and stdout != subprocess.PIPE and stderr != subprocess.PIPE:
        return warm.flexpert(command, environment, stdout, stderr)
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "flexpert", *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
