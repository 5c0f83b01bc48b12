"""The head's side of ranks that Ray places, with a Ray that does what a test wants."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.service import until

import flexpert
from flexpert.cluster.hosts import ray_ranks
from flexpert.cluster.hosts.ray_protocol import (
    AgentEnded,
    ConnectRay,
    FromRay,
    LookAtNodes,
    RayAnswer,
    RayNode,
    StartAgent,
    StopAgent,
    decode_to_ray,
    encode,
)
from flexpert.cluster.hosts.ray_ranks import RayRanks, reachable_at
from flexpert.config import load_config
from flexpert.errors import ConfigError, OperationRefused
from flexpert.forking.framing import Deframer, frame

TOKEN = "a token that nobody sees"


class FakeRay:
    """Answers as the process that talks to Ray, in threads.

    free: CPUs of each node. dead: nodes that take nothing. started: ticket → node.
    """

    def __init__(self) -> None:
        self.free = {"a": 1.0, "b": 1.0}
        self.dead: set[str] = set()
        self.started: dict[bytes, str] = {}
        self.stopped: list[bytes] = []
        self.connected = 0
        self.ended: list[tuple[bytes, str]] = []
        self._ends: list[socket.socket] = []

    def start(self, theirs: socket.socket) -> FakeRay:
        """In place of the process."""
        self._ends.append(theirs.dup())
        threading.Thread(target=self._serve, args=(self._ends[-1],), daemon=True).start()
        return self

    def _serve(self, end: socket.socket) -> None:
        deframer = Deframer()
        while data := end.recv(1 << 16):
            for message in deframer.feed(data):
                end.sendall(frame(encode(self._answer(decode_to_ray(message)))))
        end.close()

    def _answer(self, request: Any) -> RayAnswer:
        match request:
            case ConnectRay(number):
                self.connected += 1
                return RayAnswer(number=number, node_ip="10.0.0.1")
            case LookAtNodes(number):
                nodes = [
                    RayNode(id=name, host=name, free={"CPU": cpus}, total={"CPU": 1.0})
                    for name, cpus in self.free.items()
                ]
                return RayAnswer(number=number, nodes=nodes)
            case StartAgent() if request.node in self.dead:
                return RayAnswer(number=request.number, error="it did not take it")
            case StartAgent():
                assert request.token == TOKEN
                self.started[request.ticket] = request.node
                self.free[request.node] -= 1
            case StopAgent(_, ticket):
                self.stopped.append(ticket)
                self.free[self.started[ticket]] += 1
        return RayAnswer(number=request.number)

    def tell(self, message: FromRay) -> None:
        self._ends[-1].sendall(frame(encode(message)))

    def end(self) -> None:
        """The process ends."""
        self._ends[-1].shutdown(socket.SHUT_RDWR)

    def agent_ended(self, ticket: bytes, why: str) -> None:
        """As the owner of the ranks."""
        self.ended.append((ticket, why))

    def kill(self) -> None:
        """As a process."""

    def wait(self, timeout: float | None = None) -> int:
        return 0


def run(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[FakeRay, RayRanks], Any], **settings: str
) -> None:
    fake = FakeRay()
    monkeypatch.setattr(ray_ranks, "_start", fake.start)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    given = {f"cluster.{name}": value for name, value in settings.items()}
    config = load_config(environment={}, overrides={"cluster.launcher": "ray", **given})

    async def within() -> None:
        ranks = RayRanks(config, fake, TOKEN)
        await ranks.connect()
        ranks.join_at("tcp://10.0.0.1:7000")
        try:
            await scenario(fake, ranks)
        finally:
            await ranks.close()

    asyncio.run(asyncio.wait_for(within(), 30))


def test_ranks_of_one_change_are_spread_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        tickets = [ranks.start(rank) for rank in (0, 1)]
        await until(lambda: len(fake.started) == 2)
        assert sorted(fake.started.values()) == ["a", "b"]
        with pytest.raises(OperationRefused, match=r"no room for 1 more rank.*wait-for-resources"):
            await ranks.check_room(1)
        ranks.stop(tickets[0])
        ranks.stop(tickets[0])
        await until(lambda: fake.stopped)
        await ranks.check_room(1)
        assert fake.stopped == [tickets[0]]
        assert fake.ended == []

    run(monkeypatch, scenario)


def test_a_node_that_takes_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        fake.dead, fake.free = {"b"}, {"a": 1.0, "b": 9.0}
        first, second = ranks.start(0), ranks.start(1)
        await until(lambda: fake.ended)
        assert len(fake.started) == 1, "one on the other node"
        (ticket, why), placed = fake.ended[0], next(iter(fake.started))
        assert {ticket, placed} == {first, second}
        assert "did not answer lately" in why

    run(monkeypatch, scenario)


def test_room_is_waited_for_if_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        fake.free = {"a": 0.0}
        await ranks.check_room(1)
        given_up, ticket = ranks.start(0), ranks.start(1)
        ranks.stop(given_up)
        await asyncio.sleep(0.7)
        assert (fake.started, fake.ended) == ({}, [])
        fake.free = {"a": 1.0}
        await until(lambda: fake.started)
        assert fake.started == {ticket: "a"}

    run(monkeypatch, scenario, wait_for_resources="20s")


def test_without_room_a_rank_fails_at_once_and_after_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        fake.free = {"a": 0.0}
        ticket = ranks.start(0)
        await until(lambda: fake.ended)
        assert fake.ended[0][0] == ticket
        assert "0 of 1 CPU free" in fake.ended[0][1]

    for wait in ("0s", "600ms"):
        run(monkeypatch, scenario, wait_for_resources=wait)


def test_an_agent_that_ends_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        ticket = ranks.start(0)
        await until(lambda: fake.started)
        fake.tell(AgentEnded(b"of nobody", "?"))
        fake.tell(AgentEnded(ticket, "ModuleNotFoundError: no flexpert there"))
        await until(lambda: fake.ended)
        assert fake.ended == [(ticket, "ModuleNotFoundError: no flexpert there")]
        ranks.stop(ticket)
        await until(lambda: fake.stopped)

    run(monkeypatch, scenario)


def test_another_process_talks_to_ray_when_one_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        fake.end()
        await asyncio.sleep(0.05)
        ranks.start(0)
        await until(lambda: fake.started)
        assert fake.connected == 2

    run(monkeypatch, scenario)


def test_descriptors_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fake: FakeRay, ranks: RayRanks) -> None:
        ranks.start(0)
        await until(lambda: fake.started)

    run(monkeypatch, scenario)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        run(monkeypatch, scenario)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_only_the_process_that_talks_to_ray_imports_it() -> None:
    sources = Path(flexpert.__file__).parent
    importing = {
        path.stem
        for path in sources.rglob("*.py")
        if re.search(r"^\s*(?:import|from) ray\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"ray_driver"}
    imported = "import sys, flexpert.cluster.head; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imported], timeout=60).returncode == 0


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load_config(environment={}, overrides={"cluster.launcher": "ray"})
    with pytest.raises(ConfigError, match=r"pip install 'flexpert\[ray\]'"):
        RayRanks(config, FakeRay(), TOKEN)


@pytest.mark.parametrize(
    ("listening", "ip", "expected"),
    [
        ("tcp://0.0.0.0:7000", "10.0.0.1", "tcp://10.0.0.1:7000"),
        ("tcp://[::]:7000", "fd00::1", "tcp://[fd00::1]:7000"),
        ("tcp://10.0.0.2:7000", "10.0.0.1", "tcp://10.0.0.2:7000"),
    ],
)
def test_agents_join_where_they_reach_the_head(listening: str, ip: str, expected: str) -> None:
    assert reachable_at(listening, ip) == expected
