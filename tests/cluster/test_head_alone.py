"""A head without a rank of its own: hosts join and leave it, and requests wait while there is none.

The hosts are agents on this machine, so that ranks share memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support.waiting import wait_until
from support.warm import WarmProcess, flexpert

from flexpert.config import load_config
from flexpert.errors import ConfigError

pytestmark = pytest.mark.timeout(300)


def test_without_a_way_to_join_it_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"--join-listen tcp://0\.0\.0\.0:7000.*--ranks 1"):
        load_config(environment={}, overrides={"cluster.ranks": 0})


class Programs:
    """flexpert's commands as processes of their own, with what they print."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[WarmProcess] = []
        self._environment = {**os.environ, "FLEXPERT_CLUSTER_TOKEN": secrets.token_urlsafe(32)}
        self.url = self.address = ""

    def start(self, name: str, *command: str) -> WarmProcess:
        with (self._folder / f"{name}.log").open("ab") as log:
            process = flexpert(command, self._environment, log, log)
        self._started.append(process)
        return process

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def head(self) -> WarmProcess:
        """One with no rank of its own; returns when it answers."""
        process = self.start(
            "head",
            *("serve", "--ranks", "0", "--max-ranks", "3", "--port", "0", "--deterministic"),
            *("--kv-memory", "16MiB", "--join-listen", "tcp://127.0.0.1:0"),
        )
        wait_until(lambda: "/v1" in self.log("head"), 60)
        said = self.log("head")
        join = re.search(r"waiting for hosts: .*flexpert join (tcp://\S+)", said)
        assert join, said
        self.address = join[1]
        found = re.search(r"requests wait for hosts: (http://\S+)/v1", said)
        assert found, said
        self.url = found[1]
        return process

    def join(self, name: str, rank: int, *flags: str) -> WarmProcess:
        return self.start(name, "join", self.address, "--id", str(rank), "--retry", "60s", *flags)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def active(self) -> set[int]:
        ranks = self.get("/cluster").json()["ranks"]
        return {rank["id"] for rank in ranks if rank["state"] == "active"}

    def wait_for(self, *ranks: int) -> None:
        wait_until(lambda: self.active() == set(ranks), 60, 0.1)

    def ask(self, number: int = 3) -> str:
        body = {
            "prompt": [(number * 37 + place * 11) % 200 + 10 for place in range(24)],
            "max_tokens": 40,
            "temperature": 0.8,
            "seed": number,
            "ignore_eos": True,
        }
        answered = httpx.post(f"{self.url}/v1/completions", json=body, timeout=90)
        assert answered.status_code == 200, answered.text
        text: str = answered.json()["choices"][0]["text"]
        return text

    def asking(self) -> Callable[[], str]:
        """Ask in the background; the function that is returned waits for the answer."""
        answers: list[str] = []
        asks = threading.Thread(target=lambda: answers.append(self.ask()), daemon=True)
        asks.start()

        def answer() -> str:
            asks.join(90)
            return answers[0]

        return answer

    def close(self) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait(5)


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    programs = Programs(tmp_path)
    try:
        yield programs
    finally:
        programs.close()


def ready(programs: Programs) -> tuple[int, Any]:
    answer = programs.get("/health/ready")
    return answer.status_code, answer.json()


@pytest.mark.slow
def test_hosts_bring_all_ranks_and_requests_wait_while_there_is_none(
    programs: Programs, tmp_path: Path
) -> None:
    head = programs.head()
    status, said = ready(programs)
    assert (status, said["ready"], said["live"]) == (503, False, True)
    assert "hosts may join (flexpert join)" in said["reason"]
    assert programs.get("/health/live").status_code == 200
    first = programs.asking()  # waits for the first host

    ready_file = tmp_path / "ready"
    one, two = programs.join("one", 1), programs.join("two", 2, "--ready-file", str(ready_file))
    expected = first()
    programs.wait_for(1, 2)
    wait_until(ready_file.exists, 10)
    assert "rank 2 serves\n" in programs.log("two")
    assert ready(programs)[0] == 200
    assert programs.ask() == expected

    answer = programs.asking()
    one.kill()
    assert answer() == expected
    programs.wait_for(2)

    one = programs.join("one", 1)
    programs.wait_for(1, 2)
    answer = programs.asking()
    for process in (*psutil.Process(two.pid).children(recursive=True), two):
        process.send_signal(signal.SIGTERM)  # as Slurm and systemd do, to all at once
    assert two.wait(30) == 0, programs.log("two")
    assert "rank 2 has left\n" in programs.log("two")
    assert not ready_file.exists()
    assert answer() == expected

    one.send_signal(signal.SIGTERM)  # the last: no change can take it out
    assert one.wait(30) == 0, programs.log("one")
    assert "could not be drained" in programs.log("one")
    wait_until(lambda: ready(programs)[0] == 503, 10)
    answer = programs.asking()
    two = programs.join("two", 2)
    assert answer() == expected
    two.kill()  # the last again, without a word
    two.wait(10)
    answer = programs.asking()
    two = programs.join("two", 2)
    assert answer() == expected

    head.send_signal(signal.SIGTERM)
    assert head.wait(30) == 0, programs.log("head")
    wait_until(lambda: "joining again" in programs.log("two"), 20)
    two.send_signal(signal.SIGTERM)
    assert two.wait(20) == 0, programs.log("two")


@pytest.mark.slow
def test_a_second_signal_ends_a_host_at_once(programs: Programs) -> None:
    programs.head()
    one, two = programs.join("one", 0), programs.join("two", 1)
    programs.wait_for(0, 1)
    two.send_signal(signal.SIGTERM)
    two.send_signal(signal.SIGINT)
    status, said = two.wait(20), programs.log("two")
    assert status == 130 or "rank 1 has left" in said, said  # it may have been faster
    programs.wait_for(0)
    assert one.poll() is None
    programs.ask()


@pytest.mark.slow
def test_the_state_without_ranks_can_be_shown(programs: Programs) -> None:
    programs.head()
    shown = subprocess.run(
        [sys.executable, "-m", "flexpert", "status", "--url", programs.url],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert "hosts may join" in " ".join(shown.split())
    assert json.loads(programs.get("/cluster").text)["ranks"] == []
