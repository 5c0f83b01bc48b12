"""Promises around the routes: keys, sizes, unknown paths, health, metrics."""

from __future__ import annotations

import logging

import httpx
import openai
import pytest
from support.fake_head import FakeHead
from support.served_head import Running

import flexpert
from flexpert.config import ServerConfig
from flexpert.errors import FlexpertError
from flexpert.server.app import create_app

CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/no-such-path"),
        ("GET", "/cluster"),
        ("GET", "/cluster/balance"),
        ("GET", "/cluster/events"),
        ("POST", "/cluster/operations"),
        ("POST", "/scale_elastic_ep"),
    ],
)
def test_without_the_key_nothing_is_served(closed_server: Running, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic key"}):
        answered = httpx.request(method, closed_server.url + path, headers=headers)
        assert answered.status_code == 401
        assert answered.json()["error"]["code"] == "invalid_api_key"


def test_each_key_opens_its_own_paths(closed_server: Running) -> None:
    client = openai.OpenAI(base_url=f"{closed_server.url}/v1", api_key="key", max_retries=0)
    assert client.chat.completions.create(model="fake", max_tokens=1, **CHAT).choices
    url = f"{closed_server.url}/cluster"
    assert httpx.get(url, headers={"authorization": "Bearer key"}).status_code == 401
    assert httpx.get(url, headers={"authorization": "bearer control"}).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics"])
def test_monitors_need_no_key(closed_server: Running, path: str) -> None:
    assert httpx.get(closed_server.url + path).status_code == 200


def test_health_and_version(server: Running) -> None:
    for path in ("/health", "/health/ready", "/health/live"):
        health = {
            "status": "ok",
            "live": True,
            "ready": True,
            "reason": None,
            "state": "ready",
        }
        assert httpx.get(f"{server.url}{path}").json() == health
    version = httpx.get(f"{server.url}/version").json()
    assert version == {"version": flexpert.__version__}


def test_health_says_why_nothing_can_be_answered(closed_server: Running) -> None:
    """Without a key: those who watch have none."""
    head = closed_server.head

    def asked() -> list[tuple[int, dict[str, object]]]:
        found = (httpx.get(f"{closed_server.url}/health{path}") for path in ("", "/ready", "/live"))
        return [(answered.status_code, answered.json()) for answered in found]

    why = "all ranks are lost"
    try:
        head.down = why
        (status, body), ready, (alive, live) = asked()
        assert (status, body) == ready
        assert (status, alive) == (503, 200)
        assert body == {
            "status": "unavailable",
            "live": True,
            "ready": False,
            "reason": why,
            "state": "down",
        }
        assert live == {**body, "status": "ok"}
        head.failure = FlexpertError("rank 2 is gone; the service stops")
        assert [status for status, _ in asked()] == [503] * 3
        assert asked()[2][1]["reason"] == "rank 2 is gone; the service stops"
    finally:
        head.down = head.failure = None
    assert [status for status, _ in asked()] == [200] * 3


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/cluster/operations/x", "DELETE, GET"),
        ("/cluster/operations", "POST"),
        ("/v1/models/a/b", "GET"),
        ("/v1/completions", "POST"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_every_right_one(server: Running, path: str, methods: str) -> None:
    answered = httpx.request("PATCH", server.url + path)
    assert (answered.status_code, answered.headers["allow"]) == (405, methods)


def test_a_path_is_not_bent_to_one_that_exists(server: Running) -> None:
    """A redirection would send clients, and their bodies, where the Host header says."""
    answered = httpx.get(f"{server.url}/cluster/", headers={"host": "elsewhere"})
    assert answered.status_code == 404


@pytest.mark.parametrize("key", ["schlüssel", "ключ", "a b"])
def test_keys_may_be_any_text(key: str) -> None:
    running = Running(ServerConfig(api_key=key))
    try:
        for given, status in ((key.encode(), 200), (b"\xff\xfe", 401), (b"a", 401)):
            headers = [(b"authorization", b"Bearer " + given)]
            assert httpx.get(f"{running.url}/v1/models", headers=headers).status_code == status
    finally:
        running.close()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/no-such-path", 404), ("GET", "/v1/completions", 405)],
)
def test_unknown_paths_and_methods_have_openais_shape(
    server: Running, method: str, path: str, status: int
) -> None:
    answered = httpx.request(method, server.url + path)
    assert answered.status_code == status
    assert set(answered.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_no_json_is_400(server: Running) -> None:
    headers = {"content-type": "application/json"}
    for body in ('{"prompt":', "[1]", '"text"', ""):
        answered = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
        assert answered.status_code == 400, body
        assert "body" in answered.json()["error"]["message"]


def test_metrics_show_the_head_and_http(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 5}
    httpx.post(f"{server.url}/v1/completions", json=body)
    httpx.get(f"{server.url}/made/up/path")
    text = httpx.get(f"{server.url}/metrics").text
    assert "flexpert_tokens_total 0.0" in text
    assert 'flexpert_http_requests_total{method="POST",path="/v1/completions",status="200"}' in text
    assert 'path="unmatched",status="404"' in text
    assert "made/up" not in text
    assert "flexpert_time_to_first_token_seconds_bucket" in text
    assert "flexpert_inter_token_seconds_count" in text


async def _broken() -> None:
    raise RuntimeError("secret detail")


def test_an_unexpected_error_is_500_without_its_details(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import asyncio

    head = FakeHead()
    app = create_app(head)
    app.add_api_route("/broken", _broken)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/broken")

    with caplog.at_level(logging.ERROR):
        answered = asyncio.run(ask())
    assert answered.status_code == 500
    assert answered.json()["error"]["type"] == "server_error"
    assert "secret" not in answered.text
    assert "secret" in caplog.text
