"""Conversations on real ranks come back to the one that has their prefix, wherever that went."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from support.service import active, answer, change, running, until

from flexpert.cluster.head import Head
from flexpert.engine.request import SamplingParams

pytestmark = pytest.mark.slow

TURN = 160  # tokens of what is said in a turn, ten blocks


def turn(number: int) -> list[int]:
    return [(53 * number + 17 * place) % 3000 + 10 for place in range(TURN)]


async def say(head: Head, prompt: list[int], tokens: int = 4) -> tuple[int, list[int]]:
    """How many of the prompt's tokens were cached, and the answer."""
    cached, said = 0, []
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    async with head.submit(prompt, params) as stream:
        async for delta in stream:
            cached += delta.cached
            said += delta.tokens
    return cached, said


def known(head: Head) -> dict[int, int]:
    return {rank.id: rank.cached_blocks for rank in head.cluster().ranks}


def decisions(head: Head, reason: str) -> float:
    labels = {"reason": reason}
    return head.registry.get_sample_value("flexpert_routing_decisions_total", labels) or 0.0


def test_conversations_return_to_their_rank_move_with_it_and_outlive_it() -> None:
    async def scenario(head: Head) -> None:
        talks = [turn(number) for number in range(4)]
        for number in (0, 1, 2):  # their turns are mixed, as in life
            for index, talk in enumerate(talks):
                cached, said = await say(head, talk)
                if number:
                    assert cached >= len(talk) - TURN - 32
                talk += said + turn(10 * number + index + 4)
        assert sorted(known(head)) == [0, 1, 2]
        assert all(known(head).values()), "new prefixes take turns"
        assert decisions(head, "prefix") == 8
        found = head.registry.get_sample_value("flexpert_cached_prompt_tokens_total")
        assert found == head.registry.get_sample_value("flexpert_routing_cached_tokens_total")

        # between two turns, their rank leaves
        await change(head, ranks=2)
        for talk in talks:
            talk += turn(80)
            cached, said = await say(head, talk)
            assert cached >= len(talk) - 2 * TURN - 32
            talk += said

        # each says something long, and while they do another one does
        speaking = [asyncio.create_task(say(head, talk, tokens=150)) for talk in talks]
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) == 4)
        done = await change(head, ranks=1)
        assert done.moved_with_kv > 0
        answers = await asyncio.gather(*speaking)
        (left,) = active(head)
        await until(lambda: set(known(head)) == {left})
        for talk, (_, said) in zip(talks, answers, strict=True):
            talk += said + turn(90)
            cached, _ = await say(head, talk)
            assert cached >= len(talk) - TURN - 32, "its blocks have moved, and are found there"

        # a rank that is lost is forgotten, with all it had
        assert (await change(head, ranks=2)).state == "done"
        os.kill(next(rank.pid for rank in head.cluster().ranks if rank.id == left), signal.SIGKILL)
        again = await asyncio.gather(*(answer(head, talk, _greedy()) for talk in talks))
        assert [len(one.tokens) for one in again] == [4] * 4
        await until(lambda: len(active(head)) == 2)
        expected = [await answer(head, talk, _greedy()) for talk in talks]
        assert again == expected

    with running(
        cluster__ranks=3, engine__deterministic=True, engine__kv_memory="32MiB"
    ) as service:
        service.run(scenario(service.head))


def _greedy() -> SamplingParams:
    return SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
