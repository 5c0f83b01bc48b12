"""Real ranks under requests at the edge of every range: answered or refused, nothing is left."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from support.service import active, answer, answer_all, change, requests, running

from flexpert.cluster.head import Head
from flexpert.engine import rank_protocol as msg
from flexpert.engine.request import SamplingParams
from flexpert.errors import Overloaded, RequestError

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {
    "cluster__ranks": 2,
    "cluster__max_sequences": 64,
    "engine__deterministic": True,
    "engine__kv_memory": "32MiB",
}
NUMBERS = (-1, 0, 1, 0.5, 20, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70, -(2**63), -(2**70))
ODD = (*NUMBERS, math.nan, math.inf, -math.inf, 1e-300, 1e300, "1", None, (), [1], True)
FIELDS = tuple(SamplingParams.__struct_fields__)
PROMPTS: tuple[Any, ...] = ([], [-1], [2**31], [2**63], [2**70], [4095], [4096], [1] * 5000)


def test_whatever_is_asked_costs_no_rank_and_leaves_nothing_behind() -> None:
    async def scenario(head: Head) -> None:
        pids = {rank.pid for rank in head.cluster().ranks}
        work = requests(6, tokens=30)
        expected = await answer_all(head, work, clients=6)
        beside = asyncio.create_task(answer_all(head, work, clients=6))
        answered = refused = 0
        odd = [{name: value} for name in FIELDS for value in ODD]
        odd += [{"stop_token_ids": (value,)} for value in NUMBERS]

        async def ask(asked: dict[str, Any]) -> bool:
            """Whether it was answered."""
            params = SamplingParams(**{"max_tokens": 3, "ignore_eos": True} | asked)
            try:
                if not (await answer(head, [1, 2, 3], params)).tokens:
                    raise AssertionError(f"no tokens for {asked}")
            except RequestError:
                return False
            return True

        for at in range(0, len(odd), 16):
            outcomes = await asyncio.gather(*map(ask, odd[at : at + 16]))
            answered += sum(outcomes)
            refused += len(outcomes) - sum(outcomes)
        for prompt in PROMPTS:
            try:
                await answer(head, prompt, SamplingParams(max_tokens=3))
                answered += 1
            except RequestError:
                refused += 1
        assert answered > 50
        assert refused > 100
        assert len(head._journal) == 0 or not beside.done()
        assert await beside == expected
        # what was refused is no time bomb either: changes hand over what the journal has
        assert (await change(head, ranks=3)).state == "done"
        assert (await change(head, remove=[0])).state == "done"
        assert await answer_all(head, work, clients=6) == expected
        assert len(head._journal) == 0
        assert active(head) == {1, 2}
        assert {rank.pid for rank in head.cluster().ranks} & pids

    with running(**SETTINGS) as service:
        service.run(scenario(service.head))


def test_what_passes_the_checks_can_be_told_to_a_rank() -> None:
    """Nothing is admitted that cannot be sent: it would wait in the journal for the next change."""

    async def scenario(head: Head) -> None:
        for name in FIELDS:
            for value in ODD:
                try:
                    params = head._resolve([1, 2, 3], SamplingParams(**{name: value}))
                except RequestError:
                    continue
                entry = head._journal.open("x", [1, 2, 3], params, (0,), lambda name: None)
                msg.decode_command(msg.encode(msg.Admit([entry.resume()])))
                head._journal.close("x")

    with running(**SETTINGS | {"cluster__ranks": 1}) as service:
        service.run(scenario(service.head))


def test_a_full_journal_refuses_and_serves_on() -> None:
    async def scenario(head: Head) -> None:
        long = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0)
        streams = [head.submit([1, 2, number], long) for number in range(64)]
        with pytest.raises(Overloaded, match="max-sequences"):
            head.submit([1], long)
        for stream in streams:
            stream.cancel()
        assert len((await answer(head, [1, 2, 3], long)).tokens) == 200
        assert len(head._journal) == 0

    with running(**SETTINGS | {"cluster__ranks": 1}) as service:
        service.run(scenario(service.head))
