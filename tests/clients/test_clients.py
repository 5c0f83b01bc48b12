"""Programs that people have, against a served model: each of them in a script of its own.

Those that pin what we use ourselves run in .venv-clients, which `make clients` makes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from flexpert.bench.service import own_service
from flexpert.models.source import ModelSource

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
APART = HERE.parents[1] / ".venv-clients" / "bin" / "python"
# as Hermes and Qwen write calls
TEMPLATE = (
    "{% if tools %}Call {{ tools | tojson }} as <tool_call>{...}</tool_call>.\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded one with a chat template that knows tools."""
    folder = tmp_path_factory.mktemp("clients") / "model"
    shutil.copytree(ModelSource.open("tiny").path, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


async def ended(python: str, script: str, *arguments: str) -> tuple[int, str]:
    """Status of a client, and what it has said."""
    process = await asyncio.create_subprocess_exec(
        python,
        str(HERE / script),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), 180)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, said.decode("utf-8", "replace")


def run(model: Path, work: Path, clients: dict[str, str]) -> None:
    """clients: the Python of each."""

    async def scenario() -> None:
        serve = ("--model", str(model), "--served-name", "tiny", "--ranks", "1")
        async with own_service(serve, report=lambda line: None) as service:
            base = f"http://{service.target.host}:{service.target.port}/v1"
            for name, python in clients.items():
                folder = work / name
                folder.mkdir()
                arguments = (base, "tiny", str(model), str(folder))
                status, said = await ended(python, f"{name}_client.py", *arguments)
                assert status == 0, f"{name}: {said[-3000:]}"
                assert said.strip().endswith("ok"), f"{name}: {said[-3000:]}"

    asyncio.run(scenario())


LIBRARIES = ("openai", "anthropic", "langchain", "litellm", "llama_index")


def test_libraries_are_served(model: Path, tmp_path: Path) -> None:
    packages = {"langchain": "langchain_openai"}
    there = [name for name in LIBRARIES if importlib.util.find_spec(packages.get(name, name))]
    if not there:
        pytest.skip("none of them is installed")
    run(model, tmp_path, dict.fromkeys(there, sys.executable))


@pytest.mark.skipif(not APART.exists(), reason="they are not installed: make clients")
def test_programs_that_evaluate_and_measure_are_served(model: Path, tmp_path: Path) -> None:
    programs = ("lm_eval", "guidellm", "aiperf")
    run(model, tmp_path, dict.fromkeys(programs, str(APART)))
