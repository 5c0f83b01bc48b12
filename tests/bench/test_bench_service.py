"""A service of our own: its failure is told with its words, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flexpert.bench.load import call
from flexpert.bench.service import own_service
from flexpert.errors import FlexpertError
from flexpert.trials.demo import SERVE


def test_a_service_that_does_not_start_says_why() -> None:
    async def run() -> None:
        async with own_service(["--ranks", "9", "--max-ranks", "4"]):
            pytest.fail("it started")

    with pytest.raises(FlexpertError, match=r"exit status 2(.|\n)*exceeds max_ranks"):
        asyncio.run(run())


@pytest.mark.slow
def test_it_ends_with_all_its_processes_even_if_the_block_fails() -> None:
    async def run() -> list[int]:
        async with own_service(SERVE) as service:
            status, cluster = await call(service.target, "GET", "/cluster")
            assert status == 200
            pids.extend([service.pid, *(rank["pid"] for rank in cluster["ranks"])])
            raise RuntimeError("in the block")

    pids: list[int] = []
    with pytest.raises(RuntimeError, match="in the block"):
        asyncio.run(run())
    assert len(pids) == 3
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
