"""The head's process ends, and another goes on with its ranks, requests and operations."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.served import ROOT, Served, free_port, served
from support.waiting import wait_until

pytestmark = pytest.mark.slow
STREAMS = 16
TOKENS = 1200
NIXL = any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12")))


@contextmanager
def head(
    folder: Path, port: int, *flags: str, prefix: Sequence[str] = (), **more: Any
) -> Iterator[Served]:
    state = ("--state-dir", str(folder), "--deterministic")
    with served(*state, *flags, port=port, prefix=prefix, **more) as service:
        yield service


def kill(service: Served) -> None:
    """As the system does when memory is short."""
    service.process.kill()
    service.process.wait()


class Client:
    """One request, asked for until its answer is whole."""

    def __init__(self, url: str, number: int) -> None:
        self.url, self.number = url, number
        self.pieces: list[str] = []
        self.last = ""  # id of the latest event
        self.asked = 0

    def ask(self) -> str:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if self._stream():
                    return "".join(self.pieces)
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"request {self.number} was not answered: {self.pieces}")

    def _stream(self) -> bool:
        body = {
            "prompt": [20 + self.number, 30, 40],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"x-request-id": f"client-{self.number}"}
        if self.last:
            headers["last-event-id"] = self.last
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json=body, headers=headers, timeout=60
        ) as answered:
            if answered.status_code != 200:
                answered.read()
                raise AssertionError(answered.text)
            self.asked += 1
            for line in answered.iter_lines():
                if line.startswith("id: "):
                    self.last = line[4:]
                elif line == "data: [DONE]":
                    return True
                elif line.startswith("data: "):
                    part = json.loads(line[6:])
                    assert "error" not in part, part
                    self.pieces.append(part["choices"][0]["text"])
        return False


def answers(url: str) -> list[Client]:
    return [Client(url, number) for number in range(STREAMS)]


def test_a_killed_head_is_resumed_and_every_request_completes(tmp_path: Path) -> None:
    port = free_port()
    with head(tmp_path / "state", port) as first, ThreadPoolExecutor(STREAMS) as pool:
        undisturbed = list(pool.map(Client.ask, answers(first.url)))
        done = {"ranks": 3, "operation_id": "resize-1"}
        begun = first.http("POST", "/cluster/operations", done).json()
        wait_until(lambda: operation(first, "resize-1")["state"] == "done", 60)
        ranks = instances(first)
        cursor = first.http("GET", "/cluster").json()["cursor"]
        clients = answers(first.url)
        asked = [pool.submit(client.ask) for client in clients]
        wait_until(lambda: all(len(client.pieces) > 5 for client in clients), 60)
        first.http("POST", "/cluster/operations", {"ranks": 4, "operation_id": "resize-2"})
        kill(first)
        with head(tmp_path / "state", port, "--resume") as second:
            ready = time.monotonic()
            before = [len(client.pieces) for client in clients]
            wait_until(
                lambda: any(
                    len(client.pieces) > n for client, n in zip(clients, before, strict=True)
                ),
                30,
            )
            assert time.monotonic() - ready < 2.0, "from serving to the first token"
            assert [one.result(90) for one in asked] == undisturbed
            assert [client.asked for client in clients] == [2] * STREAMS, "each had to ask again"
            # the ranks are those that there were, with their models
            assert ranks.items() <= instances(second).items()
            # what was over is known; what was under way is done, under the same id
            assert operation(second, "resize-1")["state"] == "done"
            again = second.http("POST", "/cluster/operations", done)
            assert (again.status_code, again.json()["created"]) == (202, begun["created"])
            other = {"ranks": 2, "operation_id": "resize-1"}
            assert second.http("POST", "/cluster/operations", other).status_code == 409
            wait_until(lambda: operation(second, "resize-2")["state"] == "done", 60)
            assert len(second.ranks()) == 4
            assert second.http("GET", f"/cluster/events?since={cursor}").status_code == 410
            assert second.scale(2)["state"] == "done"
            # a second crash is as good as the first
            kill(second)
            with head(tmp_path / "state", port, "--resume") as third:
                assert instances(third).keys() == {0, 1}
                known = third.http("GET", "/cluster").json()["ranks"]
                assert all(rank["cached_blocks"] for rank in known), "they tell of their caches"
                assert third.answer()


def operation(service: Served, name: str) -> dict[str, Any]:
    found: dict[str, Any] = service.http("GET", f"/cluster/operations/{name}").json()
    return found


def instances(service: Served) -> dict[int, tuple[str, int]]:
    """Id → instance and pid."""
    ranks = service.http("GET", "/cluster").json()["ranks"]
    return {rank["id"]: (rank["instance"], rank["pid"]) for rank in ranks}


def test_a_rank_that_ends_without_a_head_costs_no_request(tmp_path: Path) -> None:
    port = free_port()
    with head(tmp_path / "state", port) as first, ThreadPoolExecutor(4) as pool:
        clients = answers(first.url)[:4]
        undisturbed = list(pool.map(Client.ask, answers(first.url)[:4]))
        asked = [pool.submit(client.ask) for client in clients]
        wait_until(lambda: all(len(client.pieces) > 5 for client in clients), 60)
        lost = first.ranks()[1]
        kill(first)
        os.kill(lost, signal.SIGKILL)
        with head(tmp_path / "state", port, "--resume") as second:
            assert [one.result(90) for one in asked] == undisturbed
            wait_until(lambda: set(second.ranks()) == {0, 1}, 60)
            assert second.ranks()[1] != lost


def test_with_all_its_ranks_gone_requests_and_operations_are_still_there(tmp_path: Path) -> None:
    port = free_port()
    with head(tmp_path / "state", port) as first, ThreadPoolExecutor(4) as pool:
        clients = answers(first.url)[:4]
        undisturbed = list(pool.map(Client.ask, answers(first.url)[:4]))
        asked = [pool.submit(client.ask) for client in clients]
        wait_until(lambda: all(len(client.pieces) > 5 for client in clients), 60)
        processes = first.processes()
        kill(first)
        for process in processes[1:]:
            with suppress(psutil.NoSuchProcess):  # they end with one another
                process.kill()
        psutil.wait_procs(processes, 20)
        with head(tmp_path / "state", port, "--resume") as second:
            assert [one.result(90) for one in asked] == undisturbed
            assert set(second.ranks()) == {0, 1}


def test_the_example_controller_reaches_its_aim_through_kills_of_its_own_and_of_the_head(
    tmp_path: Path,
) -> None:
    port, wish, memory = free_port(), tmp_path / "desired.txt", tmp_path / "state.json"
    wish.write_text("4")
    example = Path(__file__).parents[2] / "examples" / "reconcile.py"
    command = [sys.executable, str(example), f"http://127.0.0.1:{port}", str(wish), str(memory)]
    environment = {**os.environ, "RECONCILE_EVERY_S": "0.05"}

    @contextmanager
    def controller() -> Iterator[None]:
        process = subprocess.Popen(command, env=environment)
        try:
            yield
        finally:
            process.kill()
            process.wait()

    with head(tmp_path / "state", port) as first:
        with controller():
            wait_until(lambda: first.http("GET", "/cluster").json()["operation"], 30)
        with controller():
            kill(first)
            with head(tmp_path / "state", port, "--resume") as second:
                wait_until(lambda: len(second.ranks()) == 4, 90)
                assert operation(second, "reconcile-1")["state"] == "done"
                assert second.http("GET", "/cluster/operations/reconcile-2").status_code == 404


def test_ranks_to_which_no_head_comes_end_and_one_that_is_not_told_to_resume_leaves_them(
    tmp_path: Path,
) -> None:
    state, port = tmp_path / "state", free_port()
    with head(state, port, "--orphan-timeout", "4") as first:
        processes = first.processes()[1:]
        with pytest.raises(AssertionError, match="used by a head that runs"), head(state, port + 1):
            pass
        kill(first)
        with pytest.raises(AssertionError, match="take them over with --resume"), head(state, port):
            pass
        other = ("--orphan-timeout", "4", "--resume", "--kv-block-size", "32")
        with (
            pytest.raises(AssertionError, match=r"engine.kv_block_size: .* run with 16, not 32"),
            head(state, port, *other),
        ):
            pass
        _, alive = psutil.wait_procs(processes, 30)
        assert not alive
        assert not (state / "ranks.sock").exists()


def test_a_joined_host_outlives_the_head_as_the_head_s_own_ranks_do(tmp_path: Path) -> None:
    port, listens = free_port(), free_port()
    environment = {
        "HOME": str(tmp_path),
        "FLEXPERT_CLUSTER_TOKEN": secrets.token_urlsafe(32),
        "UCX_TLS": "tcp",
    }
    own = (
        *("--ranks", "1", "--machine", "here", "--join-listen", f"tcp://127.0.0.1:{listens}"),
        *("--host-timeout", "10", "--orphan-timeout", "300"),
    )
    log = tmp_path / "agent.log"
    join = ("join", f"tcp://127.0.0.1:{listens}", "--machine", "there" if NIXL else "here")
    state = tmp_path / "state"
    with (
        log.open("wb") as said,
        ThreadPoolExecutor(8) as pool,
        head(state, port, *own, environment=environment) as first,
    ):
        agent = subprocess.Popen(
            [sys.executable, "-m", "flexpert", *join],
            env={**os.environ, **environment},
            stdout=said,
            stderr=said,
        )
        try:
            wait_until(lambda: len(first.ranks()) == 2, 150)
            undisturbed = list(pool.map(Client.ask, answers(first.url)[:8]))
            ranks = instances(first)
            clients = answers(first.url)[:8]
            asked = [pool.submit(client.ask) for client in clients]
            wait_until(lambda: all(len(client.pieces) > 5 for client in clients), 60)
            kill(first)
            with head(state, port, *own, "--resume", environment=environment) as second:
                assert [one.result(90) for one in asked] == undisturbed
                assert all(client.asked == 2 for client in clients)
                assert instances(second) == ranks
                assert "goes on with another head" in log.read_text()
                agent.terminate()  # it leaves by a change, as before
                assert agent.wait(60) == 0
                assert len(second.ranks()) == 1
                assert second.answer()
        finally:
            agent.kill()
            agent.wait()


@pytest.mark.skipif(
    not (ROOT and shutil.which("unshare") and shutil.which("nsenter")), reason="mounts a disk"
)
def test_on_a_full_disk_it_serves_and_with_room_again_it_can_be_resumed(tmp_path: Path) -> None:
    state, port = tmp_path / "state", free_port()
    state.mkdir()
    mount = f'mount -t tmpfs -o size=2m,mode=700 none {state} && exec "$@"'
    small = ("unshare", "--mount", "sh", "-c", mount, "sh")
    with head(state, port, prefix=small) as first, ThreadPoolExecutor(4) as pool:
        wait_until(lambda: saved(first) == (True, None), 20)
        undisturbed = list(pool.map(Client.ask, answers(first.url)[:4]))
        ballast = Path(f"/proc/{first.process.pid}/root{state}/ballast")
        fill(ballast)
        clients = answers(first.url)[:4]
        asked = [pool.submit(client.ask) for client in clients]
        wait_until(lambda: saved(first)[0] is False, 20)
        fill(ballast)  # what was written is removed, and leaves a little room
        assert "full" in str(saved(first)[1])
        wait_until(lambda: "it serves, and could not be resumed" in first.log.read_text(), 20)
        ballast.unlink()
        assert [one.result(90) for one in asked] == undisturbed
        clients = answers(first.url)[:4]
        asked = [pool.submit(client.ask) for client in clients]
        wait_until(lambda: saved(first) == (True, None), 60)
        wait_until(lambda: all(len(client.pieces) > 5 for client in clients), 60)
        ranks = instances(first)
        namespace = f"--mount=/proc/{first.ranks()[0]}/ns/mnt"
        kill(first)
        with head(state, port, "--resume", prefix=("nsenter", namespace, "--")) as second:
            assert [one.result(90) for one in asked] == undisturbed
            assert instances(second) == ranks


def fill(ballast: Path) -> None:
    """Leave no room on its disk."""
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(2**16)):
            pass


def saved(service: Served) -> tuple[bool, str | None]:
    """Whether the head could be resumed, and why not."""
    view = service.http("GET", "/cluster").json()
    return view["resumable"], view["unsaved"]
