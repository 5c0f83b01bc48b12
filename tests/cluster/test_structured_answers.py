"""Structured answers of the embedded model: valid, never stuck, and the same through changes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from support.api_schemas import ApiSchema, api_schemas
from support.service import Answer, Service, active, answer_all, change, running, until

from flexpert.cluster.head import Head
from flexpert.engine.output_grammar import AnswerMatcher, GrammarCache, resolve
from flexpert.engine.request import SamplingParams, StructuredOutputsParams
from flexpert.errors import RequestError
from flexpert.frontend.generation import Generation
from flexpert.frontend.token_ids import text_of_answers
from flexpert.models.source import ModelSource

pytestmark = pytest.mark.slow

SETTINGS = {"engine__deterministic": True, "engine__kv_memory": "64MiB"}
BUDGET = 600  # tokens; the longest answer to a bounded schema has fewer
SEEDS = (1, 2)
# other formats are checked by their form only: a grammar does not know how long February is
FORMATS = jsonschema.FormatChecker(["uuid", "ipv4"])

Work = tuple[list[int], SamplingParams]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(cluster__ranks=2, cluster__max_ranks=4, **SETTINGS) as service:
        yield service


def asked(schema: Any, seed: int, budget: int = BUDGET, **params: Any) -> Work:
    structure = resolve(StructuredOutputsParams(json=schema))
    prompt = [(17 * seed + 31 * i) % 3000 + 10 for i in range(5 + seed % 40)]
    return prompt, SamplingParams(
        **{
            "max_tokens": budget,
            "temperature": 1.0,
            "seed": seed,
            "structured_outputs": structure,
            **params,
        }
    )


@pytest.mark.timeout(400)
def test_every_finished_answer_to_200_schemas_is_valid_and_none_is_stuck(service: Service) -> None:
    head = service.head
    schemas = [(one, seed) for seed in SEEDS for one in api_schemas()]
    work = [asked(one.schema, number, BUDGET) for number, (one, _) in enumerate(schemas)]
    answers = service.run(answer_all(head, work, clients=32), timeout_s=380)
    text = text_of_answers(head.info, head.tables)
    source = ModelSource.open("tiny")
    grammars = GrammarCache(lambda: source.grammar_tokens)
    cut = 0
    for (one, _), answer in zip(schemas, answers, strict=True):
        if answer.finish == "stop":
            said = json.loads(text.decode(answer.tokens))
            validator = jsonschema.Draft202012Validator(one.schema, format_checker=FORMATS)
            validator.validate(said)
        else:
            cut += 1
            may_be_cut(one, answer, grammars)
    assert cut < len(schemas) // 8


def may_be_cut(one: ApiSchema, answer: Answer, grammars: GrammarCache) -> None:
    """Only where the schema itself sets no end, and then on its way to a valid answer."""
    assert not one.bounded, one.name
    assert answer.finish == "length"
    assert len(answer.tokens) == BUDGET
    AnswerMatcher(StructuredOutputsParams(json=one.schema)).advance(answer.tokens, grammars)


def mixture() -> list[Work]:
    """Recursive and free schemas, whose answers are long, besides answers without a structure."""
    work = []
    for number, one in enumerate(api_schemas(52)):
        if not one.bounded:
            work.append(asked(one.schema, number, budget=160))
    for number in range(4):
        plain = SamplingParams(max_tokens=100, temperature=0.8, seed=number, ignore_eos=True)
        work.append(([7 + number, 300, 20], plain))
    return work


@pytest.mark.timeout(300)
def test_answers_are_the_same_through_ten_changes_and_five_kills(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = mixture()
        expected = await answer_all(head, work, clients=len(work))
        over = False

        async def traffic() -> int:
            rounds = 0
            while not over:
                assert await answer_all(head, work, clients=len(work)) == expected
                rounds += 1
            return rounds

        running_traffic = asyncio.create_task(traffic())
        for number in range(5):
            for target in (4, 2) if number % 2 else (3, 2):
                assert (await change(head, ranks=target)).state == "done"
                await asyncio.sleep(0.1)
            before = {rank.id: rank.pid for rank in head.cluster().ranks}
            victim = sorted(before)[number % 2]
            await until(lambda: any(rank.running for rank in head.cluster().ranks))
            os.kill(before[victim], signal.SIGKILL)
            await until(
                lambda before=before: (
                    len(active(head)) == 2
                    and {rank.pid for rank in head.cluster().ranks} != set(before.values())
                ),
                timeout_s=60,
            )
        over = True
        assert await running_traffic >= 1

    service.run(scenario(service.head), timeout_s=280)


def test_it_combines_with_n_stops_logprobs_and_penalties(service: Service) -> None:
    structure = resolve(StructuredOutputsParams(regex="([a-z]{2,6} ){3}END"))

    async def whole(**params: Any) -> Any:
        given = SamplingParams(
            **{"temperature": 1.0, "seed": 5, "max_tokens": 60, "structured_outputs": structure}
            | params
        )
        text = text_of_answers(service.head.info, service.head.tables)
        with Generation(service.head, text, [[11, 12]], given, request_id="c") as generation:
            await generation.submit()
            return await generation.whole()

    several = service.run(whole(n=4))
    assert len({part.text for part in several}) > 1
    for part in several:
        assert part.finish == "stop"
        assert [len(word) for word in part.text.split()][3:] == [3]
    assert service.run(whole(n=4)) == several
    (stopped,) = service.run(whole(stop=("END",)))
    assert stopped.finish == "stop"
    assert stopped.text.endswith(" ")
    (told,) = service.run(whole(logprobs=3, frequency_penalty=1.0))
    assert told.text.endswith("END")
    assert all(len(record.logprobs.top) == 3 for record in told.records)
    (greedy,) = service.run(whole(temperature=0))
    assert greedy.text.endswith("END")
    (cut,) = service.run(whole(max_tokens=2))
    assert cut.finish == "length"


def test_a_structure_that_was_not_resolved_is_compiled_or_refused_by_the_rank(
    service: Service,
) -> None:
    """A program that drives the head itself need not resolve."""

    async def scenario(head: Head) -> None:
        good = SamplingParams(
            max_tokens=20, seed=1, structured_outputs=StructuredOutputsParams(choice=["one", "two"])
        )
        (answer,) = await answer_all(head, [([5], good)], clients=1)
        assert text_of_answers(head.info, head.tables).decode(answer.tokens) in ("one", "two")
        bad = SamplingParams(
            max_tokens=20, seed=1, structured_outputs=StructuredOutputsParams(regex="(a")
        )
        with pytest.raises(RequestError, match="unclosed group"):
            await answer_all(head, [([5], bad)], clients=1)

    service.run(scenario(service.head))


def test_cancelled_requests_leave_nothing_behind(service: Service) -> None:
    async def scenario(head: Head) -> None:
        for number in range(30):
            structure = StructuredOutputsParams(regex=f"[a-z]{{500}}{number}")
            params = SamplingParams(max_tokens=500, seed=1, structured_outputs=structure)
            stream = head.submit([5, 6, 7], params)
            await asyncio.sleep(0.002 * (number % 5))
            stream.cancel()
        plain = SamplingParams(max_tokens=5, seed=1)
        await answer_all(head, [([5, 6, 7], plain)] * 4, clients=4)  # every rank says its load
        await until(
            lambda: all(
                (rank.running, rank.waiting, rank.kv_used) == (0, 0, 0)
                for rank in head.cluster().ranks
            )
        )

    service.run(scenario(service.head))
