"""`flexpert scale`: what is asked for, what is shown, and the exit status of each outcome."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from support.fake_service import CLUSTER, DONE, OPERATION
from typer.testing import CliRunner

from flexpert.cli.client import Client, ClientError
from flexpert.cli.main import app
from flexpert.cli.scale import operation_body, run_scale, spread_ids
from flexpert.cli.status import run_status
from flexpert.errors import ConfigError

BEGIN = "POST /cluster/operations"
FOLLOW = "GET /cluster/operations/op-1"


def scale(service: Any, *, terminal: bool = False, **options: Any) -> tuple[int, str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Client(service.url, None) as client:
        status = run_scale(client, {"ranks": 4}, console=console, sleep=lambda _: None, **options)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["4"], ["4"]),
        (["--remove", "1", "3"], ["--remove", "1", "--remove", "3"]),
        (["--remove", "1,3", "--add", "1"], ["--remove", "1", "--remove", "3", "--add", "1"]),
        (["--remove", "1", "--remove", "3"], ["--remove", "1", "--remove", "3"]),
        (["--remove", "1", "--url", "http://x", "2"], ["--remove", "1", "--url", "http://x", "2"]),
    ],
)
def test_remove_takes_one_or_several_ids(given: list[str], meant: list[str]) -> None:
    assert spread_ids(given) == meant


def test_a_target_is_a_number_or_a_change() -> None:
    assert operation_body(4, 0, []) == {"ranks": 4}
    assert operation_body(None, 1, [3]) == {"add": 1, "remove": [3]}
    for wrong in [(None, 0, []), (4, 1, []), (4, 0, [1])]:
        with pytest.raises(ConfigError):
            operation_body(*wrong)


@pytest.mark.parametrize("arguments", [["--remove", "1", "3"], ["--remove", "1", "--remove", "3"]])
def test_the_command_asks_for_what_was_written(service: Any, arguments: list[str]) -> None:
    service.replies = {BEGIN: (202, DONE)}
    result = CliRunner().invoke(app, ["scale", "--add", "1", *arguments, "--url", service.url])
    assert result.exit_code == 0
    assert service.requests[0][1] == {"add": 1, "remove": [1, 3]}


def test_phases_are_printed_as_they_pass(service: Any) -> None:
    loading = OPERATION | {"phase": "load", "phases": {"spawn": 0.25, "load": 0.1}}
    service.replies = {BEGIN: (202, OPERATION), FOLLOW: [(200, loading), (200, DONE)]}
    status, out = scale(service)
    assert status == 0
    assert out.splitlines() == [
        "op-1: add 2 3 → ranks 0 1 2 3",
        "  spawn        0.250 s",
        "  load         0.500 s",
        "  commit       0.010 s",
        "done in 0.76 s: epoch 2, 32 experts and 3 requests moved (2 with their KV, "
        "3.0 MiB; up to 40 tokens computed again for want of room), pause 4.2 ms",
    ]


def test_a_terminal_shows_the_phases_in_place(service: Any) -> None:
    service.replies = {BEGIN: (202, OPERATION), FOLLOW: (200, DONE)}
    status, out = scale(service, terminal=True)
    assert status == 0
    assert "commit" in out
    assert "\x1b[" in out


@pytest.mark.parametrize(
    ("state", "status", "says"),
    [("failed", 1, "failed: rank 3 exited (SIGKILL)"), ("cancelled", 3, "cancelled")],
)
def test_the_exit_status_is_the_outcome(service: Any, state: str, status: int, says: str) -> None:
    over = DONE | {"state": state, "error": "rank 3 exited (SIGKILL)"}
    service.replies = {BEGIN: (202, OPERATION), FOLLOW: (200, over)}
    found, out = scale(service)
    assert found == status
    assert says in out


def test_json_is_the_operation_at_its_end_and_nothing_else(service: Any) -> None:
    service.replies = {BEGIN: (202, OPERATION), FOLLOW: (200, DONE)}
    status, out = scale(service, as_json=True)
    assert status == 0
    assert json.loads(out).items() >= DONE.items()


def test_without_waiting_the_operation_is_named(service: Any) -> None:
    service.replies = {BEGIN: (202, OPERATION)}
    status, out = scale(service, wait=False)
    assert status == 0
    assert out.startswith("op-1: add 2 3 → ranks 0 1 2 3: preparing\n")
    assert "flexpert status --watch" in out


def test_ctrl_c_leaves_the_operation_running_and_says_so(
    service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    service.replies = {BEGIN: (202, OPERATION)}

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    console = Console(file=io.StringIO())
    with Client(service.url, None) as client:
        status = run_scale(client, {"ranks": 4}, console=console, sleep=interrupt)
    assert status == 130
    err = capsys.readouterr().err
    assert "operation op-1 goes on" in err
    assert "flexpert scale --cancel op-1" in err
    assert [what for what, _, _ in service.requests] == [BEGIN]


def test_cancel(service: Any) -> None:
    service.replies = {"DELETE /cluster/operations/op-1": (200, OPERATION | {"state": "cancelled"})}
    result = CliRunner().invoke(app, ["scale", "--cancel", "op-1", "--url", service.url])
    assert result.exit_code == 0
    assert "cancelled" in result.output


def test_a_refusal_is_told_in_the_services_words(service: Any) -> None:
    service.replies = {BEGIN: (409, {"error": {"message": "operation op-7 is running"}})}
    with pytest.raises(ClientError, match="op-7 is running") as error:
        scale(service)
    assert error.value.status == 409


def test_status_shows_ranks_placement_and_the_running_change(service: Any) -> None:
    service.replies = {"GET /cluster": (200, CLUSTER | {"operation": OPERATION})}
    result = CliRunner().invoke(app, ["status", "--url", service.url], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    for word in ("epoch 7", "active", "leaving", "50%", "64 replicas", "op-1", "spawn"):
        assert word in result.output


def test_status_as_json_is_what_the_service_says(service: Any) -> None:
    service.replies = {"GET /cluster": (200, CLUSTER)}
    result = CliRunner().invoke(app, ["status", "--json", "--url", service.url])
    found = json.loads(result.output)
    assert found["epoch"] == 7
    assert [rank["id"] for rank in found["ranks"]] == [0, 2]


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_ends_with_ctrl_c(service: Any, terminal: bool) -> None:
    service.replies = {"GET /cluster": (200, CLUSTER)}
    waits = iter([None, None])

    def sleep(_: float) -> None:
        try:
            next(waits)
        except StopIteration:
            raise KeyboardInterrupt from None

    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with Client(service.url, None) as client:
        run_status(client, console=console, watch=True, sleep=sleep)
    assert len(service.requests) == 3
