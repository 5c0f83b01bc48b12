"""docs/deploy.md: its commands are run as they stand, on hosts that are namespaces.

Each has a network with the address that the page names, and processes of its own, so that ranks of
two hosts are on two machines. The hosts share a folder, in place of a copy of the token's file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.namespaces import cluster_in
from support.waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs/deploy.md"
ADDRESSES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
LIVES_ON = ("flexpert serve", "flexpert join")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
        reason="pip install 'flexpert[nixl]' to test it",
    ),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "openssl"))),
        reason="needs namespaces",
    ),
]


def steps() -> Iterator[tuple[str, str]]:
    """(address of the host, line), in the page's order."""
    for body in re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        where, *lines = body.replace("\\\n", " ").splitlines()
        hosts = re.findall(r"\bon (10\.0\.0\.\d)\b", where)
        assert hosts, f"the block does not say on which host: {where}"
        yield from ((host, line) for host in hosts for line in lines)


def ip(*args: str) -> str:
    done = subprocess.run(["ip", *args], check=True, capture_output=True, text=True, timeout=10)
    return done.stdout


class Hosts:
    """The namespaces, and what runs in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.switch = f"fxd{os.getpid()}"
        self.spaces = {a: f"fxd{a[-1]}-{os.getpid()}" for a in ADDRESSES}
        self.running: dict[str, subprocess.Popen[bytes]] = {}  # by host
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UCX_TLS": "tcp",
        }
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for address, name in self.spaces.items():
            port = f"p{address[-1]}"
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ends = ("eth1", "netns", name, "type", "veth", "peer", "name", port)
            ip("link", "add", *ends, "netns", self.switch)
            ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth1")
            ip("-n", name, "link", "set", "eth1", "up")

    def line(self, host: str, line: str) -> list[str]:
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = own if line.startswith(LIVES_ON) else []
        return ["ip", "netns", "exec", self.spaces[host], *inside, "bash", "-c", f"exec {line}"]

    def log(self, host: str) -> Path:
        return self.folder / f"{host}.log"

    def said(self, host: str) -> str:
        """By what runs there now."""
        return self.log(host).read_text(errors="replace")

    def start(self, host: str, line: str) -> None:
        """In the place of what runs there."""
        self.stop(host)
        with self.log(host).open("wb") as log:
            self.running[host] = subprocess.Popen(
                self.line(host, line),
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def stop(self, host: str) -> None:
        """SIGTERM to the command itself; it ends well."""
        if host in self.running:
            process = self.running.pop(host)
            if process.poll() is None:
                for own in psutil.Process(process.pid).children():
                    own.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0, self.said(host)

    def run(self, host: str, line: str) -> str:
        command = self.line(host, line)
        command[-1] = line
        done = subprocess.run(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (line, done.stdout)
        return done.stdout

    def wait_for(self, host: str, text: str) -> None:
        process = self.running[host]
        wait_until(lambda: text in self.said(host) or process.poll() is not None, 60, 0.1)
        assert text in self.said(host), self.said(host)

    def wait_for_ranks(self, count: int) -> None:
        """Until so many are active; asked on the head's host, without a key."""

        def there() -> bool:
            ranks = cluster_in(self.spaces[ADDRESSES[0]], 8000)["ranks"]
            return sum(rank["state"] == "active" for rank in ranks) >= count

        wait_until(there, 60, 0.2)

    def wait_for_shown_ranks(self, count: int, line: str, host: str) -> None:
        """Until a command shows so many active ones."""

        def there() -> bool:
            return len(re.findall(r"\bactive\b", self.run(host, line))) >= count

        wait_until(there, 60, 0.5)

    def close(self) -> None:
        for process in self.running.values():
            process.kill()  # unshare takes the namespace with it
            process.wait(10)
        for name in (*self.spaces.values(), self.switch):
            with contextlib.suppress(subprocess.SubprocessError):
                for pid in ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    try:
        ip("netns", "list")
        subprocess.run(["unshare", "--pid", "--fork", "true"], check=True, timeout=10)
    except (subprocess.SubprocessError, OSError):
        pytest.skip("no namespaces here")
    hosts = Hosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


def test_the_page_from_one_machine_to_a_cluster(hosts: Hosts) -> None:
    printed: list[str] = []
    joined = 0
    for host, line in steps():
        if line.startswith("flexpert serve"):
            hosts.start(host, line)
            hosts.wait_for(host, "/v1")
            own = int(re.findall(r"--ranks (\d)", line)[0])
            assert ("requests wait for hosts" in hosts.said(host)) == (own == 0)
            joined = own
            if own == 0 and "--host" not in line:
                hosts.wait_for_ranks(1)  # the agent of the head before has come
        elif line.startswith("flexpert join"):
            hosts.start(host, line)
            hosts.wait_for(host, " starts")
            joined += 1
            if "--interface" not in line:
                hosts.wait_for_ranks(joined)
        elif line.startswith("FLEXPERT_API_KEY="):
            hosts.wait_for_shown_ranks(joined, line, host)
        else:
            printed.append(hosts.run(host, line))
        if line == "flexpert leave 3":
            assert hosts.running.pop("10.0.0.3").wait(20) == 0, hosts.said("10.0.0.3")
            assert "rank 3 has left" in hosts.said("10.0.0.3")
    assert any("over NIXL to" in text for text in printed)
    assert any("remove 3" in text for text in printed)
    for host in ADDRESSES[1:]:
        heard = ip("netns", "exec", hosts.spaces[host], "ss", "-Htln")
        listens = [line.split()[3].rpartition(":") for line in heard.splitlines()]
        assert listens
        assert {address for address, _, _ in listens} == {host}, "that of eth1 only"
        assert all(20000 <= int(port) <= 20100 for _, _, port in listens)
    for host in reversed(ADDRESSES):
        hosts.stop(host)
