"""A crowd of clients, most of them a nuisance, while the ranks change: what is lost, altered, kept.

python tools/crowd.py --clients 200 --changes 12

Half of the clients are cut off in the middle (of their request, before the answer, within it; by an
orderly end or a reset), half of the rest read slowly, the others as one should. The service is one
of our own, with --deterministic: each answer is compared with that of an undisturbed run, of those
that are cut off as much as came. A round of the same before gives pools and caches their size; then
what the head and rank 0, which stays throughout, hold is compared before and after. Exit status 1
if an answer is lost or altered, anything is answered with a 5xx, a change fails, the journal is not
empty in the end, or something has grown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from flexpert.bench.cluster_history import cluster_now
from flexpert.bench.load import (
    ClientAnswer,
    LoadError,
    Target,
    call,
    closed_loop,
    complete,
    parse_completion,
    parse_reply,
    server_events,
)
from flexpert.bench.machine import Machine, this_machine
from flexpert.bench.service import own_service
from flexpert.cluster.views import OperationView
from flexpert.engine.memory_plan import private_memory
from flexpert.trials.demo import demo_requests, same
from flexpert.trials.demo_report import DemoPlan

SERVE = (
    *("--model", "tiny", "--ranks", "2", "--max-ranks", "6", "--deterministic"),
    *("--kv-memory", "32MiB", "--shutdown-timeout", "0", "--log-level", "warning"),
)
# How many ranks there shall be, or how many leave out of the middle and how many join for them;
# rank 0 stays. At the end of the list there are two, as at the beginning.
CHANGES: tuple[int | tuple[int, int], ...] = (
    *(4, (1, 0), 2, (1, 1), 5, (2, 0)),
    *(1, 3, (1, 0), 6, (3, 0), 2),
)
PIECE = 1024  # bytes that a slow client reads at once
STALL_S = 120.0
QUIET_S = 60.0  # until the journal must be empty
MORE_MIB = 16.0


class Held(msgspec.Struct, frozen=True):
    """What a process holds. memory_mib: its own."""

    pid: int
    descriptors: int
    threads: int
    memory_mib: float


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """cut: answers that were cut off by their clients, by how. unfinished: sequences in the journal
    in the end. grown: what is held beyond what was before. said: the service's last warnings."""

    command: str
    machine: Machine
    load: float
    duration_s: float
    whole: int
    slow: int
    cut: dict[str, int]
    lost: int
    altered: int
    server_errors: int
    changes: dict[str, int]
    moved_requests: int
    longest_pause_ms: float
    unfinished: int
    before: dict[str, Held]
    after: dict[str, Held]
    grown: list[str]
    errors: list[str]
    said: list[str]

    @property
    def good(self) -> bool:
        wrong = self.lost or self.altered or self.server_errors or self.unfinished or self.grown
        return not wrong and set(self.changes) == {"done"} and self.whole > 0 and bool(self.cut)


@dataclass
class Crowd:
    """All clients of one round, and what became of what they asked."""

    target: Target
    requests: list[bytes]
    expected: list[ClientAnswer]
    slow_s: float
    draw: random.Random
    over: asyncio.Event = field(default_factory=asyncio.Event)
    whole: int = 0
    slow: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    altered: int = 0
    server_errors: int = 0

    async def run(self, clients: int) -> None:
        """Until the event is set, and each client has its last answer."""
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                one = self._cut_off if number % 2 else self._slowly if number % 4 else self._whole
                group.create_task(self._again(one))

    async def _again(self, one: Callable[[int], Any]) -> None:
        while not self.over.is_set():
            await one(self.draw.randrange(len(self.requests)))

    async def _whole(self, place: int) -> None:
        self._judge(place, await complete(self.target, self.requests[place], stall_s=STALL_S))
        self.whole += 1

    async def _slowly(self, place: int) -> None:
        """A piece at a time, in `slow_s` all of it, through a window that has little more room."""
        loop = asyncio.get_running_loop()
        began = time.perf_counter()
        pieces = []
        pause_s = self.slow_s / 16
        try:
            with self._socket() as raw:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * PIECE)
                await loop.sock_connect(raw, (self.target.host, self.target.port))
                await loop.sock_sendall(raw, self.requests[place])
                async with asyncio.timeout(STALL_S + self.slow_s):
                    while piece := await loop.sock_recv(raw, PIECE):
                        pieces.append((time.perf_counter(), piece))
                        await asyncio.sleep(pause_s)
            answer = parse_completion(began, parse_reply(pieces))
        except (OSError, LoadError, TimeoutError) as error:
            answer = ClientAnswer(began, error=f"{type(error).__name__}: {error}")
        self._judge(place, answer)
        self.slow += 1

    async def _cut_off(self, place: int) -> None:
        """A client that goes away at some point; what came until then must be right."""
        loop = asyncio.get_running_loop()
        request = self.requests[place]
        where = self.draw.choice(("within", "within", "within", "before", "request"))
        reset = self.draw.random() < 0.5
        events = self.draw.randrange(1, max(2, self.expected[place].tokens))
        got = b""
        try:
            with self._socket() as raw:
                await loop.sock_connect(raw, (self.target.host, self.target.port))
                if where == "request":
                    request = request[: self.draw.randrange(1, len(request))]
                await loop.sock_sendall(raw, request)
                if where == "within":
                    async with asyncio.timeout(STALL_S):
                        while got.count(b"data: ") < events:
                            piece = await loop.sock_recv(raw, 2**16)
                            if not piece:
                                raise LoadError("the connection closed before the client did")
                            got += piece
                if reset:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._judge_part(place, got)
        except (OSError, LoadError, TimeoutError) as error:
            self.lost.append(f"{type(error).__name__}: {error}; {got[:200]!r}")
        self.cut[f"{where}, {'reset' if reset else 'closed'}"] += 1

    @staticmethod
    def _socket() -> socket.socket:
        raw = socket.socket()
        raw.setblocking(False)
        return raw

    def _judge(self, place: int, answer: ClientAnswer) -> None:
        if answer.error is not None:
            self.lost.append(answer.error)
            self.server_errors += answer.error.startswith("HTTP 5")
        elif not same(answer, self.expected[place]):
            self.altered += 1

    def _judge_part(self, place: int, got: bytes) -> None:
        if not got:
            return
        status = got.split(b" ", 2)[1]
        if status != b"200":
            self.lost.append(f"HTTP {status.decode()}")
            self.server_errors += status.startswith(b"5")
            return
        text = ""
        for _, data in server_events([(0.0, got.replace(b"\r\n", b"\n"))]):
            with suppress(msgspec.DecodeError):  # the last one may not have come whole
                event = msgspec.json.decode(data)
                if "error" in event:
                    self.lost.append(event["error"]["message"])
                text += "".join(choice["text"] for choice in event.get("choices", ()))
        self.altered += not self.expected[place].text.startswith(text)


async def change(target: Target, what: int | tuple[int, int]) -> OperationView | None:
    """To its end; None if it was refused."""
    active = sorted(r.id for r in (await cluster_now(target)).ranks if r.state == "active")
    body: dict[str, Any]
    if isinstance(what, int):  # rank 0 stays, whoever has the fewest requests
        body = {"remove": active[what:]} if what < len(active) else {"ranks": what}
    else:
        leave, join = what
        middle = active[1:][(len(active) - leave) // 2 :][:leave]
        body = {"remove": middle, "add": join}
    status, answer = await call(target, "POST", "/cluster/operations", body)
    if status != 202:
        return None
    operation = msgspec.convert(answer, OperationView)
    while operation.state in ("preparing", "committing"):
        await asyncio.sleep(0.05)
        path = f"/cluster/operations/{operation.id}"
        operation = msgspec.convert((await call(target, "GET", path))[1], OperationView)
    return operation


async def through(
    crowd: Crowd, clients: int, changes: list[int | tuple[int, int]], every_s: float
) -> list[OperationView | None]:
    """The crowd, while the ranks change."""
    done = []
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.run(clients))
        for what in changes:
            await asyncio.sleep(every_s)
            done.append(await change(crowd.target, what))
        await asyncio.sleep(every_s)
        crowd.over.set()
    return done


async def emptied(target: Target) -> int:
    """Sequences in the journal, once there is none or the time is over."""
    deadline = time.monotonic() + QUIET_S
    while True:
        _, text = await call(target, "GET", "/metrics")
        name = "flexpert_unfinished_sequences "
        left = int(float(next(s for s in text.splitlines() if s.startswith(name)).split()[1]))
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.1)


async def held(head: int, rank: int) -> dict[str, Held]:
    """Of several looks the lowest: a process that looks at /proc for its statistics has a file
    open meanwhile, and connections that ended are still being cleared away."""
    found = {}
    for name, pid in (("head", head), ("rank 0", rank)):
        process = psutil.Process(pid)
        looks = []
        for _ in range(10):
            looks.append((process.num_fds(), process.num_threads()))
            await asyncio.sleep(0.05)
        found[name] = Held(
            pid,
            min(descriptors for descriptors, _ in looks),
            min(threads for _, threads in looks),
            round(private_memory(pid=pid) / 2**20, 1),
        )
    return found


def growth(before: dict[str, Held], after: dict[str, Held]) -> list[str]:
    found = []
    for name, now in after.items():
        was = before[name]
        if now.pid != was.pid:
            found.append(f"{name} is another process")
        for what in ("descriptors", "threads"):
            if getattr(now, what) > getattr(was, what):
                found.append(f"{name}: {getattr(was, what)} → {getattr(now, what)} {what}")
        if now.memory_mib > was.memory_mib + MORE_MIB:
            found.append(f"{name}: {was.memory_mib} → {now.memory_mib} MiB")
    return found


async def run(arguments: argparse.Namespace) -> Result:
    plan = DemoPlan(requests=arguments.requests, max_tokens=arguments.max_tokens)
    changes = [CHANGES[number % len(CHANGES)] for number in range(arguments.changes - 1)] + [2]
    draw = random.Random(arguments.seed)
    async with own_service(SERVE) as service:
        target = service.target
        requests = [target.message("POST", "/v1/completions", body) for body in demo_requests(plan)]
        answers: dict[int, ClientAnswer] = {}

        async def ask(place: int) -> None:
            answers[place] = await complete(target, requests[place], stall_s=STALL_S)

        await closed_loop(ask, len(requests), 16)
        expected = [answers[place] for place in range(len(requests))]
        if broken := [answer.error for answer in expected if answer.error]:
            raise LoadError(f"the undisturbed run failed already: {broken[0]}")

        def crowd() -> Crowd:
            return Crowd(target, requests, expected, arguments.slow_s, draw)

        rounds = [crowd(), crowd()]
        warm = [*CHANGES[: arguments.warmup], 2]
        await through(rounds[0], arguments.clients, warm, arguments.every_s)
        await emptied(target)
        rank = (await cluster_now(target)).ranks[0].pid
        before = await held(service.pid, rank)
        began = time.perf_counter()
        done = await through(rounds[1], arguments.clients, changes, arguments.every_s)
        took = time.perf_counter() - began
        load = os.getloadavg()[0]
        unfinished = await emptied(target)
        rank = (await cluster_now(target)).ranks[0].pid
        after = await held(service.pid, rank)
        last = rounds[1]
        return Result(
            command=" ".join(sys.argv),
            machine=this_machine(),
            load=round(load, 2),
            duration_s=round(took, 1),
            whole=last.whole,
            slow=last.slow,
            cut=dict(sorted(last.cut.items())),
            lost=sum(len(one.lost) for one in rounds),
            altered=sum(one.altered for one in rounds),
            server_errors=sum(one.server_errors for one in rounds),
            changes=dict(Counter(one.state if one else "refused" for one in done)),
            moved_requests=sum(one.moved_requests for one in done if one),
            longest_pause_ms=max((one.pause_ms or 0.0 for one in done if one), default=0.0),
            unfinished=unfinished,
            before=before,
            after=after,
            grown=growth(before, after),
            errors=list(dict.fromkeys(error for one in rounds for error in one.lost))[:5],
            said=[line for line in service.output if "WARNING" in line or "ERROR" in line][-5:],
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--changes", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=6, help="changes before, not counted")
    parser.add_argument("--every-s", type=float, default=4.0, help="between changes")
    parser.add_argument("--slow-s", type=float, default=15.0, help="for reading one answer slowly")
    parser.add_argument("--requests", type=int, default=64, help="different ones")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments))
    report = msgspec.json.format(msgspec.json.encode(result), indent=2)
    print(report.decode())
    if arguments.json:
        arguments.json.write_bytes(report)
    sys.exit(0 if result.good else 1)


if __name__ == "__main__":
    main()
