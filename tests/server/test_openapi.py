"""The API's description is true: schemathesis invents requests from it and checks the answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fake_head import FakeHead
from support.raw import answers, connection, request
from support.served_head import Running

from flexpert.config import ServerConfig
from flexpert.server.app import create_app
from flexpert.server.gate import OPEN_PATHS
from flexpert.server.openapi import ANSWERS

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return create_app(FakeHead()).openapi()


@pytest.mark.slow
@pytest.mark.timeout(300)  # 40 s, but for a slow machine with others on it
def test_generated_requests_are_answered_as_described(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(ServerConfig())
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"),
                *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing"),
                *("--max-examples", "2", "--generation-deterministic", "--no-color"),
                *("--request-timeout", "10", "--continue-on-failure"),
                *("--exclude-path-regex", "/cluster/(events|stream)"),  # they never end
            ],
            cwd=tmp_path,  # it keeps notes
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert httpx.get(f"{running.url}/health").status_code == 200
    finally:
        running.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {len(ANSWERS) - 2}" in done.stdout
    assert "Traceback" not in caplog.text


def test_an_endless_stream_is_described(server: Running, description: dict[str, Any]) -> None:
    described = description["paths"]["/cluster/events"]["get"]["responses"]["200"]["content"]
    with httpx.stream("GET", f"{server.url}/cluster/events") as answered:
        assert [answered.headers["content-type"].partition(";")[0]] == list(described)


def test_every_route_is_described_and_no_other(description: dict[str, Any]) -> None:
    paths = description["paths"].items()
    assert {(method, path) for path, methods in paths for method in methods} == set(ANSWERS)
    for path, methods in paths:
        for operation in methods.values():
            statuses = set(operation["responses"])
            assert {"400", "408", "413", "431", "500", "503"} <= statuses
            assert "422" not in statuses
            assert (path in OPEN_PATHS) == ("401" not in statuses)
            assert (path in OPEN_PATHS) == ("security" not in operation)


def test_what_is_referred_to_is_there(description: dict[str, Any]) -> None:
    schemas = set(description["components"]["schemas"])
    assert "HTTPValidationError" not in schemas

    def references(node: Any) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(references, node)) if node else set()
        if isinstance(node, dict):
            found = set().union(*map(references, node.values())) if node else set()
            return found | ({node["$ref"]} if "$ref" in node else set())
        return set()

    assert references(description) == {f"#/components/schemas/{name}" for name in schemas}


def test_what_the_connection_refuses_is_as_described(server: Running) -> None:
    with connection(server.url) as raw:
        raw.sendall(request("GET", "/health", x="y" * 10**5))
        (answer,) = answers(raw.recv(10**5))
    assert answer.status == 431
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.error) == {"message", "type", "param", "code"}
