"""Log probabilities of prompts, biases and salts through real ranks that come and go."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from support.service import Service, answer, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.engine.request import SamplingParams, TokenLogprobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(
        cluster__ranks=2,
        cluster__max_ranks=4,
        engine__deterministic=True,
        engine__kv_memory="32MiB",
        engine__max_tokens_per_step=64,
    ) as service:
        yield service


async def score(head: Head, prompt: list[int]) -> tuple[list[TokenLogprobs], int]:
    """Of a prompt's tokens from the second on; and how many were cached."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=2, temperature=0.0)
    async with head.submit(prompt, params) as stream:
        async for delta in stream:
            assert delta.prompt_logprobs is not None
            return delta.prompt_logprobs, delta.cached
    raise AssertionError


def test_a_prompt_is_scored_as_it_would_have_been_answered(service: Service) -> None:
    async def scenario(head: Head) -> None:
        prompt = [(31 * at + 5) % 3000 + 10 for at in range(90)]
        params = SamplingParams(max_tokens=60, temperature=0.0, logprobs=2, ignore_eos=True)
        tokens: list[int] = []
        generated: list[TokenLogprobs] = []
        async with head.submit(prompt, params) as stream:
            async for delta in stream:
                tokens += delta.tokens
                generated += delta.logprobs or []
        scored, cached = await score(head, prompt + tokens)
        assert cached == 0, "what is in the cache is computed again"
        assert len(scored) == len(prompt) + len(tokens) - 1
        for one, other in zip(scored[len(prompt) - 1 :], generated, strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=0.05)
            assert one.rank == 1

    service.run(scenario(service.head))


def test_scores_are_the_same_while_ranks_come_go_and_die(service: Service) -> None:
    async def scenario(head: Head) -> None:
        prompts = [prompt for prompt, _ in requests(60)]
        expected = [await score(head, prompt) for prompt in prompts]

        async def again() -> list[tuple[list[TokenLogprobs], int]]:
            return list(await asyncio.gather(*(score(head, prompt) for prompt in prompts)))

        others = asyncio.create_task(answer_all(head, requests(40), clients=20))
        for target in ({"ranks": 4}, {"remove": [0]}, {"ranks": 2}):
            scoring = asyncio.create_task(again())
            done = await change(head, **target)
            assert done.state == "done", done.error
            assert await scoring == expected
        scoring = asyncio.create_task(again())
        victim = head.cluster().ranks[0]
        await asyncio.sleep(0.05)
        os.kill(victim.pid, signal.SIGKILL)
        assert await scoring == expected
        await others
        await until(lambda: head.readiness().ready and head.cluster().operation is None)

    service.run(scenario(service.head))


def test_what_steers_an_answer_and_what_is_cached(service: Service) -> None:
    async def scenario(head: Head) -> None:
        prompt = [(7 * at) % 3000 + 10 for at in range(100)]
        greedy = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
        plain = await answer(head, prompt, SamplingParams(**greedy))
        only = await answer(head, prompt, SamplingParams(**greedy, allowed_token_ids=(5, 9)))
        assert set(only.tokens) <= {5, 9}
        pushed = await answer(head, prompt, SamplingParams(**greedy, logit_bias={77: 100.0}))
        assert pushed.tokens == [77] * 8
        bad = tuple((token,) for token in set(plain.tokens))
        without = await answer(head, prompt, SamplingParams(**greedy, bad_token_ids=bad))
        assert not set(without.tokens) & set(plain.tokens)

        async def cached(salt: str) -> int:
            params = SamplingParams(max_tokens=1, temperature=0.0, cache_salt=salt)
            async with head.submit(prompt, params) as stream:
                async for delta in stream:
                    return delta.cached
            raise AssertionError

        assert [await cached("one") for _ in range(4)][-1] > 0
        assert await cached("another") == 0

    service.run(scenario(service.head))
