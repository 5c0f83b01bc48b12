"""Reports into files and what is printed: a disk that is full, a reader that has gone, a path that
cannot be; each is one line and an exit status, before the long work where that can be known."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_service import CLUSTER, FakeService

from flexpert.cli.bench_comm import bench_comm
from flexpert.cli.bench_gpu import bench_decode, bench_layer
from flexpert.cli.bench_serve import bench_serve
from flexpert.cli.plan import plan
from flexpert.cli.trial_commands import chaos
from flexpert.display import output
from flexpert.display.output import check_outputs, printing, write_output, write_report
from flexpert.errors import ConfigError, FlexpertError

FULL = Path("/dev/full")


# ---- files --------------------------------------------------------------------------------------


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    old, new, pipe = tmp_path / "old", tmp_path / "new", tmp_path / "pipe"
    old.write_text("before")
    os.mkfifo(pipe)
    check_outputs(old, new, None, pipe, Path("/dev/null"), FULL)
    assert old.read_text() == "before"
    assert not new.exists()
    write_report({"a": 1}, as_json=False, output=new)
    assert new.read_text() == '{\n  "a": 1\n}'


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, says in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "file", "there is no folder"),
        (tmp_path / "file" / "file", "there is no folder"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/nothing"), "No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=f"cannot write .*: .*({says})"):
            check_outputs(path)


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(output.os, "write", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        check_outputs(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_costs_the_report_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(FlexpertError, match="cannot write /dev/full: No space left on device"):
        write_output(FULL, b"x")
    assert FULL.exists()


def test_no_half_of_a_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(FlexpertError, match="No space left"):
        write_output(tmp_path / "report.json", b"long text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (plan, {"random": 1}),
        (bench_comm, {}),
        (bench_layer, {}),
        (bench_decode, {}),
        (bench_serve, {}),
        (chaos, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    command: Callable[..., None], arguments: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        command(**arguments, output=tmp_path)


@pytest.mark.parametrize("command", [bench_comm, chaos], ids=["bench comm", "chaos"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_work(
    command: Callable[..., None], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "plot.png").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        command(plot=tmp_path / "plot.png")


# ---- what is printed ----------------------------------------------------------------------------

VERSION, HELP, STATUS = ["version"], ["plan", "--help"], ["status", "--url", "{url}"]
COMMANDS = [VERSION, HELP, STATUS, [*STATUS, "--json"], ["complete", "x", "--url", "{url}"]]
IDS = [" ".join(command) for command in COMMANDS]


@pytest.fixture(autouse=True)
def answers(service: FakeService) -> None:
    said = b'data: {"choices": [{"text": "word "}]}\n\n' * 100 + b"data: [DONE]\n\n"
    service.replies = {"GET /cluster": (200, CLUSTER), "POST /v1/completions": (200, said)}


def run(
    command: list[str], service: FakeService, *, stdout: Any = None, stderr: Any = None, **more: Any
) -> subprocess.CompletedProcess[str]:
    arguments = [argument.format(url=service.url) for argument in command]
    return subprocess.run(
        [sys.executable, "-m", "flexpert", *arguments],
        stdout=subprocess.PIPE if stdout is None else stdout,
        stderr=subprocess.PIPE if stderr is None else stderr,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
        **more,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_a_full_disk_is_one_line(command: list[str], unbuffered: str, service: FakeService) -> None:
    with FULL.open("w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = run(command, service, stdout=full, env=environment)
    assert done.returncode == 1
    assert done.stderr == "flexpert: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("command", COMMANDS, ids=IDS)
def test_a_reader_that_has_gone_is_no_error_to_talk_about(
    command: list[str], service: FakeService
) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = run(command, service, stdout=theirs)
    finally:
        os.close(theirs)
    assert done.returncode == 1
    assert done.stderr == ""


@pytest.mark.parametrize("command", [VERSION, STATUS], ids=["version", "status"])
def test_without_stdout_and_stderr_commands_still_run(
    command: list[str], service: FakeService
) -> None:
    arguments = [argument.format(url=service.url) for argument in command]
    line = ["sh", "-c", '"$@" >&- 2>&- <&-', "sh", sys.executable, "-m", "flexpert", *arguments]
    assert subprocess.run(line, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("command", "status"),
    [(VERSION, 0), (STATUS, 0), (["status", "--url", "http://127.0.0.1:1"], 1), (["plan"], 2)],
    ids=["version", "status", "nobody serves", "no plan"],
)
def test_where_errors_cannot_be_told_the_exit_status_stays(
    command: list[str], status: int, service: FakeService
) -> None:
    with FULL.open("w") as full:
        assert run(command, service, stderr=full).returncode == status


def test_other_errors_are_not_taken_for_those_of_the_output() -> None:
    with pytest.raises(OSError, match="Connection refused"), printing():
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    with pytest.raises(FileNotFoundError), printing():
        Path("/nowhere").read_text()


def test_output_that_fails_below_a_task_group_is_seen() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(SystemExit) as exit_, printing():
        raise ExceptionGroup("tasks", [ValueError(), full])
    assert exit_.value.code == 1


def test_what_the_terminal_has_no_letters_for_is_printed_all_the_same(
    service: FakeService,
) -> None:
    done = run(HELP, service, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Usage" in done.stdout
