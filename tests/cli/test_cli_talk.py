"""`flexpert chat` and `flexpert complete` stream text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexpert.cli.main import app
from flexpert.errors import ConfigError


def stream(*events: Any) -> tuple[int, bytes]:
    parts = [f"data: {json.dumps(event)}\n\n" for event in events]
    return 200, "".join([*parts, "data: [DONE]\n\n"]).encode()


def test_complete_prints_the_text_and_passes_the_settings_on(service: Any) -> None:
    choices = [{"choices": [{"text": text}]} for text in ("In ", "the", "")]
    service.replies = {"POST /v1/completions": stream(*choices, {"choices": []})}
    result = CliRunner().invoke(
        app, ["complete", "x", "--max-tokens", "5", "--seed", "1", "--url", service.url]
    )
    assert (result.exit_code, result.output) == (0, "In the\n")
    body = {"prompt": "x", "max_tokens": 5, "seed": 1, "stream": True}
    assert service.requests[0][1] == body


def test_complete_reads_standard_input(service: Any) -> None:
    service.replies = {"POST /v1/completions": stream()}
    CliRunner().invoke(app, ["complete", "-", "--url", service.url], input="from a pipe")
    assert service.requests[0][1]["prompt"] == "from a pipe"


def test_complete_sends_a_schema_from_a_file(service: Any, tmp_path: Path) -> None:
    service.replies = {"POST /v1/completions": stream()}
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    url = ["--url", service.url]
    CliRunner().invoke(app, ["complete", "x", "--json-schema", str(schema), *url])
    assert service.requests[0][1]["structured_outputs"] == {"json": {"type": "object"}}


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_complete_says_what_is_wrong_with_a_schema(content: str | None, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    if content is not None:
        schema.write_text(content)
    result = CliRunner().invoke(app, ["complete", "x", "--json-schema", str(schema)])
    assert isinstance(result.exception, ConfigError)
    assert str(schema) in str(result.exception)


def test_chat_answers_one_message(service: Any) -> None:
    deltas = [{"role": "assistant"}, {"content": "He"}, {"content": "llo"}, {}]
    service.replies = {
        "POST /v1/chat/completions": stream(*({"choices": [{"delta": d}]} for d in deltas))
    }
    result = CliRunner().invoke(app, ["chat", "hi", "--system", "be kind", "--url", service.url])
    assert (result.exit_code, result.output) == (0, "Hello\n")
    assert service.requests[0][1]["messages"] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
    ]


def test_a_conversation_remembers(service: Any) -> None:
    from io import StringIO

    from flexpert.cli.client import Client
    from flexpert.cli.talk import run_chat

    service.replies = {
        "POST /v1/chat/completions": stream({"choices": [{"delta": {"content": "yes"}}]})
    }
    lines = iter(["one", "", "two"])

    def ask(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    out = StringIO()
    with Client(service.url, None) as client:
        run_chat(client, None, None, {}, ask=ask, out=out)
    assert out.getvalue() == "yes\nyes\n\n"
    contents = [message["content"] for message in service.requests[1][1]["messages"]]
    assert contents == ["one", "yes", "two"]


def test_an_error_in_the_middle_of_an_answer_is_an_error(service: Any) -> None:
    service.replies = {"POST /v1/completions": stream({"error": {"message": "it stopped"}})}
    result = CliRunner().invoke(app, ["complete", "x", "--url", service.url])
    assert "it stopped" in str(result.exception)
