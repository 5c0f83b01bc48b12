"""Models whose attention is to what an indexer picks: no change and no loss alters an answer.

What is expected is what an undisturbed rank answers; that these are transformers' own tokens is
shown by tests/models/test_every_family.py. Twelve keys are picked, of prompts of up to 135.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint, prompt_of
from support.service import Answer, Service, active, answer_all, change, running, until

from flexpert.cluster.head import Head
from flexpert.engine.request import SamplingParams
from flexpert.models.source import ModelSource

pytestmark = pytest.mark.slow

SETTINGS = {
    "engine__deterministic": True,
    "engine__max_tokens_per_step": 24,  # prompts come in chunks
    "engine__max_running": 12,
    "model__skip_tokenizer_init": True,
}
SHARED = prompt_of(70, seed=99)
WORK = [
    (
        [*(SHARED if number % 3 == 0 else []), *prompt_of(5 + 11 * number % 60, seed=number)],
        SamplingParams(
            max_tokens=60, temperature=0.0 if number % 2 else 0.8, seed=number, ignore_eos=True
        ),
    )
    for number in range(9)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm_moe_dsa")
    return make_checkpoint("glm_moe_dsa", path, indexer_types=["full", "shared", "full", "shared"])


@pytest.fixture(scope="module")
def service(model: Path) -> Iterator[Service]:
    with running(
        model__model=str(model), cluster__ranks=1, engine__kv_memory="4MiB", **SETTINGS
    ) as service:
        yield service


@pytest.fixture(scope="module")
def expected(service: Service) -> list[Answer]:
    """One after the other, on one rank: the first ones find no prefix."""
    return service.run(answer_all(service.head, WORK, clients=1))


async def traffic_begun(head: Head) -> asyncio.Task[list[Answer]]:
    """WORK is being answered, and some of it by each rank."""
    traffic = asyncio.create_task(answer_all(head, WORK, clients=len(WORK)))
    await until(lambda: all(rank.running for rank in head.cluster().ranks))
    return traffic


def test_leavers_sequences_go_on_and_those_of_a_killed_rank_begin_again(
    service: Service, expected: list[Answer]
) -> None:
    async def scenario(head: Head) -> None:
        assert (await change(head, ranks=3)).state == "done"
        traffic = await traffic_begun(head)
        done = await change(head, ranks=2)
        assert done.state == "done"
        assert done.moved_requests == done.moved_with_kv >= 1
        assert done.recomputed_tokens == 0
        assert await traffic == expected
        traffic = await traffic_begun(head)
        os.kill(head.cluster().ranks[0].pid, signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: len(active(head)) == 2)

    service.run(scenario(service.head))


def test_prompts_go_on_from_cached_blocks(service: Service, expected: list[Answer]) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=1)
        prompt, params = WORK[3]
        for least in (0, 64):
            async with head.submit(prompt, params) as stream:
                told = [delta async for delta in stream]
            assert told[0].cached >= least
            assert [token for delta in told for token in delta.tokens] == expected[3].tokens

    service.run(scenario(service.head))


def test_preempted_sequences_are_computed_again(model: Path, expected: list[Answer]) -> None:
    info = ModelSource.open(str(model)).info
    blocks = 14 * 16 * info.kv_bytes_per_token()  # of 9 sequences with 3 to 10 blocks each

    async def scenario(head: Head) -> None:
        assert await answer_all(head, WORK, clients=len(WORK)) == expected
        assert head.registry.get_sample_value("flexpert_preemptions_total") > 0

    with running(
        model__model=str(model), cluster__ranks=1, engine__kv_memory=blocks, **SETTINGS
    ) as service:
        service.run(scenario(service.head))
