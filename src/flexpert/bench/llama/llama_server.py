"""llama.cpp's server with a model of ours, for the time of a measurement."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flexpert.bench.child_process import ChildProcess, own_process
from flexpert.bench.load import LoadError, Target, call
from flexpert.errors import ConfigError, FlexpertError

GREEDY: Final[Mapping[str, Any]] = {"samplers": ["top_k"], "top_k": 1}
"""Fields of a request: without them llama.cpp runs a chain of samplers that change nothing at
temperature 0, but take time with large vocabularies."""

_POLL_S = 0.1
_START_S = 600.0  # a large file from a slow disk


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaSettings:
    """program: the file of llama-server. slots: requests it may compute at once, each of at most
    `slot_tokens` tokens."""

    program: Path
    model: Path
    threads: int
    slots: int
    slot_tokens: int

    def command(self, port: int) -> list[str]:
        threads = str(self.threads)
        return [
            str(self.program),
            *("--model", str(self.model)),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--threads", threads, "--threads-batch", threads),
            *("--parallel", str(self.slots), "--ctx-size", str(self.slots * self.slot_tokens)),
            *("--cache-ram", "0"),  # no copies of what finished requests had computed
        ]


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """One that answers."""

    target: Target
    pid: int


def check_available(program: Path | None) -> Path:
    """Before long work begins.

    Raises: ConfigError: there is no such program, or the package that writes its files is missing.
    """
    if program is None:
        raise ConfigError(
            "--compare llama.cpp needs --llama-server PATH; docs/bench.md says how it is built"
        )
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise ConfigError(f"--llama-server {program} is no program that can be run")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("--compare llama.cpp needs gguf: pip install 'flexpert[gguf]'")
    return program.absolute()


async def write_model(model: str, file: Path) -> None:
    """The GGUF file of a served model.

    Raises: FlexpertError: it cannot be written; says why.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flexpert.bench.llama.gguf_writer", model, str(file)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise FlexpertError("no GGUF file could be written: " + " ".join(last))


@asynccontextmanager
async def llama_server(settings: LlamaSettings) -> AsyncIterator[LlamaServer]:
    """It answers until the block ends.

    Raises: FlexpertError: it ended, or was not ready in time; with the last lines it printed.
    """
    port = _free_port()
    try:
        async with own_process(settings.command(port)) as child:
            child.keep_lines()
            target = Target("127.0.0.1", port)
            await _ready(child, target)
            yield LlamaServer(target, child.pid)
    except OSError as error:
        raise FlexpertError(f"{settings.program} cannot be run: {error.strerror}") from None


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


async def _ready(child: ChildProcess, target: Target) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if child.process.returncode is not None:
            status = await child.end()
            raise FlexpertError(
                f"llama-server did not start (exit status {status}){child.last_words()}"
            )
        try:
            if (await call(target, "GET", "/health"))[0] == 200:
                return
        except LoadError:
            pass  # it does not listen yet
        await asyncio.sleep(_POLL_S)
    raise FlexpertError(f"llama-server was not ready after {_START_S:g} s{child.last_words()}")
