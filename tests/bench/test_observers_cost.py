"""`flexpert bench observers`: those who watch do, from the first answer to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from support.served import free_port
from support.served_head import Running

from flexpert.bench.load import Target
from flexpert.bench.observer_process import SCRAPE_S
from flexpert.bench.observers_cost import OBSERVERS
from flexpert.config import ServerConfig
from flexpert.errors import FlexpertError


@pytest.fixture(scope="module")
def watched() -> Iterator[Running]:
    running = Running(ServerConfig())
    yield running
    running.close()


def answered(running: Running, path: str) -> float:
    labels = {"method": "GET", "path": path, "status": "200"}
    found = running.app.state.metrics.registry.get_sample_value
    return found("flexpert_http_requests_total", labels) or 0.0


@pytest.mark.parametrize("name", ["page", "top"])
def test_it_reads_the_stream_while_the_load_runs_and_no_longer(watched: Running, name: str) -> None:
    feed = watched.app.state.feed

    async def scenario() -> None:
        async with OBSERVERS[name](Target.parse(watched.url)):
            assert feed.watchers == 1

    asyncio.run(scenario())
    watched.until(lambda: feed.watchers == 0)


def test_metrics_are_read_each_second(watched: Running) -> None:
    before = answered(watched, "/metrics")

    async def scenario() -> None:
        async with OBSERVERS["metrics"](Target.parse(watched.url)):
            await asyncio.sleep(1.5 * SCRAPE_S)

    asyncio.run(scenario())
    assert answered(watched, "/metrics") - before == 2


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_without_observers_nothing_is_compared(name: str) -> None:
    async def scenario() -> None:
        async with OBSERVERS[name](Target.parse(f"http://127.0.0.1:{free_port()}")):
            pass

    with pytest.raises(FlexpertError, match="did not begin"):
        asyncio.run(scenario())
