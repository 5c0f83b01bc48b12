"""Routes that monitors and browsers ask: /ping, /load, and what pages of other origins may read."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from support.served_head import Running

from flexpert.config import ServerConfig, load_config
from flexpert.errors import ConfigError

PAGE = "https://page.example"
ASKS = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture(scope="module")
def crossed() -> Iterator[Running]:
    running = Running(ServerConfig(api_key="key", allowed_origins=f"{PAGE}, https://b.example"))
    yield running
    running.close()


def test_ping_is_the_health(server: Running) -> None:
    for method in ("GET", "POST"):
        assert httpx.request(method, f"{server.url}/ping").status_code == 200
    server.head.down = "no rank is up"
    assert httpx.get(f"{server.url}/ping").status_code == 503


def test_load_counts_requests_that_are_being_answered(server: Running) -> None:
    def load() -> int:
        return int(httpx.get(f"{server.url}/load").json()["server_load"])

    assert load() == 0
    server.head.behaviour.gap_s = 5
    body = {"prompt": "x", "max_tokens": 2}
    gone = threading.Event()

    def ask() -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}):
            gone.wait(10)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    server.until(lambda: len(server.head.running) == 2)
    assert load() == 2
    gone.set()
    for thread in asking:
        thread.join()
    server.until(lambda: not server.head.running)


def test_pages_of_other_origins_cannot_read_answers_unless_they_are_named(
    server: Running, crossed: Running
) -> None:
    url = "/v1/completions"
    assert (
        "access-control-allow-origin" not in httpx.options(server.url + url, headers=ASKS).headers
    )
    asked = httpx.options(crossed.url + url, headers=ASKS)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    stranger = httpx.options(crossed.url + url, headers=ASKS | {"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers
    body = {"prompt": "x", "max_tokens": 2}
    refused = httpx.post(crossed.url + url, json=body, headers={"origin": PAGE})
    assert refused.status_code == 401  # and the page may read why
    assert refused.headers["access-control-allow-origin"] == PAGE
    known = {"origin": PAGE, "authorization": "Bearer key"}
    for stream in (False, True):
        answered = httpx.post(crossed.url + url, json=body | {"stream": stream}, headers=known)
        assert answered.status_code == 200
        assert answered.headers["access-control-allow-origin"] == PAGE


def test_origins_are_written_in_any_of_the_usual_ways() -> None:
    def origins(value: object) -> list[str]:
        overrides = {"server.allowed_origins": value}
        return load_config(environment={}, overrides=overrides).server.origins

    assert origins(None) == []
    assert origins("*") == ["*"]
    assert origins('["https://a.example", "http://b:80"]') == ["https://a.example", "http://b:80"]
    assert origins(["https://a.example"]) == ["https://a.example"]
    for wrong in ("a.example", "https://a.example/path", "[", "https://a https://b"):
        with pytest.raises(ConfigError, match="is no origin"):
            origins(wrong)
