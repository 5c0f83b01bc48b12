"""Promises to those who ask for what is not served, or not quite as it is.

`python tests/server/test_unserved.py` writes the table of paths into docs/clients.md.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
from support.served_head import Running

from flexpert.server.unserved import UNSERVED, unknown_path

PAGE = Path(__file__).parents[2] / "docs/clients.md"
BEGIN, END = "<!-- table of paths -->\n", "<!-- end -->\n"
MESSAGES = [{"role": "user", "content": "x"}]


def error(answered: httpx.Response) -> dict[str, str]:
    found: dict[str, str] = answered.json()["error"]
    return found


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/audio/transcriptions", "audio"),
        ("/v1/images/generations", "images"),
        ("/v1/moderations", "moderation"),
        ("/v1/rerank", "reranking"),
        ("/v2/rerank", "reranking"),
        ("/rerank", "reranking"),
        ("/v1/score", "scoring"),
        ("/v1/load_lora_adapter", "LoRA adapters; merge"),
        ("/v1/batches/b-1", "batch jobs"),
        ("/api/chat", "Ollama's API; use /v1/chat/completions"),
    ],
)
def test_what_is_not_served_is_refused_by_name(server: Running, path: str, what: str) -> None:
    for method in ("POST", "GET"):
        answered = httpx.request(method, server.url + path, json={"model": "fake", "input": "x"})
        assert answered.status_code == 404
        assert error(answered)["message"].startswith(f"flexpert does not serve {what}")
        assert error(answered)["code"] == "not_served"


def test_nothing_that_is_served_is_among_what_is_not(server: Running) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    bare = {path.removeprefix("/v1") for path in paths}
    assert bare.isdisjoint(UNSERVED)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/chat/completions", "/v1/chat/completions is served: the base URL"),
        ("/v1/v1/chat/completions", "/v1/chat/completions is served: the base URL"),
        ("/v1/completions/", "/v1/completions is served"),
        ("/v1/tokenize", "/tokenize is served, without /v1"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/cluster/operation", "did you mean /cluster/operations?"),
        ("/nothing-like-that", "GET /openapi.json describes"),
    ],
)
def test_a_path_that_is_almost_right_is_told_the_right_one(
    server: Running, path: str, says: str
) -> None:
    answered = httpx.post(server.url + path, json={"messages": MESSAGES})
    assert answered.status_code == 404
    assert says in error(answered)["message"]


def test_a_long_path_is_not_repeated() -> None:
    assert len(unknown_path("/x" * 10_000, ["/v1/models"]).detail) < 300


def test_a_wrong_method_is_told_in_words(server: Running) -> None:
    answered = httpx.get(f"{server.url}/v1/chat/completions")
    assert answered.status_code == 405
    assert error(answered)["message"] == "/v1/chat/completions is not asked with GET; use POST"


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/cluster/operations"])
def test_a_body_of_another_type_is_told_so(server: Running, path: str) -> None:
    """What `curl -d` sends unless it is told otherwise."""
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answered = httpx.post(server.url + path, content=b'{"prompt": "x"}', headers=headers)
    assert answered.status_code == 415
    assert "Content-Type 'application/x-www-form-urlencoded'" in error(answered)["message"]
    assert "curl: -H" in error(answered)["message"]


def test_a_body_without_a_type_is_json_or_told_so(server: Running) -> None:
    answered = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "x"}')
    assert answered.status_code == 200
    answered = httpx.post(f"{server.url}/cluster/operations", content=b'{"ranks": 2}')
    assert answered.status_code == 415
    assert "the request has no Content-Type" in error(answered)["message"]


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/json"}])
def test_an_empty_body_is_told_so(server: Running, headers: dict[str, str]) -> None:
    answered = httpx.post(f"{server.url}/v1/completions", headers=headers)
    assert (answered.status_code, error(answered)["message"]) == (
        400,
        "the body is empty; it must be a JSON object",
    )


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x" * 200},
        {"prompt": "x" * 10**6},
        {"prompt": [1] * 200},
        {"prompt": "x", "max_tokens": 127 + 1},
        {"prompt": "x", "max_tokens": 10**6},
    ],
)
def test_a_context_overflow_is_told_as_clients_know_it(
    server: Running, body: dict[str, object]
) -> None:
    """litellm goes by the first words, langchain by the code."""
    answered = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answered.status_code == 400
    told = error(answered)
    assert told["message"].startswith("This model's maximum context length is 128 tokens. However")
    assert (told["type"], told["code"]) == ("invalid_request_error", "context_length_exceeded")


def test_a_stream_is_refused_in_the_same_words(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="requested 203 tokens") as refused:
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "x" * 150}],
            max_tokens=50,
            stream=True,
        )
    assert refused.value.code == "context_length_exceeded"


def table() -> str:
    rows = [(f"`{path}`", *what.partition("; ")[::2]) for path, what in UNSERVED.items()]
    lines = [f"| {path} | {what} | {instead} |\n" for path, what, instead in rows]
    head = "| path | what it is | instead |\n|---|---|---|\n"
    return f"{BEGIN}{head}{''.join(lines).replace('  |', ' |')}{END}"


def test_the_page_has_every_path_that_is_refused_by_name() -> None:
    assert table() in PAGE.read_text(), "python tests/server/test_unserved.py writes it"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + table() + rest.partition(END)[2])
