"""A fake head behind real uvicorn on a free port of loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import uvicorn
import uvloop

from flexpert.config import Config, ServerConfig
from flexpert.server.app import create_app
from flexpert.server.protocol import bounded_protocol
from flexpert.server.service_process import bind
from flexpert.server.tracing.service_tracing import ServiceTracing
from support.fake_head import FakeHead

T = TypeVar("T")


class Running:
    """A served fake head; `call` runs on its loop.

    Args:
        send_buffer: bytes that the kernel keeps of an answer; default: its own choice, megabytes.
        head: the kind of head.
        tracing: of this head; default: nothing is traced.
    """

    def __init__(
        self,
        server: ServerConfig,
        *,
        send_buffer: int | None = None,
        head: type[FakeHead] = FakeHead,
        tracing: Callable[[FakeHead], ServiceTracing] | None = None,
    ) -> None:
        self._send_buffer = send_buffer
        self._tracing = tracing
        self.head = head(Config(server=server))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        listener: socket.socket = bind(ServerConfig(port=0))
        if self._send_buffer:  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        self.url = "http://{}:{}".format(*listener.getsockname())
        tracing = self._tracing(self.head) if self._tracing else None
        self.app = create_app(self.head, tracing=tracing)
        config = uvicorn.Config(
            self.app,
            http=bounded_protocol(self.head.config.server, self.app.state.metrics.refused),
            lifespan="off",
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        self._ready.set()
        await serving
        self.app.state.preprocessors.close()
        listener.close()

    def call(self, work: Callable[[], T]) -> T:
        async def call() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(10)

    def until(self, condition: Callable[[], bool], limit_s: float = 30.0) -> None:
        """Wait for something in the server to become true."""

        async def wait() -> None:
            async with asyncio.timeout(limit_s):
                while not condition():
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(wait(), self._loop).result(limit_s + 1)

    @property
    def connections(self) -> set[object]:
        """Open ones."""
        return self._server.server_state.connections

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.app.state.closing.set)
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()
