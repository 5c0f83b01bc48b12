"""A service that speculates answers as one that does not, whatever becomes of its ranks.

The answers take more steps than the first phase in which tokens are proposed: so all ranks leave
the draft layer out, and take it up again, in the same steps.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support.draft_checkpoints import with_draft_layer
from support.service import Answer, Service, active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.engine.request import SamplingParams, StructuredOutputsParams
from flexpert.models.source import locate

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {"engine__deterministic": True, "engine__kv_memory": "32MiB"}
EAGER = {"num_speculative_tokens": 5, "prompt_lookup_min": 1, "max_rows": 64}

Work = list[tuple[list[int], SamplingParams]]


def work() -> Work:
    """Long answers; those that may say few things only repeat themselves."""
    found = requests(12, tokens=250)
    ways: list[dict[str, Any]] = [
        {},
        {"allowed_token_ids": (30, 31, 32)},
        {"repetition_penalty": 1.2, "allowed_token_ids": tuple(range(30, 60))},
        {"ignore_eos": False, "stop_token_ids": (40,), "allowed_token_ids": (40, *range(50, 90))},
        {
            "ignore_eos": False,
            "structured_outputs": StructuredOutputsParams(regex="(a|b| ){5000,}"),
        },
    ]
    return [
        (prompt, msgspec.structs.replace(params, **ways[number % len(ways)]))
        for number, (prompt, params) in enumerate(found)
    ]


@pytest.fixture(scope="module")
def expected() -> list[Answer]:
    with running(cluster__ranks=1, **SETTINGS) as service:
        return service.run(answer_all(service.head, work(), clients=12))


@pytest.fixture(scope="module", params=["ngram", "mtp"])
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    how: dict[str, Any] = {"engine__speculate": EAGER}
    if request.param == "mtp":
        folder = with_draft_layer(locate("tiny"), tmp_path_factory.mktemp("mtp"), "layers")
        layer = {"method": "mtp", "num_speculative_tokens": 3}
        how = {"engine__speculate": layer, "model__model": str(folder)}
    with running(cluster__ranks=3, **how, **SETTINGS) as service:
        yield service


def accepted(head: Head) -> float:
    return head.registry.get_sample_value("flexpert_accepted_draft_tokens_total") or 0.0


async def busy(head: Head) -> None:
    await until(lambda: all(rank.running > 2 for rank in head.cluster().ranks))


def test_through_changes_of_ranks(service: Service, expected: list[Answer]) -> None:
    async def scenario(head: Head) -> None:
        before = accepted(head)
        traffic = asyncio.create_task(answer_all(head, work(), clients=12))
        await busy(head)
        left = await change(head, ranks=1)
        assert left.state == "done"
        assert left.moved_requests == left.moved_with_kv > 4, "KV of what came true moves along"
        assert left.recomputed_tokens == 0
        assert (await change(head, ranks=3)).state == "done"
        assert await traffic == expected
        # each epoch begins with 32 steps in which tokens are proposed
        assert accepted(head) - before > 20
        read = head.registry.get_sample_value
        by_position = [
            read("flexpert_accepted_draft_tokens_by_position_total", {"position": str(place)}) or 0
            for place in range(5)
        ]
        assert sum(by_position) == accepted(head)
        assert by_position == sorted(by_position, reverse=True)
        assert accepted(head) < (read("flexpert_draft_tokens_total") or 0.0)

    service.run(scenario(service.head))


def test_through_the_loss_of_two_ranks(service: Service, expected: list[Answer]) -> None:
    async def scenario(head: Head) -> None:
        traffic = asyncio.create_task(answer_all(head, work(), clients=12))
        await busy(head)
        for rank in head.cluster().ranks[:2]:
            os.kill(rank.pid, signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})

    service.run(scenario(service.head))
