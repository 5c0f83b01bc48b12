"""Another local user can read, send, stop and fill nothing, where keys are asked for."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import CAN_BE_ANOTHER, OTHER_UID, SERVICE_UID, UNPRIVILEGED, Served, served

from flexpert.engine import rank_protocol as msg
from flexpert.forking.fork_server import Fork, encode
from flexpert.forking.framing import frame

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_BE_ANOTHER, reason="only root can be another user (with setpriv)"),
]
API_KEY, CONTROL_KEY = "a-key-of-the-environment", "a-key-in-a-file"
OPEN = {
    *("/health", "/health/live", "/health/ready", "/ping", "/load", "/version", "/metrics"),
}


def sockets_of(pids: list[int]) -> set[str]:
    """Inodes."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            name = os.readlink(descriptor)
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    return inodes


def unix_names(inodes: set[str]) -> list[str]:
    """Of Unix sockets that can be connected to, abstract ones with a leading @."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [line[7] for line in lines if line[6] in inodes and len(line) > 7]


def bound(inodes: set[str], kind: str) -> list[tuple[str, int]]:
    """Addresses (hexadecimal) and ports of sockets that listen, or take datagrams."""
    found = []
    for version in ("", "6"):
        for line in Path(f"/proc/net/{kind}{version}").read_text().splitlines()[1:]:
            local, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if inode in inodes and state in ("0A", "07"):
                address, port = local.split(":")
                found.append((address, int(port, 16)))
    return found


def owner_of(path: Path) -> int | None:
    """None: it is gone, as files of others in /tmp may be at any time."""
    try:
        return path.lstat().st_uid
    except OSError:
        return None


def below(folder: Path) -> Iterator[Path]:
    """All that is there; what others remove meanwhile is not."""
    for place, folders, files in os.walk(folder):
        yield from (Path(place, name) for name in (*folders, *files))


def targets(service: Served, home: Path) -> dict[str, Any]:
    """What there is to attack."""
    processes = []
    for process in service.processes():
        first = Path(f"/proc/{process.pid}/maps").read_text().split("-")[0]
        descriptors = sorted(int(name) for name in os.listdir(f"/proc/{process.pid}/fd"))
        processes.append(
            {"pid": process.pid, "descriptors": descriptors, "address": int(first, 16)}
        )
    own = [
        path
        for folder in (home, Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"))
        for path in (folder, *below(folder))
        if owner_of(path) == SERVICE_UID and not path.is_symlink()
    ]
    described = service.http("GET", "/openapi.json").json()["paths"]
    requests = [
        (method.upper(), path.replace("{operation_id}", "op-1").replace("{model}", "tiny"))
        for path, methods in described.items()
        for method in methods
        if path not in OPEN
    ]
    return {
        "processes": processes,
        "sockets": unix_names(sockets_of([process["pid"] for process in processes])),
        "files": [str(path) for path in own if stat.S_ISREG(path.stat().st_mode)],
        "folders": [str(path) for path in own if path.is_dir()],
        "port": httpx.URL(service.url).port,
        "requests": requests,
        "messages": [
            frame(msg.encode(msg.Stop())).hex(),
            encode(Fork(0, "os:abort", b"")).hex(),
        ],
    }


def attack(told: dict[str, Any]) -> dict[str, Any]:
    """What the other user could do."""
    script = Path(__file__).parents[1] / "support" / "other_user.py"
    run = subprocess.run(
        [sys.executable, str(script), str(OTHER_UID)],
        input=json.dumps(told),
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,  # within one, SIGCONT is anybody's
    )
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def secrets_in(pid: int, name: str) -> list[str]:
    text = Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    return [key for key in (API_KEY, CONTROL_KEY) if key in text]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Of the service's user, who can get there; with the file of the control key."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o711)
    key = tmp_path / "key"
    key.write_text(CONTROL_KEY)
    key.chmod(0o600)
    for path in (key, tmp_path):
        os.chown(path, SERVICE_UID, SERVICE_UID)
    return tmp_path


def test_another_user_can_do_nothing_to_a_service_with_keys(home: Path) -> None:
    environment = {"HOME": str(home), "FLEXPERT_SERVER__API_KEY": API_KEY}
    flags = ("--control-key-file", str(home / "key"))
    with served(*flags, prefix=UNPRIVILEGED, environment=environment, key=CONTROL_KEY) as service:
        before = service.ranks()
        assert len(before) == 2
        pids = [process.pid for process in service.processes()]
        assert len(pids) >= 5, "head, fork server, two ranks and a worker"
        assert all(os.stat(f"/proc/{pid}").st_uid == SERVICE_UID for pid in pids)

        told = targets(service, home)
        assert len(told["requests"]) > 10
        inodes = sockets_of(pids)
        assert bound(inodes, "tcp") == [("0100007F", told["port"])]
        assert bound(inodes, "udp") == []
        assert told["sockets"] == []

        over = threading.Event()
        texts: list[str] = []
        asking = Served(service.process, service.url, service.log, bearer(API_KEY))

        def traffic() -> None:
            while not over.is_set():
                texts.append(asking.answer())

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            result = attack(told)
        finally:
            over.set()
            thread.join(30)
        assert result["found"] == []
        assert result["tried"] > 300
        assert len(set(texts)) == 1, "all were answered, and alike"

        for pid in pids:
            assert secrets_in(pid, "cmdline") == []
        assert secrets_in(pids[0], "environ") == [API_KEY]  # where it was given
        for pid in pids[1:]:
            assert secrets_in(pid, "environ") == []
        assert service.ranks() == before
        assert asking.answer() == texts[0]
        assert API_KEY not in service.log.read_text()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_without_keys_only_http_is_open_to_another_user(home: Path) -> None:
    """As the documentation says: whoever reaches the port may use and scale the service."""
    with served(prefix=UNPRIVILEGED, environment={"HOME": str(home)}) as service:
        before = service.ranks()
        told = targets(service, home)
        opened = attack({**told, "requests": [("GET", "/cluster")]})["found"]
        assert set(opened) == {"GET /cluster: 'status 200'"}
        assert service.ranks() == before
        assert service.answer()


def test_what_another_user_is_kept_from_would_be_noticed(tmp_path: Path) -> None:
    """The attack works where there is something to take."""
    tmp_path.chmod(0o777)
    name = f"@flexpert-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name[1:])
        listener.listen()
        inode = os.readlink(f"/proc/self/fd/{listener.fileno()}")[8:-1]
        assert unix_names({inode}) == [name]
        idle = "import os, sys; os.setuid(int(sys.argv[1])); print(flush=True); sys.stdin.read()"
        victim = subprocess.Popen(
            [sys.executable, "-c", idle, str(OTHER_UID)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert victim.stdout
        victim.stdout.readline()
        open_file = tmp_path / "open"
        open_file.touch()
        open_file.chmod(0o666)
        told = {
            "processes": [{"pid": victim.pid, "descriptors": [], "address": 0}],
            "sockets": [name],
            "files": [str(open_file)],
            "folders": [],
            "port": 1,
            "requests": [],
            "messages": [],
        }
        found = " ".join(attack(told)["found"])
        victim.communicate()
    assert victim.returncode == -9
    assert "Unix socket" in found
    assert "kill" in found
    assert str(open_file) in found
