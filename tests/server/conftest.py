"""Servers of the session, one open and one with keys."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fake_head import Behaviour
from support.served_head import Running

from flexpert.config import ServerConfig


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


@pytest.fixture
def server(open_server: Running) -> Running:
    """Open, and as new."""

    def fresh() -> None:
        head = open_server.head
        head.behaviour = Behaviour()
        head.submitted.clear()
        head.cancelled.clear()
        head.ranks = [0, 1]
        head.serving = True
        head.full = False
        head.down = head.failure = None

    open_server.call(fresh)
    return open_server
