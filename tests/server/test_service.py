"""Promises around the routes: keys, sizes, unknown paths, health, metrics."""

from __future__ import annotations

import logging

import httpx
import openai
import pytest
from fake_head import FakeHead
from served_head import Running

import flexpert
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
        health = {"status": "ok", "live": True, "ready": True, "reason": None}
        assert httpx.get(f"{server.url}{path}").json() == health
    version = httpx.get(f"{server.url}/version").json()
    assert version == {"version": flexpert.__version__}


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


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit_is_413(server: Running, declared: bool) -> None:
    size = 17 * 2**20
    pieces = (b"x" * 2**20 for _ in range(17))
    headers = {"content-type": "application/json"}
    if declared:
        headers["content-length"] = str(size)
    try:
        answered = httpx.post(f"{server.url}/v1/completions", content=pieces, headers=headers)
    except httpx.WriteError:
        return  # the server answered and closed before it had read everything
    assert answered.status_code == 413
    assert answered.json()["error"]["code"] == "body_too_large"


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
