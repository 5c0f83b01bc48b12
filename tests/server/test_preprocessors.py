"""The head's side of preprocessing: how a worker ends tells what its body is answered with."""

from __future__ import annotations

import asyncio
import signal

import pytest

from flexpert.cluster.helper import OnEnd, OnMessage
from flexpert.server.errors import ApiError
from flexpert.server.preprocessing import Limits
from flexpert.server.preprocessors import Preprocessors


class Dying:
    """A helper that is ready, and ends with its first body."""

    def __init__(self, why: str, on_message: OnMessage, on_end: OnEnd) -> None:
        self._why = why
        self._on_end = on_end
        asyncio.get_running_loop().call_soon(on_message, b"")

    def send(self, message: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._on_end, self._why)

    def kill(self) -> None:
        pass


class Owner:
    def __init__(self, why: str) -> None:
        self.impaired: dict[str, str] = {}
        self.started = 0
        self._why = why

    def start_helper(self, entry: str, spec: bytes, on_message: OnMessage, on_end: OnEnd) -> Dying:
        self.started += 1
        return Dying(self._why, on_message, on_end)


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [
        (signal.SIGABRT, 413, "request_too_costly"),  # as Rust ends where memory is refused
        (signal.SIGKILL, 500, "preprocessing_failed"),
    ],
)
def test_a_worker_that_gave_up_for_memory_is_the_bodys_fault(
    number: int, status: int, code: str
) -> None:
    async def scenario() -> None:
        owner = Owner(f"signal {number:d}")
        limits = Limits("m", 10, 10, 1, 10)
        workers = Preprocessors(owner, lambda: limits, 5.0)
        for body in (b"{}", b"{}"):
            with pytest.raises(ApiError) as refused:
                await workers.run("completions", body)
            assert refused.value.status_code == status
            assert refused.value.code == code
        assert owner.started == 2, "the next body finds a new worker"

    asyncio.run(scenario())
