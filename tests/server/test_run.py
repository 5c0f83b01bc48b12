"""Promises of `serve`: a start that fails at once, and an end that is clean."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.fake_head import Behaviour, FakeHead

from flexpert.config import ClusterConfig, Config, ServerConfig
from flexpert.errors import ConfigError, FlexpertError
from flexpert.server.service_process import bind, serve

CONFIG = Config(server=ServerConfig(port=0), cluster=ClusterConfig(shutdown_timeout=5))


class Beside:
    """Something done in a thread while `serve` has the main thread, as it must for signals."""

    def __init__(
        self,
        capture: pytest.CaptureFixture[str],
        do: Callable[[str], object],
        *,
        gap_s: float = 0.01,
    ) -> None:
        self._capture = capture
        self._do = do
        self._gap_s = gap_s
        self.config = CONFIG
        self.failure: BaseException | None = None
        self.output = ""
        self._serving = False
        self.head = FakeHead()

    def head_for(self, config: Config) -> FakeHead:
        self.head = FakeHead(config, Behaviour(gap_s=self._gap_s))
        return self.head

    def serve(self) -> int:
        thread = threading.Thread(target=self._run)
        thread.start()
        self._serving = True
        try:
            code = serve(self.config, head=self.head_for)
        finally:
            self._serving = False
        thread.join(10)
        self.output += self._capture.readouterr().out
        if self.failure:
            raise self.failure
        return code

    def _run(self) -> None:
        try:
            while "ready: " not in self.output:
                time.sleep(0.01)
                self.output += self._capture.readouterr().out
            url = self.output.split("ready: ")[1].split()[0].removesuffix("/v1")
            self._do(url)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self.failure = error
            if self._serving:  # else nobody catches it
                os.kill(os.getpid(), signal.SIGTERM)


def stream(url: str, tokens: int, on_first: Callable[[], None]) -> str:
    """Text of a streamed completion."""
    body = {"prompt": "x", "max_tokens": tokens, "stream": True}
    lines = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answered:
        for line in answered.iter_lines():
            if not lines:
                on_first()
            lines.append(line)
    return "\n".join(lines)


def ask_to_stop(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_running_requests_finish(
    capsys: pytest.CaptureFixture[str], number: int
) -> None:
    texts: list[str] = []
    asked: list[float] = []

    def stop() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), number)

    def do(url: str) -> None:
        with httpx.stream("GET", f"{url}/cluster/events") as events:  # never end by themselves
            texts.append(stream(url, 40, stop))
            list(events.iter_lines())

    beside = Beside(capsys, do)
    assert beside.serve() == 0
    assert time.monotonic() - asked[0] < 8  # less than --shutdown-timeout
    assert texts[0].rstrip().endswith("data: [DONE]")
    assert '"finish_reason":"length"' in texts[0]
    assert beside.head.stops == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopping" in beside.output
    assert beside.output.rstrip().endswith("stopped")


def test_a_supervisor_is_told_which_process_serves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert Beside(capsys, lambda url: ask_to_stop(signal.SIGTERM)()).serve() == 0
        assert supervisor.recv(100) == f"READY=1\nMAINPID={os.getpid()}".encode()
        assert supervisor.recv(100) == b"STOPPING=1"


def test_the_garbage_collector_does_not_hold_up_streams(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It does not walk what was imported, while the service runs."""
    imported = len(gc.get_objects())
    walked: list[int] = []

    def do(url: str) -> None:
        stream(url, 2, lambda: walked.append(len(gc.get_objects())))
        ask_to_stop(signal.SIGTERM)()

    Beside(capsys, do).serve()
    assert walked[0] < imported / 4
    assert len(gc.get_objects()) > imported / 2, "what was imported is collected again"


def test_requests_that_take_too_long_end_with_an_error(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []
    beside = Beside(capsys, lambda url: texts.append(stream(url, 120, ask_to_stop(signal.SIGTERM))))
    beside.config = Config(server=CONFIG.server, cluster=ClusterConfig(shutdown_timeout=0.2))
    assert beside.serve() == 0
    assert "the service is stopping" in texts[0]
    assert texts[0].rstrip().endswith("data: [DONE]")
    assert "Traceback" not in caplog.text


def test_a_second_signal_stops_at_once(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[float] = []

    def twice() -> None:
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    beside = Beside(capsys, lambda url: stream(url, 120, twice), gap_s=0.5)  # a minute
    assert beside.serve() == 128 + signal.SIGINT
    assert time.monotonic() - asked[0] < 3
    gc.collect()  # what was never retrieved is reported when it is collected
    assert "never retrieved" not in caplog.text


def test_a_service_that_fails_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    beside = Beside(capsys, lambda url: beside.head.on_failure(FlexpertError("rank 2 is gone")))
    assert beside.serve() == 1


def test_an_http_server_that_ends_by_itself_ends_the_service(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks: list[bool] = []

    async def broken(self: object, counter: int) -> bool:
        ticks.append(True)
        raise RuntimeError("no date today")

    monkeypatch.setattr("flexpert.server.service_process._Server.on_tick", broken)
    heads: list[FakeHead] = []

    def head(config: Config) -> FakeHead:
        heads.append(FakeHead(config))
        return heads[0]

    assert serve(CONFIG, head=head) == 1
    assert ticks
    assert "ended by itself" in capsys.readouterr().err
    assert "no date today" in caplog.text
    assert heads[0].stops == 1


def test_what_nobody_noticed_is_logged_and_the_service_goes_on(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    texts: list[str] = []

    class Broken(FakeHead):
        async def start(self, report: object = None) -> None:
            import asyncio

            def fail() -> None:
                raise RuntimeError("in a callback")

            asyncio.get_running_loop().call_soon(fail)
            self.opened.set()

    def do(url: str) -> None:
        texts.append(stream(url, 5, lambda: None))
        os.kill(os.getpid(), signal.SIGTERM)

    beside = Beside(capsys, do)
    beside.head_for = lambda config: Broken(config)
    assert beside.serve() == 0
    assert texts[0].rstrip().endswith("data: [DONE]")
    (record,) = [r for r in caplog.records if "event loop" in r.getMessage()]
    assert record.name == "flexpert.server"
    assert "in a callback" in caplog.text


def test_a_start_that_fails_ends_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(FakeHead):
        async def start(self, report: object = None) -> None:
            raise FlexpertError("the checkpoint is not there")

    assert serve(CONFIG, head=Broken) == 1
    assert "flexpert: the checkpoint is not there" in capsys.readouterr().err


def test_a_signal_during_the_start_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    heads: list[FakeHead] = []

    class Slow(FakeHead):
        async def start(self, report: object = None) -> None:
            import asyncio

            heads.append(self)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)

    assert serve(CONFIG, head=Slow) == 128 + signal.SIGTERM
    assert heads[0].stops == 1


def test_a_port_in_use_fails_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Config(server=ServerConfig(port=port))
        assert serve(config, head=lambda config: pytest.fail("started")) == 2
    assert f"port {port}" in (error := capsys.readouterr().err)
    assert "--port" in error


def test_a_host_that_is_not_ours_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        bind(ServerConfig(host="no.such.host.invalid"))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        bind(ServerConfig(host="192.0.2.1"))
