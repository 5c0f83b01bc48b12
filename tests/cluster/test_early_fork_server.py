"""A fork server that starts before its launcher is the one that serves, or ends with the head."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from flexpert.cluster.head import Head
from flexpert.cluster.processes.early_fork_server import EarlyForkServer
from flexpert.cluster.processes.launcher import LocalLauncher
from flexpert.config import Config, ModelConfig
from flexpert.errors import ConfigError, FlexpertError, ModelError, UnsupportedModel
from flexpert.forking.fork_server import MODULE, Begin

OTHERS: list[psutil.Process] = []
"""Of services that other tests of this process keep."""


def fork_servers(head: int) -> list[psutil.Process]:
    """Of the process with this pid; not those that have ended and were not waited for."""
    found = []
    for child in psutil.Process(head).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if MODULE in child.cmdline() and child not in OTHERS:  # a zombie has none
                found.append(child)
    return found


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def only_fork_server() -> psutil.Process:
    (process,) = fork_servers(os.getpid())
    return process


@pytest.fixture(autouse=True)
def _none_is_left(cold: None) -> Iterator[None]:
    OTHERS[:] = []
    OTHERS[:] = fork_servers(os.getpid())
    yield
    assert fork_servers(os.getpid()) == []


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = min(set(range(4096)) - set(map(int, os.listdir("/proc/self/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def launcher(early: EarlyForkServer) -> LocalLauncher:
    return LocalLauncher(lambda rank, status, why: None, early)


@pytest.mark.slow
def test_the_launcher_uses_it_once_and_starts_another_when_it_has_ended() -> None:
    async def scenario(early: EarlyForkServer) -> None:
        first = only_fork_server()
        using = launcher(early)
        await using.start(Config(), 120.0)
        assert only_fork_server() == first
        early.kill()  # it is the launcher's now
        first.kill()
        while first.is_running():
            await asyncio.sleep(0.01)
        end = asyncio.get_running_loop().create_future()
        using.fork("no:entry", b"", socket.socket(), lambda *how: end.set_result(how))
        status, _ = await asyncio.wait_for(end, 120)
        assert status == 1
        assert only_fork_server() != first
        await using.close()

    with EarlyForkServer(Config()) as early:
        asyncio.run(scenario(early))


@pytest.mark.slow
def test_it_has_opened_the_model_or_says_why_not() -> None:
    config = Config(model=ModelConfig(model="/no/such/model"))

    async def scenario(early: EarlyForkServer) -> None:
        using = launcher(early)
        only_fork_server().wait(120)  # what it has said is heard after its end
        with pytest.raises(ModelError, match="/no/such/model"):
            await using.start(config, 120.0)
        await using.close()

    with EarlyForkServer(config) as early:
        asyncio.run(scenario(early))


def test_it_ends_when_the_head_gives_up_before_it_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_gpu(engine: object) -> None:
        raise ConfigError("there is no GPU")

    monkeypatch.setattr("flexpert.cluster.head.check_network", no_gpu)
    with (  # noqa: PT012
        pytest.raises(ConfigError, match="there is no GPU"),
        EarlyForkServer(Config()) as early,
    ):
        process = only_fork_server()
        asyncio.run(Head(Config(), fork_server=early).start())
    assert not process.is_running()


def test_one_that_ended_before_it_was_taken_is_told() -> None:
    async def scenario(early: EarlyForkServer) -> None:
        using = launcher(early)
        early.kill()
        with pytest.raises(FlexpertError, match="ended while it started"):
            await using.start(Config(), 60.0)
        await using.close()

    with EarlyForkServer(Config()) as early:
        asyncio.run(scenario(early))


def test_it_is_not_taken_for_other_settings() -> None:
    with EarlyForkServer(Config()) as early:
        assert early.take(Config(model=ModelConfig(model="another"))) is None
        taken = early.take(Config())
        assert taken is not None
        assert early.take(Config()) is None
    process, channel = taken
    channel.close()
    assert process.poll() is None
    process.kill()
    process.wait()


def test_one_that_is_refused_is_tried_again_and_the_launcher_says_why() -> None:
    async def scenario(early: EarlyForkServer) -> None:
        using = launcher(early)
        with no_more_files(), pytest.raises(FlexpertError, match="ulimit -n"):
            await using.start(Config(), 60.0)

    with no_more_files():
        early = EarlyForkServer(Config())
    with early:
        assert early.take(Config()) is None
        asyncio.run(scenario(early))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_head_imports_leaves_nothing_behind(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "flexpert", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as head:
        try:
            until = time.monotonic() + 30
            while not (found := fork_servers(head.pid)) and time.monotonic() < until:
                time.sleep(0.01)
            (process,) = found
            time.sleep(0.3)  # the head imports torch, which takes seconds
            head.send_signal(number)
            said, _ = head.communicate(timeout=30)
        finally:
            head.kill()
    assert b"opening model" not in said, "it came too late"
    assert head.returncode in (-number, 128 + number)
    until = time.monotonic() + 1  # it has not yet imported everything then
    while lives(process) and time.monotonic() < until:
        time.sleep(0.01)
    assert not lives(process)


def test_who_asks_hears_the_log_of_its_setup_and_the_kind_of_its_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setattr(
        "flexpert.cluster.processes.early_fork_server._SETUP", f"{__name__}:refusing"
    )

    async def scenario() -> None:
        using = LocalLauncher(lambda rank, status, why: None)
        try:
            with pytest.raises(UnsupportedModel, match=r"^it is dense$"):
                await using.start(Config(), 60.0)
        finally:
            await using.close()

    asyncio.run(scenario())
    assert ("flexpert.models", logging.WARNING, "it is float16") in caplog.record_tuples


def refusing(spec: bytes) -> None:
    """A setup."""
    logging.getLogger("flexpert.models").debug("nobody wants to know")
    logging.getLogger("flexpert.models").warning("it is %s", "float16")
    raise UnsupportedModel("it is dense")


def test_what_starts_it_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "triton", "fastapi")
    program = (
        "import sys, flexpert.llm, flexpert.cli.serve_command, flexpert.server.service_process;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert said.stdout.split() == [b"[]"]


def test_an_asker_that_leaves_answers_unread_ends_it_without_a_word() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.send(msgspec.msgpack.encode(Begin("builtins:len")))
        assert select.select([ours], [], [], 60.0)[0], "it is ready, and says so"
    assert process.communicate(timeout=60.0)[1] == b""
    assert process.returncode == 0
