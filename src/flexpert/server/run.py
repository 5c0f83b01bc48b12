"""`flexpert serve`: one process from settings to exit code."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from typing import TYPE_CHECKING

import uvicorn
import uvloop

import flexpert
from flexpert.config import Config, ServerConfig
from flexpert.errors import ConfigError, FlexpertError
from flexpert.server.app import create_app

if TYPE_CHECKING:
    from flexpert.cluster.head import Head

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_WRONG_SETTINGS = 2

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Seconds. After a second Ctrl-C: for ranks to be ended; they die with this process anyway.
FORCED_STOP_S = 5.0

# Seconds that clients who do not read may hold up the end, after all answers are there.
UNREAD_S = 2


def serve(config: Config, *, head: Callable[[Config], Head] | None = None) -> int:
    """Serve until a signal, or until the service fails; returns the process' exit code.

    Ctrl-C or SIGTERM: running requests have `cluster.shutdown_timeout_s` to finish; a second
    one stops at once. What happens is printed.

    Returns:
        0 stopped by a signal while serving, 1 the service failed, 2 wrong settings (a port in
        use), 128 + signal if it stopped before it served or at once.
    """
    logging.basicConfig(
        level=config.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        # Bound before any rank starts, so that a port in use fails in milliseconds. It listens
        # already: who connects during the start waits and is answered when the model is there.
        listener = bind(config.server)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG_SETTINGS
    if head is None:
        from flexpert.cluster.head import Head  # torch and transformers, seconds

        head = Head
    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Service(config, head(config), listener).run())


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use, or the host is not one of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host {config.host!r}: {error.strerror}") from None
    try:
        # ports of connections that ended a minute ago may be taken again
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; "
            "choose another with --port (0: any free one), or stop what listens there"
        ) from None
    listener.setblocking(False)
    return listener


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `_Service` has them from the start of the ranks on."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Service:
    """One run: start, serve, drain, stop."""

    def __init__(self, config: Config, head: Head, listener: socket.socket) -> None:
        self._config = config
        self._head = head
        self._listener = listener
        self._asked = asyncio.Event()  # to stop
        self._forced = asyncio.Event()  # to stop at once
        self._signal = 0
        self._failure: FlexpertError | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        host, port = self._listener.getsockname()[:2]
        self._url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"flexpert {flexpert.__version__} on {self._url}", flush=True)
        try:
            if await self._started():
                await self._serve()
                return self._exit_code()
            return 128 + self._signal
        except FlexpertError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return EXIT_FAILED
        finally:
            await self._stop()
            for number in SIGNALS:  # the loop would leave Ctrl-C dead for what comes after
                loop.remove_signal_handler(number)

    def _on_signal(self, number: int) -> None:
        if self._asked.is_set():
            self._forced.set()
        self._signal = number
        self._asked.set()

    def _on_failure(self, error: FlexpertError) -> None:
        self._failure = error
        self._asked.set()

    async def _started(self) -> bool:
        """The head serves; False: a signal came first."""
        self._head.on_failure = self._on_failure
        start = asyncio.ensure_future(self._head.start(lambda line: print(line, flush=True)))
        asked = asyncio.ensure_future(self._asked.wait())
        await asyncio.wait((start, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if start.done():
            start.result()
            return True
        start.cancel()
        await asyncio.wait((start,), timeout=FORCED_STOP_S)
        return False

    async def _serve(self) -> None:
        app = create_app(self._head)
        level = self._config.server.log_level
        ranks = self._config.cluster
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="debug" if level == "debug" else "warning",
                access_log=level == "debug",
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=ceil(ranks.shutdown_timeout_s) + UNREAD_S,
            )
        )
        await app.state.preprocessors.start()
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        asked = asyncio.ensure_future(self._asked.wait())
        print(
            f"{self._head.model_name} on {ranks.ranks} of at most {ranks.max_ranks} ranks\n"
            f"ready: {self._url}/v1",
            flush=True,
        )
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        print("stopping: running requests may finish; Ctrl-C again stops at once", flush=True)
        app.state.closing.set()
        server.should_exit = True
        # the head answers what is left when the time is over with an error; so HTTP ends by itself
        ending = asyncio.gather(self._head.stop(ranks.shutdown_timeout_s), serving)
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait((ending, forced), return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        app.state.preprocessors.close()
        if ending.done():
            ending.result()
        else:
            ending.cancel()
            await asyncio.wait((ending,))

    async def _stop(self) -> None:
        try:
            async with asyncio.timeout(FORCED_STOP_S if self._forced.is_set() else None):
                await self._head.stop()
        except TimeoutError:
            print("ranks did not stop in time; they end with this process", file=sys.stderr)
        print("stopped", flush=True)

    def _exit_code(self) -> int:
        if self._failure is not None:
            print(f"error: {self._failure}", file=sys.stderr, flush=True)
            return EXIT_FAILED
        return 128 + self._signal if self._forced.is_set() else EXIT_OK
