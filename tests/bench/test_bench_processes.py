"""Processes of a measurement: they start, answer and end; nothing listens, and nothing is left."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpert.bench.processes import connection as connections
from flexpert.bench.processes import forks
from flexpert.bench.processes.connection import Closed, StreamConnection
from flexpert.bench.processes.socket_store import SocketStore, StoreServer, Values
from flexpert.errors import FlexpertError
from flexpert.forking.framing import frame

HERE = "test_bench_processes"


# ---- what the processes of these tests do -------------------------------------------------------


def echo(end: socket.socket) -> None:
    connection = StreamConnection(end)
    while True:
        connection.send(connection.receive())


def raises(end: socket.socket) -> None:
    raise SystemExit(3)


def counts(end: socket.socket, exported: socket.socket) -> None:
    store = SocketStore(exported)
    for _ in range(100):
        store.add("count", 1)
    StreamConnection(end).send(b"done")


def life(end: socket.socket) -> None:
    StreamConnection(end).send(importlib.import_module("flexpert.comm.agreement")._life)


@pytest.fixture
def store() -> Iterator[StoreServer]:
    with StoreServer() as server:
        yield server


# ---- processes ----------------------------------------------------------------------------------


def test_a_process_answers_and_is_gone_after_its_end() -> None:
    process = forks.start(f"{HERE}:echo")
    for size in (0, 1, 70_000, 3_000_000):
        text = os.urandom(size)
        sent = threading.Thread(target=process.connection.send, args=(text,))
        sent.start()
        assert process.connection.receive(30.0) == text
        sent.join()
    assert process.alive()
    process.end()
    process.end()
    assert process.exitcode == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)


def test_the_exit_status_is_known() -> None:
    process = forks.start(f"{HERE}:raises")
    with pytest.raises(Closed):
        process.connection.receive(30.0)
    assert process.join(30.0)
    assert process.exitcode == 1  # after its traceback
    process.signal(signal.SIGKILL)  # reaches nobody
    process.end()


def test_a_stopped_process_is_ended() -> None:
    process = forks.start(f"{HERE}:echo")
    process.signal(signal.SIGSTOP)
    process.end()
    assert process.exitcode == -signal.SIGKILL


def test_every_fork_is_another_life() -> None:
    """Else one that is stopped would take the process that has its id by then for itself."""
    processes = [forks.start(f"{HERE}:life") for _ in range(3)]
    try:
        assert len({process.connection.receive(30.0) for process in processes}) == 3
    finally:
        for process in processes:
            process.end()


def test_after_the_loss_of_the_fork_server_another_is_started() -> None:
    first = forks.start(f"{HERE}:echo")
    server = psutil.Process(first.pid).parent()
    assert server is not None
    assert server.ppid() == os.getpid()
    server.kill()
    assert first.join(30.0)  # it ends with its server
    second = forks.start(f"{HERE}:echo")
    second.connection.send(b"x")
    assert second.connection.receive(30.0) == b"x"
    first.end()
    second.end()


def test_nothing_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    """However it ends, even with a rank that is stopped."""
    script = tmp_path / "starts.py"
    script.write_text(
        "import signal, sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from flexpert.bench.processes import forks\n"
        f"made = [forks.start('{HERE}:echo') for _ in range(2)]\n"
        "made[0].signal(signal.SIGSTOP)\n"
        "print(*(process.pid for process in made), flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pids = [int(pid) for pid in starter.stdout.readline().split()]
        assert len(pids) == 2
        server = psutil.Process(pids[0]).parent()
        assert server is not None
        left = [server, *(psutil.Process(pid) for pid in pids)]
        starter.kill()
        starter.wait()
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []


@pytest.mark.parametrize("room", [0, 2])
def test_a_process_that_cannot_be_forked_fails_alone(room: int) -> None:
    """room: descriptors: none for what is handed on, or none for the child's own."""
    running = forks.start(f"{HERE}:echo")
    server = psutil.Process(running.pid).parent()
    assert server is not None
    before = server.rlimit(psutil.RLIMIT_NOFILE)
    used = {int(number) for number in os.listdir(f"/proc/{server.pid}/fd")}
    free = (number for number in itertools.count() if number not in used)
    limit = next(itertools.islice(free, room, None))  # so many numbers below it are free
    server.rlimit(psutil.RLIMIT_NOFILE, (limit, before[1]))
    try:
        with pytest.raises(FlexpertError, match="no process can be started"):
            forks.start(f"{HERE}:echo")
        running.connection.send(b"x")
        assert running.connection.receive(30.0) == b"x"
    finally:
        server.rlimit(psutil.RLIMIT_NOFILE, before)
        running.end()


# ---- messages -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=64))
def test_whatever_comes_is_a_message_or_the_end(garbage: bytes) -> None:
    ours, theirs = connections.pair()
    with StreamConnection(ours) as connection, theirs:
        theirs.sendall(garbage)
        theirs.shutdown(socket.SHUT_WR)
        try:
            while True:
                assert isinstance(connection.receive(5.0), bytes)
        except Closed:
            pass


def test_a_message_in_pieces_is_kept_until_it_is_whole() -> None:
    ours, theirs = connections.pair()
    with StreamConnection(ours) as connection, theirs:
        framed = frame(b"whole")
        theirs.sendall(framed[:6])
        with pytest.raises(TimeoutError):
            connection.receive(0.01)
        theirs.sendall(framed[6:])
        assert connection.receive(5.0) == b"whole"


# ---- the store ----------------------------------------------------------------------------------


def test_the_store_does_what_torch_s_do(store: StoreServer) -> None:
    """Side by side, alone and below a prefix."""
    ours, torchs = SocketStore(store.hand_out()), dist.HashStore()
    for prefix in ("", "a", "b"):
        seen = []
        for one in (ours, torchs):
            it = dist.PrefixStore(prefix, one) if prefix else one
            it.set("x", "1")
            it.set("bytes", bytes(range(1, 9)).hex())
            seen.append(
                [
                    it.get("x"),
                    it.get("bytes"),
                    it.compare_set("x", "1", "2"),
                    it.compare_set("x", "1", "3"),
                    it.compare_set("missing", "-", "-"),
                    it.compare_set("new", "", "here"),
                    it.get("new"),
                    it.add("n", 3),
                    it.add("n", -5),
                    it.check(["x", "new"]),
                    it.check(["x", "nowhere"]),
                    it.delete_key("x"),
                    it.delete_key("x"),
                    it.check(["x"]),
                    it.multi_get(["new", "n"]),
                ]
            )
        # HashStore has no bytes for a missing key that is compared
        assert seen[0][:4] == seen[1][:4]
        assert seen[0][5:] == seen[1][5:]
        assert seen[0][4] == b"-"


def test_a_key_is_waited_for(store: StoreServer) -> None:
    one, other = (
        SocketStore(store.hand_out()),
        SocketStore(store.hand_out(), timeout_s=0.05),
    )
    with pytest.raises(TimeoutError, match="no late within"):
        other.wait(["late"], timedelta(seconds=0.05))
    with pytest.raises(TimeoutError, match="no late within"):
        other.get("late")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(dist.PrefixStore("p", one).get, "late")
        other.set("p/late", b"x")
        assert answer.result(10.0) == b"x"


def test_processes_and_threads_share_the_store(store: StoreServer) -> None:
    processes = [forks.start(f"{HERE}:counts", store.hand_out()) for _ in range(3)]
    ours = SocketStore(store.hand_out())
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: ours.add("count", 1), range(200)))
        for process in processes:
            assert process.connection.receive(30.0) == b"done"
    finally:
        for process in processes:
            process.end()
    assert ours.get("count") == b"500"


def test_who_does_not_read_or_says_nonsense_disturbs_nobody(store: StoreServer) -> None:
    ours = SocketStore(store.hand_out())
    ours.set("large", b"x" * 500_000)
    silent, mad = store.hand_out(), store.hand_out()
    # asks for more than its socket holds, and reads none of it
    packet = frame(b"\x92\xa3get\x91\xa5large")
    silent.sendall(packet * 8)
    mad.sendall(frame(b"\xc1nonsense"))
    with mad:
        mad.settimeout(10.0)
        assert mad.recv(1) == b""  # cut off
    assert ours.get("large") == b"x" * 500_000
    with StreamConnection(silent) as late:
        for _ in range(8):
            assert len(late.receive(10.0)) > 500_000


def test_without_the_process_that_keeps_it_every_call_fails(store: StoreServer) -> None:
    ours = SocketStore(store.hand_out())
    ours.set("x", "1")
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="the store cannot be asked"):
        ours.get("x")


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=64))
def test_any_packet_is_answered_or_refused(packet: bytes) -> None:
    values = Values()
    with contextlib.suppress(ValueError):  # msgspec's are
        assert isinstance(values.answer(packet), bytes)


# ---- nothing listens ----------------------------------------------------------------------------


def listening(root: psutil.Process) -> set[str]:
    """Addresses, in hex as in /proc/net, that root and all below it listen on: TCP, bound UDP."""
    inodes = set()
    for process in [root, *root.children(recursive=True)]:
        links = []
        with contextlib.suppress(OSError):  # it has just ended
            for number in os.listdir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(OSError):  # just closed
                    links.append(os.readlink(f"/proc/{process.pid}/fd/{number}"))
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = set()
    for name, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


def is_loopback(address: str) -> bool:
    return address.endswith("7F") if len(address) == 8 else address == "0" * 24 + "01000000"


def test_what_listens_is_found() -> None:
    """This test can fail: torch's TCPStore is seen."""
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert not all(map(is_loopback, listening(psutil.Process())))
    del served


HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))
SMALL = ("--tokens", "4", "--hidden", "256")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "comm", "--ranks", "2", "--repeat", "10", *SMALL),
        ("plan", "--random", "1", "--channel", "nixl" if HAS_NIXL else "shm", *SMALL),
    ],
    ids=["bench comm", "plan"],
)
def test_nothing_listens_beyond_loopback(arguments: tuple[str, ...]) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GLOO_SOCKET_IFNAME", "UCX_NET_DEVICES")
    }
    seen: set[str] = set()
    most = 0
    with subprocess.Popen(
        [sys.executable, "-m", "flexpert", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
    ) as command:
        root = psutil.Process(command.pid)
        while command.poll() is None:
            seen |= listening(root)
            most = max(most, len(root.children(recursive=True)))
            time.sleep(0.1)  # whatever listens does so for the whole run
        assert command.stdout is not None
        assert command.returncode == 0, command.stdout.read().decode()
    assert most >= 2  # it was seen at work: a fork server and a rank
    assert [address for address in seen if not is_loopback(address)] == []
