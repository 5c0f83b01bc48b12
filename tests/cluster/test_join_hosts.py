"""Hosts in network namespaces of their own join a service, leave it, and are cut off.

A bridge in one namespace connects four others. The head and its clients are on the first host; all
that is between hosts goes over the cables, and answers must not show any of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.namespaces import cluster_in
from support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(170),
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
        reason="pip install 'flexpert[nixl]' to test it",
    ),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs namespaces"),
]
HOSTS = (1, 2, 3, 4)
SWITCH = f"fxs{os.getpid()}"
CLIENT = textwrap.dedent(
    """
    import asyncio, json, sys
    import httpx

    async def answer(client, number):
        prompt = [(number * 37 + place * 11) % 200 + 10 for place in range(24)]
        body = {"prompt": prompt, "max_tokens": 60, "temperature": 0.8, "seed": number,
                "stream": True, "ignore_eos": True}
        text = ""
        async with client.stream("POST", "/v1/completions", json=body, timeout=60) as answered:
            async for line in answered.aiter_lines():
                if line.startswith("data: {"):
                    piece = json.loads(line[6:])
                    text += piece["choices"][0]["text"] if "choices" in piece else f"[{piece}]"
        return text

    async def main():
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=sys.argv[1], limits=limits) as client:
            while sys.stdin in await asyncio.to_thread(waiting):
                print(json.dumps(await asyncio.gather(*(answer(client, n) for n in range(16)))))
                sys.stdout.flush()

    def waiting():
        return [sys.stdin] if sys.stdin.readline() else []

    asyncio.run(main())
    """
)


def ip(*args: str) -> str:
    done = subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout


def space(host: int) -> str:
    return f"fxh{host}-{os.getpid()}"


class Network:
    """The namespaces, and what was started in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[Any]] = []
        self.environment = {
            **os.environ,
            "UCX_TLS": "tcp",
            "FLEXPERT_URL": "http://127.0.0.1:8199",
            "FLEXPERT_CLUSTER_TOKEN": secrets.token_urlsafe(32),
        }
        ip("netns", "add", SWITCH)
        ip("-n", SWITCH, "link", "add", "br0", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "br0", "up")
        for host in HOSTS:
            name, port = space(host), f"p{host}"
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip(
                "link",
                "add",
                "fx0",
                "netns",
                name,
                "type",
                "veth",
                "peer",
                "name",
                port,
                "netns",
                SWITCH,
            )
            ip("-n", SWITCH, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"10.78.0.{host}/24", "dev", "fx0")
            self.cable(host, "up")

    def cable(self, host: int, state: str) -> None:
        ip("-n", space(host), "link", "set", "fx0", state)

    def start(self, host: int, name: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        with (self.folder / f"{name}.log").open("ab") as log:
            options = {"stdout": log, **options}
            process = subprocess.Popen(
                ["ip", "netns", "exec", space(host), sys.executable, *command],
                env=self.environment,
                stderr=log,
                **options,
            )
        self.started.append(process)
        return process

    def flexpert(self, host: int, *command: str) -> str:
        return subprocess.run(
            ["ip", "netns", "exec", space(host), sys.executable, "-m", "flexpert", *command],
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def cluster(self) -> Any:
        return cluster_in(space(1), 8199)

    def active(self) -> set[int]:
        return {rank["id"] for rank in self.cluster()["ranks"] if rank["state"] == "active"}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        for process in self.started:
            process.terminate()
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for name in (*map(space, HOSTS), SWITCH):
            with contextlib.suppress(subprocess.SubprocessError):
                for pid in ip("netns", "pids", name).split():
                    os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    try:
        ip("netns", "list")
    except (subprocess.SubprocessError, OSError):
        pytest.skip("no network namespaces here")
    network = Network(tmp_path)
    try:
        yield network
    finally:
        network.close()


def test_hosts_join_leave_and_are_cut_off_while_answers_stay_the_same(network: Network) -> None:
    head = ("-m", "flexpert", "serve", "--ranks", "1", "--max-ranks", "4", "--port", "8199")
    network.start(
        1,
        "head",
        *head,
        "--kv-memory",
        "32MiB",
        "--deterministic",
        "--machine",
        "host1",
        "--join-listen",
        "tcp://10.78.0.1:7099",
    )
    wait_until(lambda: "ready: " in network.log("head"), 60)
    client = network.start(
        1,
        "client",
        "-c",
        CLIENT,
        "http://127.0.0.1:8199",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answers: list[list[str]] = []

    def ask() -> None:
        """Sixteen streams; they go on while the next thing is done."""
        client.stdin.write("again\n")
        client.stdin.flush()

    def hear() -> None:
        answers.append(json.loads(client.stdout.readline()))

    def join(host: int, *flags: str) -> subprocess.Popen[Any]:
        return network.start(
            host,
            f"host{host}",
            "-m",
            "flexpert",
            "join",
            "tcp://10.78.0.1:7099",
            "--machine",
            f"host{host}",
            "--retry",
            "60s",
            *flags,
        )

    ask()
    hear()
    agents = {host: join(host, "--id", str(host - 1)) for host in (2, 3, 4)}
    ask()
    wait_until(lambda: network.active() == {0, 1, 2, 3}, 60, 0.5)
    hear()
    ranks = {rank["id"]: rank for rank in network.cluster()["ranks"]}
    assert ranks[0]["over_nixl"] == [1, 2, 3]
    assert {rank["machine"] for rank in ranks.values()} == {f"host{host}" for host in HOSTS}
    ask()
    network.flexpert(1, "leave", "1")
    assert agents[2].wait(20) == 0, network.log("host2")
    hear()
    assert network.active() == {0, 2, 3}
    ask()
    network.cable(4, "down")
    wait_until(lambda: network.active() == {0, 2}, 30, 0.5)
    hear()
    network.cable(4, "up")
    ask()
    wait_until(lambda: network.active() == {0, 2, 3}, 60, 0.5)
    hear()
    assert "was given up" in network.log("host4") or "nothing was heard" in network.log("host4")
    ask()
    agents[3].send_signal(signal.SIGTERM)
    assert agents[3].wait(20) == 0, network.log("host3")
    hear()
    assert network.active() == {0, 3}
    assert all(answer == answers[0] for answer in answers)
    assert network.environment["FLEXPERT_CLUSTER_TOKEN"] not in network.log("head")
