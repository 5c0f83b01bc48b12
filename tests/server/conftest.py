"""Servers of the session, one open and one with keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from httpx._config import DEFAULT_TIMEOUT_CONFIG
from support.served_head import Running

from flexpert.config import ServerConfig

# of every client that says nothing else: where others have the processors a worker that prepares
# bodies takes more than httpx's 5 seconds to start
DEFAULT_TIMEOUT_CONFIG.read = 60.0


@pytest.fixture(scope="session")
def open_server() -> Iterator[Running]:
    running = Running(ServerConfig())
    yield running
    running.close()


@pytest.fixture(scope="session")
def closed_server() -> Iterator[Running]:
    running = Running(ServerConfig(api_key="key", control_key="control"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def lenient_server() -> Iterator[Running]:
    running = Running(ServerConfig(lenient=True, trust_request_chat_template=True))
    running.head.sampling_defaults = {"temperature": 0.6, "top_k": 20}
    yield running
    running.close()


@pytest.fixture(scope="session")
def parsing_server() -> Iterator[Running]:
    running = Running(ServerConfig(tool_call_parser="hermes", reasoning_parser="qwen3"))
    running.head.info = replace(running.head.info, max_model_len=4096)
    yield running
    running.close()


@pytest.fixture
def tool_server(parsing_server: Running) -> Running:
    """Reads calls as Hermes writes them, and reasoning; as new."""
    return _as_new(parsing_server)


@pytest.fixture
def server(open_server: Running) -> Running:
    """Open, and as new."""
    return _as_new(open_server)


@pytest.fixture
def trusting_server(lenient_server: Running) -> Running:
    """Passes unknown fields over, takes templates, has sampling defaults; as new."""
    return _as_new(lenient_server)


def _as_new(running: Running) -> Running:
    running.call(running.head.as_new)
    return running
