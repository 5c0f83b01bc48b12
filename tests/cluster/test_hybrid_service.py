"""Models whose layers keep a state of each sequence: no change and no loss alters an answer, nor do
tokens that the model's own layer proposes.

What is expected is what an undisturbed rank answers; that these are transformers' own tokens is
shown by tests/models/test_every_family.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint, prompt_of
from support.draft_checkpoints import with_draft_layer
from support.service import Answer, Service, active, answer, answer_all, change, running, until

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
Work = list[tuple[list[int], SamplingParams]]


def requests(count: int, tokens: int) -> Work:
    """Greedy and drawn, some with a prefix in common, some that may say few things."""
    shared = prompt_of(70, seed=99)
    return [
        (
            [*(shared if number % 3 == 0 else []), *prompt_of(5 + 11 * number % 60, seed=number)],
            SamplingParams(
                max_tokens=tokens,
                temperature=0.0 if number % 2 else 0.8,
                seed=number,
                ignore_eos=True,
                allowed_token_ids=(30, 31) if number % 4 == 1 else None,
            ),
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_next", tmp_path_factory.mktemp("qwen3_next"))


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    proposing = with_draft_layer(model, tmp_path_factory.mktemp("proposing"), "mtp")
    with running(
        model__model=str(proposing),
        cluster__ranks=3,
        engine__kv_memory="4MiB",
        engine__speculate="mtp",
        **SETTINGS,
    ) as service:
        yield service


WORK = requests(12, tokens=40)


async def answers_all_begun(head: Head) -> asyncio.Task[list[Answer]]:
    """WORK is being answered, and each of it has a token."""
    begun = 0

    async def one(prompt: list[int], params: SamplingParams) -> Answer:
        nonlocal begun
        result = Answer()
        async with head.submit(prompt, params) as stream:
            async for delta in stream:
                begun += not result.tokens
                result.tokens += delta.tokens
                result.finish = delta.finish
        return result

    async def all_of_them() -> list[Answer]:
        return list(await asyncio.gather(*(one(*request) for request in WORK)))

    traffic = asyncio.create_task(all_of_them())
    await until(lambda: begun == len(WORK))
    return traffic


@pytest.fixture(scope="module")
def expected(service: Service) -> list[Answer]:
    async def undisturbed(head: Head) -> list[Answer]:
        assert (await change(head, ranks=1)).state == "done"
        answers = await answer_all(head, WORK, clients=1)
        assert (await change(head, ranks=3)).state == "done"
        return answers

    return service.run(undisturbed(service.head))


def test_three_ranks_and_a_batch_give_the_answers_of_one_rank_and_none(
    service: Service, expected: list[Answer]
) -> None:
    assert service.run(answer_all(service.head, WORK, clients=12)) == expected
    accepted = "flexpert_accepted_draft_tokens_total"
    assert service.head.registry.get_sample_value(accepted) > 3


def test_leavers_sequences_go_on_with_their_states(
    service: Service, expected: list[Answer]
) -> None:
    async def scenario(head: Head) -> None:
        traffic = await answers_all_begun(head)
        done = await change(head, ranks=1)
        assert done.state == "done"
        assert done.moved_requests == done.moved_with_kv >= 4
        assert done.recomputed_tokens == 0
        assert await traffic == expected
        assert (await change(head, ranks=3)).state == "done"

    service.run(scenario(service.head))


def test_a_killed_ranks_sequences_are_computed_again(
    service: Service, expected: list[Answer]
) -> None:
    async def scenario(head: Head) -> None:
        traffic = await answers_all_begun(head)
        os.kill(head.cluster().ranks[1].pid, signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})

    service.run(scenario(service.head))


def test_preempted_sequences_are_computed_again(model: Path, expected: list[Answer]) -> None:
    info = ModelSource.open(str(model)).info
    blocks = 40 * 16 * info.kv_bytes_per_token()  # of 12 sequences with 6 to 14 blocks each

    async def scenario(head: Head) -> None:
        # without proposals
        assert await answer_all(head, WORK, clients=12) == expected
        assert head.registry.get_sample_value("flexpert_preemptions_total") > 0

    with running(
        model__model=str(model), cluster__ranks=1, engine__kv_memory=blocks, **SETTINGS
    ) as service:
        service.run(scenario(service.head))


def test_a_conversation_goes_on_where_its_state_was_kept(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=1)
        params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
        first = prompt_of(50, seed=500)
        said = await answer(head, first, params)
        second = [*first, *said.tokens, *prompt_of(9, seed=501)]
        cached = []
        for _ in range(2):
            async with head.submit(second, params) as stream:
                told = [delta.cached async for delta in stream]
            cached.append(told[0])
        # 89 of the first turn's tokens are computed: 5 blocks; then all but the last of the second
        assert cached == [80, 96]

    service.run(scenario(service.head))
