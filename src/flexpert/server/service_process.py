"""`flexpert serve`: one process from settings to exit code."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import ceil
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
import uvloop

import flexpert
from flexpert import library_pages
from flexpert.cluster.autoscaler import Autoscaler, load_policy, parse_goals
from flexpert.cluster.processes.early_fork_server import EarlyForkServer
from flexpert.cluster.processes.fork_server_process import discard, kill_begun
from flexpert.cluster.state_directory import StateDirectory
from flexpert.config import Config, ServerConfig
from flexpert.errors import ConfigError, FlexpertError
from flexpert.logs import start_logging
from flexpert.server.console import LogHandler, complain, say
from flexpert.server.descriptors import raise_limit
from flexpert.server.keys import BearerKeys, read_keys
from flexpert.server.protocol import bounded_protocol
from flexpert.server.supervisor import tell_supervisor
from flexpert.server.tls import TlsFiles, tls_files
from flexpert.server.trace_settings import check_tracing
from flexpert.stop_signals import STOP_SIGNALS, StopRequest

if TYPE_CHECKING:
    from fastapi import FastAPI

    from flexpert.cluster.handover.running_head import RunningHead
    from flexpert.cluster.head import Head
    from flexpert.server.tracing.otlp_export import OtlpExport
    from flexpert.server.tracing.service_tracing import ServiceTracing

log = logging.getLogger("flexpert.server")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_WRONG_SETTINGS = 2

# Seconds. After a second Ctrl-C: for ranks to be terminated; they die with this process anyway.
FORCED_STOP_S = 5.0

_LAST_WORDS_S = 0.5  # then answers that were cut off have been told why
_LOOK_S = 0.05  # between two looks at connections that are to end by themselves

# Seconds that clients who do not read may hold up the end, after all answers are there.
UNREAD_S = 2


def serve(config: Config, *, head: Callable[[Config], Head] | None = None) -> int:
    """Serve until a signal, or until the service fails; returns the process' exit code.

    Ctrl-C or SIGTERM: running requests have `cluster.shutdown_timeout` to finish; a second
    one stops at once (see `StopRequest`). What happens is printed.

    Returns:
        0 stopped by a signal while serving, 1 the service failed, 2 wrong settings (a port in
        use), 128 + signal if it stopped before it served or at once.
    """
    server = config.server
    start_logging(server.log_level.upper(), LogHandler(), server.log_format)
    try:
        raise_limit(config.cluster.ranks)
        # Bound before any rank starts, so that a port in use fails in milliseconds. It listens
        # already: who connects during the start waits and is answered when the model is there.
        keys = read_keys(config.server)
        tls = tls_files(config.server)
        _autoscaler(config)  # for what is wrong with it
        check_tracing(config.server)
        running = _running_head(config) if config.cluster.takeover else None
        listener = _taken_listener(config, keys, running) or bind(config.server, keys)
    except ConfigError as error:
        complain(f"flexpert: {error}")
        return EXIT_WRONG_SETTINGS
    with listener:
        if head is not None:
            return _run(config, head, listener, keys, tls)
        if running is not None:
            from flexpert.cluster.head import Head  # the fork server is there

            return _run(config, partial(Head, running=running), listener, keys, tls)
        try:
            state = StateDirectory(config.cluster.state_dir) if config.cluster.state_dir else None
        except ConfigError as error:
            complain(f"flexpert: {error}")
            return EXIT_WRONG_SETTINGS
        if state is not None and state.ranks_wait:
            discard()  # the ranks have one
            from flexpert.cluster.head import Head  # the fork server is there

            return _run(config, partial(Head, state=state), listener, keys, tls)
        with _early_fork_server(config) as fork_server:
            from flexpert.cluster.head import Head  # torch and transformers, seconds

            made = partial(Head, fork_server=fork_server, state=state)
            return _run(config, made, listener, keys, tls)


@contextmanager
def _early_fork_server(config: Config) -> Iterator[EarlyForkServer]:
    """Started before anything heavy is imported; ended, if no head has taken it.

    Until the service listens for signals, they end this process at once, and the fork server too: a
    KeyboardInterrupt may be lost in the imports of others.
    """

    def end(number: int, frame: FrameType | None) -> None:
        fork_server.kill()
        kill_begun()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    with EarlyForkServer(config) as fork_server:
        defaults = (signal.default_int_handler, signal.SIG_DFL)
        changed = {n: was for n in STOP_SIGNALS if (was := signal.getsignal(n)) in defaults}
        for number in changed:
            signal.signal(number, end)
        try:
            yield fork_server
        finally:
            for number, was in changed.items():
                signal.signal(number, was)


def _run(
    config: Config,
    head: Callable[[Config], Head],
    listener: socket.socket,
    keys: BearerKeys,
    tls: TlsFiles | None,
) -> int:
    from flexpert.server.app import create_app  # fastapi: after the fork server was started

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            service = _Service(config, head(config), listener, keys, tls, create_app)
            return runner.run(service.run())
    finally:
        gc.unfreeze()


def _autoscaler(config: Config) -> Autoscaler | None:
    """Raises: ConfigError"""
    cluster = config.cluster
    if cluster.autoscale is None:
        if cluster.autoscale_policy or cluster.autoscale_dry_run:
            raise ConfigError("a policy or a dry run needs --autoscale GOALS, as max=4,ttft_p99=1s")
        return None
    goals = parse_goals(cluster.autoscale, cluster.max_ranks)
    if cluster.autoscale_policy:
        return Autoscaler(goals, load_policy(cluster.autoscale_policy))
    return Autoscaler(goals)


def _running_head(config: Config) -> RunningHead:
    """Which is to be taken over. Raises: ConfigError"""
    from flexpert.cluster.handover.running_head import RunningHead
    from flexpert.cluster.head_state import settings_of_ranks
    from flexpert.cluster.state_store import FORMAT

    assert config.cluster.state_dir is not None
    return RunningHead(config.cluster.state_dir, settings_of_ranks(config), FORMAT)


def _taken_listener(
    config: Config, keys: BearerKeys, running: RunningHead | None
) -> socket.socket | None:
    """The running head's, if it is where these settings say: who connects sees no difference.

    Raises: ConfigError
    """
    if running is None or running.listener is None:
        return None
    if not running.is_on(config.server.host, config.server.port):
        running.listener.close()
        return None
    _check_keys(config.server, keys, str(running.listener.getsockname()[0]))
    running.listener.setblocking(False)
    return running.listener


def bind(config: ServerConfig, keys: BearerKeys | None = None) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use, the host is not one of this machine's, or other machines
            could reach it and need no key.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"server.host {config.host!r}: {error.strerror}") from None
    except UnicodeError:  # a part of it is empty, or too long
        raise ConfigError(f"server.host {config.host!r} is no name of a machine") from None
    try:
        _check_keys(config, keys, str(address[0]))
    except ConfigError:
        listener.close()
        raise
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


def _check_keys(config: ServerConfig, keys: BearerKeys | None, address: str) -> None:
    """Raises: ConfigError: other machines could reach it, and need no key."""
    if not (config.insecure or (keys and keys.api) or _is_loopback(address)):
        raise ConfigError(
            f"server.host {config.host!r} can be reached from other machines, and no key is asked "
            "for: give one with --api-key-file or FLEXPERT_SERVER__API_KEY, or, if everybody "
            "there may use and scale this service, say so with --insecure"
        )


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `_Service` has them from the start of the ranks on."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Service:
    """One run: start, serve, drain, stop."""

    def __init__(
        self,
        config: Config,
        head: Head,
        listener: socket.socket,
        keys: BearerKeys,
        tls: TlsFiles | None,
        create_app: Callable[[Head, BearerKeys, ServiceTracing | None], FastAPI],
    ) -> None:
        self._create_app = create_app
        self._config = config
        self._keys = keys
        self._tls = tls
        self._head = head
        self._listener = listener
        self._stop_request = StopRequest()
        self._asked = asyncio.Event()  # to stop
        self._forced = asyncio.Event()  # to stop at once
        self._signal = 0
        self._failure: FlexpertError | None = None
        self._app: FastAPI | None = None
        self._preparing: asyncio.Future[None] | None = None  # of the preprocessing workers
        self._renewing: asyncio.Future[None] | None = None  # of the certificate
        self._scaling: asyncio.Future[None] | None = None
        self._export: OtlpExport | None = None
        self._server: _Server | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_on_loop_error)
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        host, port = self._listener.getsockname()[:2]
        scheme = "https" if self._tls else "http"
        self._url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        say(f"flexpert {flexpert.__version__} on {self._url}")
        try:
            if await self._started():
                await self._serve()
                return self._exit_code()
            return 128 + self._signal
        except FlexpertError as error:
            complain(f"flexpert: {error}")
            return EXIT_FAILED
        finally:
            await self._stop()
            for number in STOP_SIGNALS:  # the loop would leave Ctrl-C dead for what comes after
                loop.remove_signal_handler(number)
                signal.signal(number, before[number])

    def _on_signal(self, number: int) -> None:
        self._stop_request.on_signal(number, time.monotonic())
        if self._stop_request.at_once:
            self._forced.set()
        self._signal = number
        self._asked.set()

    def _on_failure(self, error: FlexpertError) -> None:
        self._failure = error
        self._asked.set()

    async def _started(self) -> bool:
        """The head serves; False: a signal came first."""
        if (collector := self._config.server.otlp_traces_endpoint) is not None:
            from flexpert.server.tracing.otlp_export import OtlpExport

            self._export = OtlpExport(collector)
        self._head.on_failure = self._on_failure
        self._head.succession.listener = self._listener
        start = asyncio.ensure_future(self._head.start(say))
        asked = asyncio.ensure_future(self._asked.wait())
        opened = asyncio.ensure_future(self._head.opened.wait())
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait((start, asked, opened), return_when=first)
        opened.cancel()
        if self._head.opened.is_set():  # while ranks come up
            self._app = self._create_app(self._head, self._keys, self._tracing())
            self._preparing = asyncio.ensure_future(self._prepare(self._app))
        await asyncio.wait((start, asked), return_when=first)
        asked.cancel()
        if start.done():
            start.result()
            return True
        self._close_preprocessors()  # before their workers end with the fork server
        start.cancel()
        await asyncio.wait((start,), timeout=FORCED_STOP_S)
        return False

    def _tracing(self) -> ServiceTracing | None:
        if self._export is None:
            return None
        from flexpert.server.tracing.service_tracing import ServiceTracing

        head = self._head
        return ServiceTracing(self._export.provider, head.model_name, lambda: head.epoch)

    async def _prepare(self, app: FastAPI) -> None:
        await self._head.can_fork.wait()
        await app.state.preprocessors.start()

    async def _serve(self) -> None:
        app, preparing = self._app, self._preparing
        assert app is not None
        assert preparing is not None
        level = self._config.server.log_level
        ranks = self._config.cluster
        from flexpert.server.forwarding import Forwarding  # numpy comes with it

        settings = uvicorn.Config(
            Forwarding(app, self._head.succession),
            http=bounded_protocol(self._config.server, app.state.metrics.refused),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="debug" if level == "debug" else "warning",
            access_log=level == "debug",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=ceil(ranks.shutdown_timeout) + UNREAD_S,
        )
        settings.load()
        if self._tls:
            settings.ssl = self._tls.context  # checked before the model was opened
            self._renewing = asyncio.ensure_future(self._tls.watch())
        self._server = server = _Server(settings)
        await preparing
        gc.freeze()  # to walk all that was imported would hold up every stream for 0.3 s
        library_pages.give_back()
        serving = asyncio.ensure_future(server.serve(sockets=[self._listener]))
        asked = asyncio.ensure_future(self._asked.wait())
        self._start_autoscaler(app)
        app.state.feed.start()
        say(
            f"{self._head.model_name} on {ranks.ranks} of at most {ranks.max_ranks} ranks\n"
            f"{'ready' if ranks.ranks else 'requests wait for hosts'}: {self._url}/v1"
        )
        # of a unit whose main process is a head that has handed over, this one is it now
        tell_supervisor("READY=1", f"MAINPID={os.getpid()}")
        handed = asyncio.ensure_future(self._head.succession.handed.wait())
        await asyncio.wait((serving, asked, handed), return_when=asyncio.FIRST_COMPLETED)
        handed.cancel()
        if self._scaling is not None:
            self._scaling.cancel()
        if handed.done() and not (serving.done() or asked.done()):
            app.state.closing.set()  # who listens to events comes again
            await self._finish_connections(server, asked)
            if not asked.done():
                server.should_exit = True
                await serving
                return
        asked.cancel()
        if serving.done() and self._failure is None:
            # nobody asked it to end: whatever it was, the service does not answer any more
            log.error("the HTTP server has ended by itself", exc_info=serving.exception())
            self._failure = FlexpertError("the HTTP server has ended by itself; the log says why")
        if not self._head.succession.handed.is_set():
            tell_supervisor("STOPPING=1")
        say("stopping: running requests may finish; Ctrl-C again stops at once")
        app.state.closing.set()
        server.should_exit = True
        # the head answers what is left when the time is over with an error; so HTTP ends by itself
        ending = asyncio.gather(
            self._head.stop(ranks.shutdown_timeout), serving, return_exceptions=True
        )
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait((ending, forced), return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        if ending.done():
            for error in ending.result():
                if isinstance(error, BaseException) and self._failure is None:
                    raise error
        else:
            ending.cancel()
            await asyncio.wait((ending,))
            _ = ending.cancelled() or ending.exception()  # cancelled on purpose, so not reported

    def _start_autoscaler(self, app: FastAPI) -> None:
        scaler = _autoscaler(self._config)
        if scaler is not None:
            dry_run = self._config.cluster.autoscale_dry_run
            from flexpert.server.autoscaling import AutoscaleTask

            task = AutoscaleTask(self._head, app.state.metrics, scaler, dry_run=dry_run)
            self._scaling = asyncio.ensure_future(task.run())

    async def _finish_connections(self, server: _Server, asked: asyncio.Future[Any]) -> None:
        """Another head has the service: nobody new is heard, until all that is here has ended, or
        `asked` is done."""
        for one in server.servers:
            one.close()
        self._listener.close()
        succession, open_ = self._head.succession, server.server_state.connections
        say(f"another head goes on; {len(open_)} connections are served here until they end")
        while (open_ or succession.waits) and not asked.done():
            await asyncio.wait((asked,), timeout=_LOOK_S)
        if not asked.done():
            say(f"the head of process {succession.successor} has the service, and nothing is left")

    async def _stop(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        self._close_preprocessors()
        try:
            async with asyncio.timeout(FORCED_STOP_S if self._forced.is_set() else None):
                await self._head.stop()
        except TimeoutError:
            complain("ranks did not stop in time; they end with this process")
        if self._server is not None and (open_ones := self._server.server_state.tasks):
            await asyncio.wait(open_ones, timeout=_LAST_WORDS_S)
        if self._export is not None and not self._forced.is_set():
            await asyncio.to_thread(self._export.close)
        say("stopped")

    def _close_preprocessors(self) -> None:
        if self._preparing is not None and self._app is not None:
            self._preparing.cancel()
            self._app.state.preprocessors.close()

    def _exit_code(self) -> int:
        if self._failure is not None:
            complain(f"flexpert: {self._failure}")
            return EXIT_FAILED
        return 128 + self._signal if self._forced.is_set() else EXIT_OK


def _on_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody else has noticed: a callback that raised, a task whose error nobody asked for."""
    log.error("in the event loop: %s", context["message"], exc_info=context.get("exception"))
