"""Help, wrong usage, errors: one clear line and the right exit status; and a fast start."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from flexpert import __version__
from flexpert.cli.main import app, main
from flexpert.cli.settings import flags

COMMANDS = [
    "serve",
    "check",
    "scale",
    "status",
    "chat",
    "complete",
    "demo",
    "bench serve",
    "bench hostile",
    "bench load",
    "version",
]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command as a process would see it: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flexpert", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return int(exit_.value.code or 0), out.out, out.err

    return call


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert "Examples" in result.output
    assert f"flexpert {command}" in result.output


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(command.split()[0] in result.output for command in COMMANDS)


def test_version(run: Run) -> None:
    status, out, _ = run("version")
    assert status == 0
    assert f"flexpert {__version__}" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scale"], "say either how many ranks"),
        (["scale", "4", "--add", "1"], "say either how many ranks"),
        (["scale", "--cancel", "op-1", "4"], "--cancel stands alone"),
        (["serve", "--ranks", "many"], "--ranks many: Input should be a valid integer"),
        (["serve", "--ranks", "9"], "ranks (9) exceeds max_ranks (8)"),
        (["serve", "--kv-memory", "lots"], "--kv-memory lots: 'lots' is no size"),
        (["serve", "--dtype", "int3"], "--dtype int3: Input should be"),
        (["serve", "--config", "/nowhere.yaml"], "cannot read the settings file"),
        (["complete", ""], "the prompt is empty"),
        (["bench", "serve", "--compare", "vllm"], "only 'transformers' and 'llama.cpp' are"),
        (["bench", "serve", "--compare", "llama.cpp"], "needs --llama-server PATH"),
        (["bench", "serve", "--pairs", "3"], "--pairs is of --compare llama.cpp"),
        (["bench", "serve", "--concurrency", "1", "--concurrency", "4"], "several --concurrency"),
        (["bench", "serve", "--compare", "transformers", "--url", "x"], "a service of our own"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize(
    "arguments", [["scale", "0"], ["scale", "x"], ["scale", "--remov", "1"], ["nothing"]]
)
def test_what_the_parser_refuses_is_status_2(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments)
    assert status == 2
    assert err


@pytest.mark.parametrize(
    "arguments", [["status"], ["scale", "2"], ["chat", "hi"], ["complete", "x"]]
)
def test_without_a_service_the_message_says_what_to_do(run: Run, arguments: list[str]) -> None:
    status, _, err = run(*arguments, "--url", "http://127.0.0.1:9")
    assert status == 1
    assert err.startswith("flexpert: no service at http://127.0.0.1:9; start one with 'flexpert s")
    assert "--url" in err


def test_an_address_that_is_none_is_told(run: Run) -> None:
    status, _, err = run("status", "--url", "ftp://x")
    assert status == 1
    assert "is no address" in err


def test_the_key_is_sent_and_its_lack_explained(run: Run, service: Any) -> None:
    service.replies["GET /cluster"] = (401, {"error": {"message": "missing or wrong API key"}})
    status, _, err = run("status", "--url", service.url, "--api-key", "secret")
    assert status == 1
    assert "missing or wrong API key; give it with --api-key" in err
    assert service.requests[0][2] == "Bearer secret"


def test_an_answer_that_is_not_ours_is_no_traceback(run: Run, service: Any) -> None:
    for reply in [(200, b"<html>"), (200, {"epoch": "x"}), (502, b"bad gateway")]:
        service.replies["GET /cluster"] = reply
        status, _, err = run("status", "--url", service.url)
        assert status == 1
        assert err.startswith("flexpert: ")


def test_a_head_and_an_agent_load_neither_torch_nor_transformers() -> None:
    """Ranks and whom they are forks of have them; `test_service_start.py` looks at a real head."""
    modules = (
        *("cluster.head", "cluster.hosts.agent", "cluster.handover.running_head", "llm"),
        *("server.service_process", "server.app", "server.forwarding", "server.autoscaling"),
    )
    program = "; ".join(f"import flexpert.{name}" for name in modules)
    heavy = "{'torch', 'transformers', 'tokenizers', 'triton', 'huggingface_hub'}"
    check = f"import sys; {program}; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_client_commands_load_neither_torch_nor_a_web_framework() -> None:
    program = (
        "import sys; from flexpert.cli.main import app; "
        "app(['status', '--url', 'http://127.0.0.1:9'], standalone_mode=False)"
    )
    check = (
        f"import sys\ntry:\n    exec({program!r})\nexcept Exception: pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--random", "1", "--timeout", "inf"], "--timeout: 'inf' is no duration"),
        (["plan", "--random", "1", "--timeout", "1e300"], "--timeout: '1e300' is no duration"),
        (["plan", "--random", "1", "--tokens", str(2**70)], "--tokens: the number is too large"),
        (["bench", "comm", "--duration", "inf"], "--duration: 'inf' is no duration"),
        (["bench", "comm", "--seed", str(2**70)], "--seed: the number is too large"),
        (["bench", "comm", "--tokens", str(2**70)], "--tokens 1180591620717411303424: positive"),
        (["bench", "layer", "--repeat", str(2**70)], "--repeat: the number is too large"),
        (["bench", "decode", "--context", str(2**70)], "--context: the number is too large"),
        (["bench", "serve", "--request-rate", "inf"], "--request-rate inf is not a finite number"),
        (["demo", "--duration", "inf"], "--duration: 'inf' is no duration"),
        (["complete", "x", "--temperature", "inf"], "--temperature inf is not a finite number"),
        (["chat", "x", "--top-p", "nan"], "--top-p nan is not a finite number"),
        (["scale", "--remove", "1", str(2**70)], "--remove: the number is too large"),
        (["demo", "--duration", "500ms"], "--duration 500ms is not between 1s and "),
        (["serve", "--stall-timeout", "2 parsecs"], "--stall-timeout 2 parsecs: "),
        (["serve", "--stall-timeout", "nan"], "--stall-timeout nan: "),
        (["serve", "--stall-timeout", "\\g<0>"], "--stall-timeout \\g<0>: "),
    ],
)
def test_numbers_that_cannot_be_are_refused(run: Run, arguments: list[str], says: str) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("command", ["serve", "bench comm", "bench decode", "chaos", "plan"])
def test_help_is_whole_on_80_columns(
    run: Run, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(*command.split(), "--help")
    options, _, examples = out.partition("Examples:")
    assert status == 0
    assert examples
    assert max(map(len, options.splitlines())) <= 80
    assert not re.search(r"--[a-z-]*…", options)
    if command == "serve":
        assert {flag.name for flag in flags()} <= set(re.findall(r"--[a-z0-9-]+", options))


def test_the_version_is_a_flag_too(run: Run) -> None:
    assert run("--version") == (0, f"flexpert {__version__}\n", "")
