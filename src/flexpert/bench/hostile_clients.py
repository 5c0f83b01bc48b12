"""Clients that send the same few requests without a pause, in a process of their own.

    python -m flexpert.bench.hostile_clients

It reads a job as a line of JSON, makes all bodies and says "ready"; "go" and "stop" are what it is
told then, and in the end it prints what came of it. Bodies are made before, and a client is a
thread that hands them to a blocking socket whole: what is measured shares the processors with it.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Literal

import msgspec

from flexpert.bench.hostile_bodies import each_field, heavy
from flexpert.bench.load import Target, completion_body

HEAVY_BODIES = 48
ODD_BODIES = 256
# One client in so many sends small odd bodies, which do not wait behind the heavy ones.
ODD_CLIENTS = 4

Kind = Literal["ordinary", "hostile"]


class ClientsJob(msgspec.Struct, frozen=True, kw_only=True):
    """kind: ordinary (short prompts, streamed) or hostile. max_body: bytes. niceness: of the
    process."""

    host: str
    port: int
    kind: Kind
    clients: int
    max_body: int
    seed: int
    niceness: int = 0


class ClientsOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """statuses: how many answers had which. broken: connections that ended without an answer.

    slowest_s: longest time to a whole answer. sent_mib: bodies. cpu_s: of the clients themselves.
    failed: of each path with a 5xx, the beginning of one body and its answer.
    """

    statuses: dict[str, int]
    broken: int
    slowest_s: float
    sent_mib: float
    cpu_s: float
    failed: dict[str, str] = {}


class Clients:
    """All clients of a job."""

    def __init__(self, job: ClientsJob) -> None:
        self._job = job
        self._target = Target(job.host, job.port)
        self._over = False
        self._lock = threading.Lock()
        self._sockets: dict[int, socket.socket] = {}
        self._statuses: Counter[str] = Counter()
        self._failed: dict[str, str] = {}
        self._broken = 0
        self._slowest_s = 0.0
        self._sent = 0
        self._threads: list[threading.Thread] = []
        self._requests = list(self._made())
        self._cpu_before = time.process_time()

    def start(self) -> None:
        self._over = False
        self._threads = [
            threading.Thread(target=self._client, args=(number,), daemon=True)
            for number in range(self._job.clients)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Whoever waits for an answer goes away."""
        with self._lock:
            self._over = True
            for raw in self._sockets.values():
                with suppress(OSError):
                    raw.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    @property
    def outcome(self) -> ClientsOutcome:
        """So far."""
        return ClientsOutcome(
            statuses=dict(sorted(self._statuses.items())),
            broken=self._broken,
            slowest_s=round(self._slowest_s, 3),
            sent_mib=round(self._sent / 2**20, 1),
            cpu_s=round(time.process_time() - self._cpu_before, 2),
            failed=self._failed,
        )

    def _made(self) -> Iterator[list[tuple[str, bytes, bytes]]]:
        """Path, head and body of every request: of ordinary clients, or heavy ones and odd ones."""
        job = self._job
        if job.kind == "ordinary":
            bodies = [
                (
                    "/v1/completions",
                    msgspec.json.encode(
                        completion_body(
                            f"In the {number}th year of the reign of the king,",
                            max_tokens=64,
                            seed=number,
                        )
                    ),
                )
                for number in range(64)
            ]
            yield self._framed(bodies)
            return
        drawn = heavy(job.seed, job.max_body)
        yield self._framed([(p, b[: job.max_body]) for p, b in islice(drawn, HEAVY_BODIES)])
        small = [(path, body) for path, body in each_field() if len(body) < 2**12]
        yield self._framed(random.Random(job.seed).sample(small, ODD_BODIES))

    def _framed(self, bodies: list[tuple[str, bytes]]) -> list[tuple[str, bytes, bytes]]:
        made = []
        for path, body in bodies:
            head = (
                f"POST {path} HTTP/1.1\r\nhost: {self._job.host}\r\nconnection: close\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            made.append((path, head.encode(), body))
        return made

    def _client(self, number: int) -> None:
        draw = random.Random(f"{self._job.seed} {number}")
        odd = len(self._requests) > 1 and number % ODD_CLIENTS == ODD_CLIENTS - 1
        requests = self._requests[odd]
        while not self._over:
            path, head, body = draw.choice(requests)
            began = time.monotonic()
            answer = self._exchange(number, head, body)
            took = time.monotonic() - began
            with self._lock:
                if self._over:
                    return
                self._sent += len(body)
                self._slowest_s = max(self._slowest_s, took)
                status = answer[9:12].decode("ascii", "replace")
                if not status.isdigit():
                    self._broken += 1
                    continue
                self._statuses[status] += 1
                if status.startswith("5"):
                    words = answer.partition(b"\r\n\r\n")[2][:300]
                    self._failed.setdefault(path, f"{body[:100]!r}: {words!r}")

    def _exchange(self, number: int, head: bytes, body: bytes) -> bytes:
        """The beginning of the answer; nothing if the connection broke before."""
        answer = b""
        try:
            with socket.create_connection((self._job.host, self._job.port)) as raw:
                with self._lock:
                    if self._over:
                        return b""
                    self._sockets[number] = raw
                with suppress(ConnectionError):  # it may be refused already: the answer says so
                    raw.sendall(head)
                    raw.sendall(body)
                with suppress(ConnectionError):
                    while piece := raw.recv(2**18):
                        if len(answer) < 2**12:
                            answer += piece
        except OSError:
            pass
        finally:
            with self._lock:
                self._sockets.pop(number, None)
        return answer


def main() -> None:
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=ClientsJob)
    os.nice(job.niceness)
    clients = Clients(job)
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "go":
            clients.start()
        else:
            clients.stop()
            print("stopped", flush=True)
    sys.stdout.buffer.write(msgspec.json.encode(clients.outcome))


if __name__ == "__main__":
    main()
