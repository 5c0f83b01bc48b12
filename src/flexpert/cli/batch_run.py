"""Runs a batch against a service: bounded concurrency, and patience while nobody answers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx
import msgspec

from flexpert.cli.batch_file import (
    BatchAnswer,
    BatchRequest,
    BatchResponse,
    answered,
    refused,
    requests_of,
)
from flexpert.errors import ConfigError, FlexpertError

_AGAIN_S = 0.2  # at first, then longer each time
_AGAIN_MOST_S = 5.0
_BUSY = (429, 502, 503, 504)  # that is over after a while


class BatchOutput:
    """The file that answers are appended to, each line with one call of the system: whatever ends
    this process, at most the last is torn."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, answer: BatchAnswer) -> None:
        """Raises: FlexpertError"""
        line = memoryview(msgspec.json.encode(answer) + b"\n")
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            why = error.strerror
            raise FlexpertError(
                f"the output cannot be written: {why}; go on with --resume"
            ) from None


@contextmanager
def open_output(path: Path, *, resume: bool) -> Iterator[tuple[BatchOutput, set[str]]]:
    """The output, and whose answers it has already. A torn last line is cut off.

    Raises: ConfigError: it cannot be written, has something and is not resumed, or another process
        writes it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another process writes {path}") from None
        names, whole = answered(path.read_bytes())
        size = os.fstat(descriptor).st_size
        if size and not resume:
            raise ConfigError(f"{path} has something: go on with --resume, or name another file")
        if size > whole:
            os.ftruncate(descriptor, whole)
        yield BatchOutput(descriptor), names
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class BatchCounts:
    """total: lines of the input. skipped: those that had answers before. failed: of the done."""

    total: int = 0
    skipped: int = 0
    done: int = 0
    failed: int = 0


async def run_batch(
    source: Path,
    output: BatchOutput,
    names: set[str],
    client: httpx.AsyncClient,
    *,
    concurrency: int,
    patience_s: float,
    report: Callable[[BatchCounts], None] = lambda counts: None,
) -> BatchCounts:
    """Every request that has no answer yet, `concurrency` at a time.

    names: those that have one. patience_s: how long a request is asked again while the service
    cannot be reached or is too busy.

    Raises: ConfigError: the input is wrong. FlexpertError: the service does not answer any more;
        what it has answered is in the output.
    """
    counts = BatchCounts()
    for request in _requests(source):  # all of it, before anything is asked
        counts.total += 1
        counts.skipped += request.custom_id in names
    left = (request for request in _requests(source) if request.custom_id not in names)
    report(counts)

    async def work() -> None:
        for request in left:
            answer = await ask(client, request, patience_s)
            output.write(answer)
            counts.done += 1
            counts.failed += answer.failed
            report(counts)

    try:
        async with asyncio.TaskGroup() as workers:
            for _ in range(min(concurrency, counts.total - counts.skipped)):
                workers.create_task(work())
    except* FlexpertError as errors:
        raise errors.exceptions[0] from None
    return counts


def _requests(source: Path) -> Iterator[BatchRequest]:
    try:
        with source.open("rb") as lines:
            yield from requests_of(lines)
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror}") from None


async def ask(client: httpx.AsyncClient, request: BatchRequest, patience_s: float) -> BatchAnswer:
    """One request, again and again while nobody answers, under an id of its own: a head that was
    started again knows it. Raises: FlexpertError: nobody has answered for so long."""
    name = f"batch_req_{token_hex(12)}"
    if request.wrong:
        return refused(request, name)
    wait_s, failing_since = _AGAIN_S, None
    while True:
        try:
            reply = await client.post(
                request.url, json=request.body, headers={"x-request-id": name}
            )
            if reply.status_code not in _BUSY:
                response = BatchResponse(reply.status_code, name, _body(reply))
                return BatchAnswer(name, request.custom_id, response, None)
            why = f"it says {reply.status_code}"
        except (httpx.TransportError, httpx.DecodingError) as error:
            why = str(error) or type(error).__name__
        now = time.monotonic()
        failing_since = now if failing_since is None else failing_since
        if now - failing_since > patience_s:
            raise FlexpertError(
                f"the service does not answer for {patience_s:g} s ({why}); what it has answered "
                "is in the output: go on with --resume"
            )
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _AGAIN_MOST_S)


def _body(reply: httpx.Response) -> Any:
    try:
        return reply.json()
    except ValueError:
        return reply.text


@asynccontextmanager
async def batch_client(
    url: str, key: str | None, concurrency: int, verify: Any = True
) -> AsyncIterator[httpx.AsyncClient]:
    """For one service. An answer may take as long as it takes."""
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=concurrency),
        timeout=httpx.Timeout(None, connect=10.0),
        verify=verify,
    ) as client:
        yield client
