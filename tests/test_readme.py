"""The README does what it says: its commands run, and those of the docs are real ones."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.served import free_port
from typer.main import get_command

from flexpert.cli.main import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
PAGES.remove(ROOT / "CHANGELOG.md")  # tells of what there was
FIVE_MINUTES = ROOT / "docs" / "five-minutes.md"
TROUBLE = ROOT / "docs" / "trouble.md"
LIMIT_S = 110

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in _BLOCK.findall(page.read_text()) if kind == language]


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What it printed; ends all that it started. Raises: AssertionError: it failed"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PATH": path, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_shell_blocks_run_as_they_stand(tmp_path: Path) -> None:
    found = blocks(README, "sh")
    assert found
    script = "set -euo pipefail\n" + "\n".join(found).replace("8123", str(free_port()))
    said = run(["bash", "-c", script], tmp_path)
    assert said.count("He maketh me to lie down in green pastures") == 2, "also after the kill"
    assert "add 2 3 → ranks 0 1 2 3" in said
    assert "remove 1 3 → ranks 0 2" in said


@pytest.mark.slow
def test_the_five_minutes_run_as_they_stand(tmp_path: Path) -> None:
    script = "set -euo pipefail\n" + "\n".join(blocks(FIVE_MINUTES, "sh"))
    said = run(["bash", "-c", script.replace("8123", str(free_port()))], tmp_path)
    assert "add 1 2 → ranks 0 1 2" in said
    assert len((tmp_path / "answer.txt").read_text()) > 200
    assert "The LORD is my shepherd" in said
    assert '"text_completion"' in said


def test_troubles_words_are_those_of_the_service() -> None:
    said = [
        part
        for row in TROUBLE.read_text().splitlines()
        if row.startswith("|")
        for quoted in re.findall(r'"([^"]+)"', row.split("|")[1])
        for part in quoted.split(" … ")
    ]
    assert len(said) > 15
    source = "\n".join(page.read_text() for page in (ROOT / "src").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # sentences that go over lines
    source = re.sub(r"\{[^{}\n]*\}", "…", source)
    unknown = [part for part in said if re.sub(r"\b(2|SIGKILL)\b", "…", part) not in source]
    assert unknown == []


@pytest.mark.slow
def test_the_site_is_built_and_no_link_is_broken(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run(command, ROOT, NO_MKDOCS_2_WARNING="1")
    assert "SamplingParams" in (tmp_path / "api" / "index.html").read_text()


@pytest.mark.slow
def test_the_python_blocks_run_as_they_stand(tmp_path: Path) -> None:
    found = blocks(README, "python")
    assert found
    for block in found:
        assert run([sys.executable, "-c", block], tmp_path).strip()


def make_targets(page: Path) -> list[str]:
    """What follows `make` between backquotes, in fenced and in indented blocks; not in prose."""
    text = page.read_text()
    in_blocks = "\n".join(textwrap.dedent(body) for _, body in _BLOCK.findall(text))
    return re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE) + re.findall(
        r"^make ([a-z-]+)", in_blocks, re.MULTILINE
    )


def test_make_knows_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in make_targets(page):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)


def test_extras_that_are_named_are_there() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        for extra in re.findall(r"(?:flexpert|\.)\[(\w+)\]", page.read_text()):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), (page.name, extra)


def command_lines(page: Path) -> list[list[str]]:
    """Each `flexpert …` in blocks and between backquotes, without what is no argument."""
    text = page.read_text()
    inline = re.findall(r"`(?:FLEXPERT_\w+=\S+ )?(flexpert [^`]*)`", text)
    in_blocks = [
        line.removeprefix("$ ").split("  #")[0].split(" #")[0].strip()
        for _, body in _BLOCK.findall(text)
        for line in textwrap.dedent(body).replace("\\\n", " ").splitlines()
    ]
    found = inline + [line for line in in_blocks if line.startswith("flexpert ")]
    found = [re.split(r"\s[&|>]", line)[0].replace("…", "").strip() for line in found]
    return [shlex.split(line)[1:] for line in found if "0.1.0" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_flags_that_are_named(page: Path) -> None:
    for line in command_lines(page):
        command = get_command(app)
        words = list(line)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        if hasattr(command, "commands"):
            assert not words or words[0].startswith("-"), (page.name, line)
            continue
        known = {name for parameter in command.params for name in parameter.opts}
        known |= {name for parameter in command.params for name in parameter.secondary_opts}
        given = words[: words.index("--")] if "--" in words else words
        flags = {word.partition("=")[0] for word in given if word.startswith("--")}
        assert flags <= known | {"--help"}, (page.name, line)
