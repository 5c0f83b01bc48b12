"""What counts as a rank's work, and whom a launcher kills."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexpert.cluster.interfaces import Work
from flexpert.cluster.processes.launcher import LocalLauncher, _Child
from flexpert.cluster.stall_detector import worked
from flexpert.config import Config
from flexpert.forking.fork_server import (
    Exited,
    Fork,
    Kill,
    Started,
    decode_request,
    encode,
)

pytestmark = pytest.mark.usefixtures("cold")

BUSY = "print(flush=True)\nwhile True: pass"
HOLDS_THE_LOCK = """
import ctypes, threading, time
def wait():
    while True: time.sleep(0.01)
for _ in range(4): threading.Thread(target=wait, daemon=True).start()
print(flush=True)
ctypes.PyDLL(None).sleep(100)
"""
READS = """
import mmap, time
memory = mmap.mmap(-1, 1 << 24)
print(flush=True)
for page in range(0, 1 << 24, 4096):
    memory[page] = 1
    time.sleep(0.01)
"""


def known(process: subprocess.Popen[bytes]) -> _Child:
    """As if a fork server, whose place this process takes, had told of it."""
    child = _Child(lambda status, why: None)
    child.found(process.pid, os.pidfd_open(process.pid))
    return child


@pytest.fixture
def busy() -> Iterator[tuple[LocalLauncher, int]]:
    """A launcher whose rank 0 is a process that wants a processor all the time."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        launcher = LocalLauncher(lambda rank, status: None)
        launcher._children[0] = known(process)
        yield launcher, process.pid
    finally:
        process.kill()
        process.communicate()


def test_who_waits_for_a_processor_is_not_stalled(
    busy: tuple[LocalLauncher, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, _ = busy
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: 1)  # it gets none
    before, after = launcher.work(0), launcher.work(0)
    assert before
    assert after
    assert worked(before, after, 1.0, before.runnable & after.runnable)


def test_who_is_stopped_does_not_work(busy: tuple[LocalLauncher, int]) -> None:
    launcher, pid = busy
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    before = launcher.work(0)
    assert before is not None
    assert launcher.work(0) == before


@pytest.mark.parametrize(("code", "works"), [(HOLDS_THE_LOCK, False), (READS, True)])
def test_waiting_for_the_interpreter_is_no_work_and_getting_pages_is(
    code: str, works: bool
) -> None:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        launcher = LocalLauncher(lambda rank, status, why: None)
        launcher._children[0] = known(process)
        time.sleep(0.1)
        began, before = time.monotonic(), launcher.work(0)
        time.sleep(0.8)
        after = launcher.work(0)
        assert before is not None
        assert after is not None
        assert after.processor_s > before.processor_s
        starved = after.runnable
        for _ in range(8):  # a wait's turn takes microseconds
            time.sleep(0.02)
            work = launcher.work(0)
            assert work is not None
            starved &= work.runnable
        before = Work(before.processor_s, before.faults)
        assert worked(before, after, time.monotonic() - began, starved) == works
    finally:
        process.kill()
        process.communicate()


def test_who_is_gone_does_none() -> None:
    launcher = LocalLauncher(lambda rank, status: None)
    assert launcher.work(7) is None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    launcher._children[7] = known(gone)
    gone.wait()
    assert launcher.work(7) is None


@pytest.fixture
def forking(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[LocalLauncher, socket.socket]]:
    """A launcher, and the socket of a fork server, played by this process, that has been asked for
    rank 0.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        launcher = LocalLauncher(lambda rank, status, why: None)
        launcher._config = Config()
        launcher._channel = ours
        monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail(f"kill({pid}, {number})"))
        launcher.spawn(0, "no:entry", b"", socket.socket())
        packet, descriptors, _, _ = socket.recv_fds(theirs, 1 << 16, 1)
        os.close(descriptors[0])
        assert decode_request(packet) == Fork(0, "no:entry", b"")
        yield launcher, theirs


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    read = "import sys; sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", read], stdin=subprocess.PIPE)
    yield process
    process.communicate()  # its input ends, and so does it


def test_a_rank_that_is_killed_again_and_again_while_it_forks_is_the_only_one_killed(
    forking: tuple[LocalLauncher, socket.socket], sleeper: subprocess.Popen[bytes]
) -> None:
    """A pid that is not known is no number to signal: -1 would be every process of the user."""
    launcher, _ = forking
    for _ in range(3):
        launcher.kill(0)
    launcher._handle(Started(0, sleeper.pid), [os.pidfd_open(sleeper.pid)])
    assert sleeper.wait(10.0) == -signal.SIGKILL
    launcher.kill(0)


def test_who_ended_before_it_was_told_is_not_signalled(
    forking: tuple[LocalLauncher, socket.socket], sleeper: subprocess.Popen[bytes]
) -> None:
    """Its pid may be another's by then; its descriptor means nobody else."""
    launcher, _ = forking
    gone = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(gone.pid)
    gone.wait()
    launcher._handle(Started(0, sleeper.pid), [pidfd])
    launcher.kill(0)
    assert sleeper.poll() is None


def test_without_a_descriptor_for_a_rank_its_fork_server_is_asked_to_kill_it(
    forking: tuple[LocalLauncher, socket.socket], sleeper: subprocess.Popen[bytes]
) -> None:
    launcher, server = forking
    launcher._handle(Started(0, sleeper.pid), [])
    launcher.kill(0)
    assert decode_request(server.recv(1 << 16)) == Kill(0)
    assert sleeper.poll() is None


def test_at_the_end_nobody_waits_for_a_child_that_is_no_rank(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """A rank is told to end, and ends by itself; a helper would wait for work."""

    async def scenario() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            launcher = LocalLauncher(lambda rank, status, why: None)
            launcher._config = Config()
            launcher._channel = ours
            launcher._process = subprocess.Popen([sys.executable, "-c", ""])
            number = launcher.fork("no:entry", b"", socket.socket(), lambda status, why: None)
            launcher._handle(Started(number, sleeper.pid), [os.pidfd_open(sleeper.pid)])
            closing = asyncio.ensure_future(launcher.close(timeout_s=600))
            status = await asyncio.to_thread(sleeper.wait, 10)
            assert status == -signal.SIGKILL
            launcher._handle(Exited(number, sleeper.pid, status), [])
            await asyncio.wait_for(closing, 10)

    asyncio.run(scenario())


def test_a_fork_server_that_the_system_refuses_is_the_end_of_those_who_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    async def scenario() -> None:
        ends: asyncio.Queue[tuple[int, int, str]] = asyncio.Queue()
        launcher = LocalLauncher(lambda *end: ends.put_nowait(end))
        launcher._config = Config()  # it was up, and has ended
        monkeypatch.setattr(subprocess, "Popen", refuse)
        for _ in range(2):  # the next one is tried anew
            launcher.spawn(0, "no:entry", b"", socket.socket())
            async with asyncio.timeout(5):
                rank, status, why = await ends.get()
            assert (rank, status) == (0, 1)
            assert "Resource temporarily unavailable" in why
        await launcher.close()

    asyncio.run(scenario())


# ---- what nobody waits for ----------------------------------------------------------------------


def played(
    play: Callable[[socket.socket], None], ends: list[tuple[int, str]]
) -> subprocess.Popen[bytes]:
    """A launcher whose fork server is `play` starts two ranks; until their ends are told.

    Whom they are told to notes them in `ends`, and raises. Returns the fork server's process.
    """

    def on_exit(rank: int, status: int, why: str) -> None:
        ends.append((rank, why))
        raise RuntimeError("the coordinator is at a loss")

    async def scenario() -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        launcher = LocalLauncher(on_exit)
        launcher._config, launcher._channel, launcher._process = Config(), ours, process
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, launcher._receive)
        with theirs:
            launcher.spawn(0, "no:entry", b"", socket.socket())
            launcher.spawn(1, "no:entry", b"", socket.socket())
            play(theirs)
            async with asyncio.timeout(10):
                await launcher._empty.wait()
                await asyncio.gather(*launcher._tasks)
            launcher._disconnect()
        return process

    process = asyncio.run(scenario())
    process.kill()
    process.wait()
    return process


def test_ends_are_told_though_one_could_not_be_handled(caplog: pytest.LogCaptureFixture) -> None:
    ends: list[tuple[int, str]] = []

    def play(server: socket.socket) -> None:
        server.send(encode(Exited(7, 1, 0)))  # nobody that was asked for
        server.send(encode(Exited(0, 1, 0)))
        server.send(encode(Exited(1, 1, 0)))

    played(play, ends)
    assert ends == [(0, ""), (1, "")]
    assert [bool(record.exc_info) for record in caplog.records] == [True, True]


@pytest.mark.parametrize("packet", [b"\xc1", b"\xff" * 5000, encode(Kill(0)), b"\x91" * 3000])
def test_a_fork_server_that_says_nonsense_is_ended_and_its_children_with_it(
    packet: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ends: list[tuple[int, str]] = []
    process = played(lambda server: server.send(packet), ends)
    assert process.returncode == -signal.SIGKILL
    assert ends == [(rank, "the fork server ended (SIGKILL)") for rank in (0, 1)]
    assert "is not understood" in caplog.text


def test_where_no_fork_server_can_be_started_a_change_fails_and_the_next_one_tries_again() -> None:
    ends: list[tuple[int, str]] = []

    async def scenario() -> None:
        launcher = LocalLauncher(lambda rank, status, why: ends.append((rank, why)))
        launcher._config, launcher._timeout_s = Config(), 60.0
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for rank in (0, 1):
            end = socket.socket()
            free = min(set(range(4096)) - set(map(int, os.listdir("/proc/self/fd"))))
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
                launcher.spawn(rank, "no:entry", b"", end)
                async with asyncio.timeout(10):
                    await launcher._empty.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await launcher.close()

    asyncio.run(scenario())
    assert [rank for rank, _ in ends] == [0, 1]
    assert all("ulimit -n" in why for _, why in ends)


@pytest.mark.slow
def test_a_fork_server_has_one_thread() -> None:
    """What another thread holds at a fork, a lock say, is held forever in the rank."""

    async def scenario() -> list[str]:
        launcher = LocalLauncher(lambda rank, status: None)
        await launcher.start(Config(), 120.0)
        assert launcher._process
        names = [
            task.read_text() for task in Path(f"/proc/{launcher._process.pid}/task").glob("*/comm")
        ]
        await launcher.close()
        return names

    assert len(asyncio.run(scenario())) == 1
