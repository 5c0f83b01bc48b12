"""500 requests that real clients have sent: each is answered, and none of its fields is dropped.

Recorded by tools/record_requests.py from the clients in tests/clients, with their own settings.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served_head import Running

from flexpert.config import ServerConfig

RECORDED = Path(__file__).with_name("recorded_requests.jsonl.gz")
PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}


def recorded() -> list[dict[str, Any]]:
    with gzip.open(RECORDED, "rt") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def calling_server() -> Iterator[Running]:
    """Knows how calls are written."""
    running = Running(ServerConfig(tool_call_parser="hermes"))
    yield running
    running.close()


@pytest.mark.slow
def test_what_clients_have_sent_is_answered_and_nothing_of_it_dropped(
    calling_server: Running,
) -> None:
    """A prompt may be too long for the fake service, and a response be one of another; no other
    request is refused."""
    server = calling_server
    statuses: Counter[tuple[str, int]] = Counter()
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for one in recorded():
            body = {**one["body"], "model": "fake"}
            answered = client.post(one["path"], json=body)
            statuses[one["path"], answered.status_code] += 1
            if answered.status_code != 200:
                error = answered.json()["error"]
                missing = error.get("code") == "response_not_found"
                assert missing or "maximum context length" in error["message"], (one, error)
                continue
            assert "x-flexpert-ignored" not in answered.headers
            if body.get("stream"):
                assert answered.headers["content-type"].startswith("text/event-stream")
                assert answered.text.count("data: ") >= 2
            # not because anything goes: one that is misspelt is refused
            odd = client.post(one["path"], json={**body, "no_such_field": 1})
            assert odd.status_code == 400, one
            assert "no_such_field" in odd.text
    assert sum(statuses.values()) == 500
    served = sum(times for (_, status), times in statuses.items() if status == 200)
    assert served >= 480, statuses
    assert {path for path, status in statuses if status == 200} >= PATHS
