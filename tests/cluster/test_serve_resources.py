"""`flexpert serve` where the machine refuses something: it goes on, and says what was refused."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from support.served import CAN_BE_ANOTHER, ROOT, SOURCES, UNPRIVILEGED, Served, served
from support.waiting import wait_until

pytestmark = pytest.mark.slow
FULL = Path("/dev/full")

# disks without a byte left, where this process and its children look
FULL_DISKS = """
set -e
mount --bind "$SOURCES" /srv  # they may lie in /tmp, and so may Python's packages
mount --bind "$PREFIX" /media
for folder in /dev/shm /tmp /var/tmp "$HOME"; do
    mount -t tmpfs -o size=4096,mode=1777 tmpfs "$folder"
    case "$PREFIX" in
        "$folder"/*) mkdir -p "$PREFIX" && mount --bind /media "$PREFIX" ;;
    esac
    head -c 4096 /dev/zero > "$folder/full"
done
exec "$@"
"""


@pytest.mark.skipif(
    not ROOT or shutil.which("unshare") is None, reason="only root can mount (with unshare)"
)
def test_on_a_machine_whose_disks_are_all_full_it_serves_and_scales() -> None:
    """/dev/shm, /tmp, the caches in the home directory, and where it prints."""
    prefix = ("unshare", "-m", "sh", "-c", FULL_DISKS, "sh")
    with FULL.open("wb") as full:
        environment = {
            "HOME": "/mnt",
            "SOURCES": str(SOURCES),
            "PYTHONPATH": "/srv",
            "PREFIX": sys.prefix,
        }
        with served(prefix=prefix, environment=environment, stdout=full, stderr=full) as service:
            head = service.process.pid  # unshare and sh became it
            assert os.readlink(f"/proc/{head}/fd/2") == "/dev/full"
            for folder in ("/dev/shm", "/tmp", "/var/tmp", environment["HOME"]):
                here = Path(f"/proc/{head}/root{folder}")
                with pytest.raises(OSError, match="No space left"):
                    (here / "more").write_bytes(b"x" * 4096)
            text = service.answer()
            assert service.scale(3)["state"] == "done"
            assert service.answer() == text
            assert service.scale(1)["state"] == "done"
            assert service.answer()
            assert service.stop() == 0


def test_nobody_who_reads_what_it_prints_is_no_reason_to_end() -> None:
    """`flexpert serve 2>&1 | head -1`, and a rank that dies, of which it says something."""
    reader, writer = os.pipe()
    # beside that: the soft limit of open files is raised as far as it may be
    prefix = ("sh", "-c", 'ulimit -Sn 48 && ulimit -Hn 900 && exec "$@"', "sh")
    read, write = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
    with read, write, served(prefix=prefix, stdout=write, stderr=write) as service:
        for process in service.processes():
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (900, 900)
        assert read.readline().startswith(b"flexpert")
        read.close()
        write.close()
        victim = service.ranks()[1]
        os.kill(victim, 9)
        wait_until(lambda: replaced(service, victim))
        assert service.answer()
        assert service.stop() == 0


def replaced(service: Served, victim: int) -> bool:
    """Ranks 0 and 1 are active, and none of them is the process of that pid."""
    ranks = service.ranks()
    return set(ranks) == {0, 1} and victim not in ranks.values()


@pytest.mark.skipif(not CAN_BE_ANOTHER, reason="root has no limit of processes")
def test_a_fork_that_is_refused_fails_its_change_with_the_reason() -> None:
    with served(prefix=UNPRIVILEGED) as service:
        before = service.ranks()
        fork_server = service.processes()[0].children()[0].pid
        limit_processes(fork_server, 1)
        text = service.answer()
        refused = service.scale(4)
        assert refused["state"] == "failed"
        assert "no process can be started" in refused["error"]
        assert "ulimit -u" in refused["error"]
        assert service.ranks() == before
        assert service.answer() == text
        limit_processes(fork_server, None)
        assert service.scale(3)["state"] == "done"


def limit_processes(pid: int, most: int | None) -> None:
    """That the process's user may have, for its forks; None: as many as it may ask for."""
    code = (
        "import resource as r, sys; pid, most = map(int, sys.argv[1:]); kind = r.RLIMIT_NPROC; "
        "hard = r.prlimit(pid, kind)[1]; r.prlimit(pid, kind, (most or hard, hard))"
    )
    command = [*UNPRIVILEGED, sys.executable, "-c", code, str(pid), str(most or 0)]
    subprocess.run(command, check=True)


def limited(files: int) -> tuple[str, ...]:
    """A prefix: so many files may be open, and no more may be had."""
    return ("sh", "-c", f'ulimit -n {files} && exec "$@"', "sh")


def test_with_64_open_files_a_burst_is_refused_and_ranks_live() -> None:
    """Those beyond what fits are told so, a change says what it lacks, and the rest is served."""
    with served(prefix=limited(64)) as service:
        text, before = service.answer(), service.ranks()
        head = psutil.Process(service.process.pid)
        with burst(service, 100) as clients:
            statuses = [status_of(client) for client in clients]
            assert statuses.count("200") == 16  # a quarter of the files: the rest is for ranks
            assert statuses.count("503") == 84, statuses
            assert head.num_fds() < 64
        assert service.answer() == text

        # now the head has no descriptor left at all
        soft, hard = resource.prlimit(head.pid, resource.RLIMIT_NOFILE)
        free = min(set(range(64)) - set(map(int, os.listdir(f"/proc/{head.pid}/fd"))))
        with httpx.Client(base_url=service.url, timeout=30) as open_already:
            assert open_already.get("/cluster").status_code == 200
            resource.prlimit(head.pid, resource.RLIMIT_NOFILE, (free + 1, hard))
            with burst(service, 20):
                spent = sum(head.cpu_times()[:2])
                began = time.monotonic()
                refused = open_already.post("/cluster/operations", json={"ranks": 4})
                assert refused.status_code == 400, refused.text
                assert "ulimit -n" in refused.json()["error"]["message"]
                time.sleep(max(0.0, began + 2.0 - time.monotonic()))
                share = (sum(head.cpu_times()[:2]) - spent) / (time.monotonic() - began)
                assert share < 0.5, "of a processor: it tries to accept again and again"
            resource.prlimit(head.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert service.ranks() == before
        assert service.answer() == text
        assert service.scale(3)["state"] == "done"
        assert len(service.log.read_text().splitlines()) < 60


@contextmanager
def burst(service: Served, count: int) -> Iterator[list[socket.socket]]:
    """So many connections at once."""
    port = httpx.URL(service.url).port
    assert port
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            for _ in range(count)
        ]


def test_with_too_few_open_files_it_says_at_once_what_it_needs() -> None:
    began = time.monotonic()
    run = subprocess.run(
        [*limited(40), sys.executable, "-m", "flexpert", "serve", "--ranks", "4", "--port", "0"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert "40 files may be open at once (ulimit -n)" in line
    assert time.monotonic() - began < 30


def status_of(client: socket.socket) -> str:
    """Of /health/ready, the connection stays open; what was said before is the answer, too."""
    client.settimeout(20)
    try:
        client.sendall(b"GET /health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
        said = client.recv(1 << 16)
    except ConnectionError as error:
        return type(error).__name__
    return said.split()[1].decode() if said else "closed"
