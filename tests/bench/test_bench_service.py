"""A service of our own: its failure is told with its words, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flexpert.bench.load import call
from flexpert.bench.offered_load import OfferedLoad
from flexpert.bench.serve import ServeMeasured, run_against
from flexpert.bench.service import own_service
from flexpert.display.render import figures_text
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


@pytest.mark.slow
def test_another_server_of_the_same_machine_is_measured_in_turn() -> None:
    """It is asked for its model by name, as vLLM and SGLang want it."""
    load = OfferedLoad(count=4, input_tokens=8, output_tokens=6, concurrency=2, warmup=1, seed=3)
    lines: list[str] = []

    async def serve() -> None:
        async with own_service(["--ranks", "1"]) as service:
            url = f"http://{service.target.host}:{service.target.port}"
            report = await asyncio.to_thread(
                run_against, load, ServeMeasured(url=url), service.target, url, 2, lines.append
            )
            against = report.against
            assert against is not None
            assert against.model == "tiny"
            assert [turn.ours.output_tokens for turn in against.rounds] == [24, 24]
            assert [turn.theirs.output_tokens for turn in against.rounds] == [24, 24]
            assert against.tokens_ratio is not None
            assert against.tokens_ratio > 0
            text = figures_text(report)
            assert f"{url} (tiny), in turn with ours:" in text
            assert f"{against.tokens_ratio:.2f}" in text.splitlines()[-1]

    asyncio.run(serve())
    turns = [line.rpartition(": ")[2] for line in lines if line.startswith("round")]
    assert turns == ["ours", "theirs", "theirs", "ours"]
