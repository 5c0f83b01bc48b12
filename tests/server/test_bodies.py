"""Whatever a client sends: 2xx or 4xx, soon, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import string
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.served_head import Running

from flexpert.bench.hostile_bodies import HEAVY, PATHS, each_field

MAX_BODY = 16 * 2**20
JSON_TYPE = {"content-type": "application/json"}


def check(answered: httpx.Response, body: bytes) -> None:
    assert answered.status_code < 500, (answered.text[:200], body[:200])
    if answered.status_code >= 400:
        error = answered.json()["error"]
        assert error["message"]
        assert len(answered.content) < 4096, "a refusal does not repeat what was sent"


@pytest.mark.slow
def test_every_field_at_every_odd_value_is_answered_or_refused(server: Running) -> None:
    statuses = set()
    with httpx.Client(base_url=server.url, headers=JSON_TYPE, timeout=20) as client:
        for path, body in each_field():
            answered = client.post(path, content=body)
            check(answered, body)
            statuses.add(answered.status_code)
    assert statuses >= {200, 400, 404}
    server.until(lambda: not server.head.running)


SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.text(st.characters(categories=["Cs"]), max_size=3)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
NAMES = st.sampled_from(
    [
        *("prompt", "messages", "tokens", "n", "max_tokens", "stop", "stop_token_ids", "logprobs"),
        *("temperature", "top_p", "top_k", "stream", "echo", "model", "min_tokens", "seed"),
    ]
) | st.text(string.ascii_lowercase, max_size=5)


@pytest.mark.slow
@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=300)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(NAMES, VALUES, max_size=6).map(lambda value: json.dumps(value).encode()),
)
def test_any_body_is_answered_or_refused(server: Running, path: str, body: bytes) -> None:
    answered = httpx.post(f"{server.url}{path}", content=body, headers=JSON_TYPE, timeout=20)
    check(answered, body)


class Stream:
    """A stream of the fake head's, and its longest gap: how long the loop stood still."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.longest_gap_s = 0.0
        self.begun = asyncio.Event()

    async def run(self) -> None:
        body = {"prompt": "a", "max_tokens": 120, "stream": True}
        while True:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                last = time.perf_counter()
                async for _ in answer.aiter_raw():
                    now = time.perf_counter()
                    self.longest_gap_s = max(self.longest_gap_s, now - last)
                    last = now
                    self.begun.set()


@pytest.mark.slow
def test_heavy_bodies_are_answered_soon_and_streams_go_on_beside_them(server: Running) -> None:
    server.head.behaviour.gap_s = 0.005
    # made ahead: making them would hold up the server's thread, which is in this process
    bodies = {name: (path, make(MAX_BODY)[:MAX_BODY]) for name, (path, make) in HEAVY.items()}

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            streams = [Stream(client) for _ in range(4)]
            tasks = [asyncio.create_task(stream.run()) for stream in streams]
            for stream in streams:
                await stream.begun.wait()
            slowest = {}
            for name, (path, body) in bodies.items():
                began = time.perf_counter()
                answered = await client.post(path, content=body, headers=JSON_TYPE)
                slowest[name] = time.perf_counter() - began
                check(answered, body)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # generous: two cores, which other tests use as well, and a client in this process
            assert max(slowest.values()) < 5.0, slowest
            gaps = sorted(stream.longest_gap_s for stream in streams)
            print(f"longest gap {gaps[-1] * 1e3:.0f} ms; {slowest}")
            assert gaps[0] < 1.0, gaps

    asyncio.run(scenario())
    server.until(lambda: not server.head.running)
