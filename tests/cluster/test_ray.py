"""Ranks that Ray places, on three nodes of one machine."""

from __future__ import annotations

import importlib.util
import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import Served, served
from support.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # a minute, but for a busy machine
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="pip install 'flexpert[ray]' to test it"
    ),
]
CPUS = 2.0  # of a node, and of a rank: a node has room for one


class Nodes:
    """The cluster. folder: where Ray keeps its files, and the logs of all that it starts."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        with Path(folder, "nodes.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).parents[1] / "support/ray_nodes.py", folder]
                + ["2"] * 3,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            told = self._hear()
            self.address, self.ids = told["address"], told["nodes"]
        except BaseException:
            self.close()
            raise

    def _hear(self) -> Any:
        return json.loads(self._process.stdout.readline())

    def _ask(self, what: str) -> Any:
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._hear()

    def remove(self, node: str) -> None:
        self._ask(f"remove {self.ids.index(node)}")

    def free(self) -> dict[str, float]:
        return self._ask("free")

    def all_free(self) -> bool:
        return set(self.free().values()) == {CPUS}

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = tempfile.mkdtemp(prefix="fxr", dir="/tmp")  # names of sockets must be short
    try:
        nodes = Nodes(folder)
        try:
            yield nodes
        finally:
            nodes.close()
    finally:
        shutil.rmtree(folder)


@contextmanager
def service(nodes: Nodes, *flags: str, token: str = "") -> Iterator[Served]:
    environment = {"HOME": nodes.folder, "RAY_TMPDIR": nodes.folder}
    if token:
        environment["FLEXPERT_CLUSTER_TOKEN"] = token
    with served(
        *("--launcher", "ray", "--ray-address", nodes.address, "--ray-cpus-per-rank", "2"),
        *("--ranks", "1", "--deterministic", "--host-timeout", "5s", *flags),
        environment=environment,
    ) as service:
        yield service


def scale(service: Served, ranks: int) -> None:
    begun = service.http("POST", "/cluster/operations", {"ranks": ranks}).json()
    path = f"/cluster/operations/{begun['id']}"
    wait_until(lambda: service.http("GET", path).json()["state"] == "done", 120, 0.1)


def places(service: Served) -> dict[int, str]:
    """Rank → the first digits of its node."""
    hosts = service.http("GET", "/cluster").json()["hosts"]
    return {host["rank"]: host["host"].rpartition(" ")[2] for host in hosts}


class Streams:
    """A few clients that ask the same again and again, and compare."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._over = threading.Event()
        self.expected = [self.ask(number) for number in range(3)]
        self.wrong: list[object] = []
        self.answered = 0
        self._threads = [threading.Thread(target=self._go_on, args=(n,)) for n in range(3)]

    def ask(self, number: int) -> str:
        prompt = [(number * 37 + place * 11) % 200 + 10 for place in range(24)]
        body = {"prompt": prompt, "max_tokens": 100, "temperature": 0.8, "seed": number}
        body |= {"stream": True, "ignore_eos": True}
        text = ""
        with httpx.stream("POST", self._url + "/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    def _go_on(self, number: int) -> None:
        while not self._over.wait(0.2):
            try:
                text = self.ask(number)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                text = repr(error)
            self.answered += 1
            if text != self.expected[number]:
                self.wrong.append((number, text))

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def logs(folder: str) -> str:
    return "".join(
        path.read_text(errors="replace")
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix in (".log", ".out", ".err", ".txt")
    )


def test_ranks_come_and_go_over_nodes_and_a_node_is_removed_by_force(nodes: Nodes) -> None:
    token = secrets.token_urlsafe(32)
    with service(nodes, token=token) as head:
        with Streams(head.url) as streams:
            scale_over_nodes(nodes, head)
            lose_a_node(nodes, head)
            answered = streams.answered
            wait_until(lambda: streams.answered > answered + 3, 20, 0.1)
        assert streams.wrong == []
        refused = head.http("POST", "/cluster/operations", {"ranks": 3})
        assert "no room for 1 more rank" in refused.json()["error"]["message"]
        said = head.log.read_text()
        assert head.stop() == 0
        wait_until(nodes.all_free, 30, 0.1)  # Ray counts the lost node for some seconds yet
    assert token not in said + logs(nodes.folder)


def scale_over_nodes(nodes: Nodes, head: Served) -> None:
    scale(head, 3)
    assert len(set(places(head).values())) == 3, "one on each node"
    assert set(nodes.free().values()) == {0.0}
    refused = head.http("POST", "/cluster/operations", {"add": 1})
    assert refused.status_code == 400
    message = refused.json()["error"]["message"]
    assert "no room for 1 more rank with 2 CPU" in message
    assert all(f"node {node[:8]}" in message for node in nodes.ids)
    assert message.count("0 of 2 CPU free") == 3
    scale(head, 2)
    wait_until(lambda: sorted(nodes.free().values()) == [0.0, 0.0, CPUS], 10, 0.1)


def lose_a_node(nodes: Nodes, head: Served) -> None:
    before = places(head)
    # not the first: with the head of Ray the whole of Ray would be gone
    lost = max(before, key=lambda rank: nodes.ids.index(node_of(nodes, before[rank])))
    nodes.remove(node_of(nodes, before[lost]))
    # its host is gone first, then its rank, then both come back
    wait_until(lambda: places(head).get(lost, before[lost]) != before[lost], 120, 0.2)
    assert places(head)[lost] not in before.values(), "on the node that was free"
    wait_until(lambda: places(head).keys() == before.keys() == head.ranks().keys(), 60, 0.2)


def test_of_rays_long_messages_the_cause_is_shown() -> None:
    from ray.exceptions import RayError

    from flexpert.cluster.hosts.ray_driver import _in_short

    trace = (
        "The actor died because of an error raised in its creation task, \x1b[36mray::X\x1b[39m\n"
        "RuntimeError: The actor with name RayAgent failed to import on the worker.\n\n"
        "File \"x.py\", line 3\nModuleNotFoundError: No module named 'flexpert'"
    )
    assert _in_short(RayError(trace)) == "ModuleNotFoundError: No module named 'flexpert'"
    lost = "The actor died unexpectedly before finishing this task.\n\tclass_name: RayAgent"
    assert _in_short(RayError(lost)) == lost.splitlines()[0]
    assert _in_short(OSError()) == "OSError"


def node_of(nodes: Nodes, digits: str) -> str:
    return next(node for node in nodes.ids if node.startswith(digits))


def test_all_is_given_back_when_the_head_is_killed(nodes: Nodes) -> None:
    with service(nodes) as head:
        wait_until(lambda: not nodes.all_free(), 5, 0.1)
        head.process.send_signal(signal.SIGKILL)
        wait_until(nodes.all_free, 20, 0.2)
