"""What a rank says it will need is what it needs once its KV cache is full."""

from __future__ import annotations

import asyncio

import pytest
from support.service import answer_all, requests, running

from flexpert.cluster.head import Head
from flexpert.models.dense_weights import mapped_nbytes
from flexpert.models.source import ModelSource

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("deterministic", "maps"),
    [(False, "off"), (True, "off"), (False, "on")],
    ids=["fast", "deterministic", "mapped"],
)
def test_planned_memory_is_true_within_ten_percent(deterministic: bool, maps: str) -> None:
    async def scenario(head: Head) -> None:
        # some 16,000 tokens through twice 6,144 places: every block is used
        await answer_all(head, requests(128, tokens=60), clients=32)
        await asyncio.sleep(1.5)  # until memory was read again
        await answer_all(head, requests(4), clients=4)
        source = ModelSource.open("tiny")
        mapped = mapped_nbytes(source)  # planned, and no rank's own
        if maps == "on":
            mapped += source.expert_nbytes() * source.info.experts * source.info.moe_layers // 2
        for rank in head.cluster().ranks:
            assert rank.memory_bytes + mapped == pytest.approx(rank.planned_bytes, rel=0.1)

    with running(
        cluster__ranks=2,
        engine__deterministic=deterministic,
        engine__map_experts=maps,
        engine__kv_memory="12MiB",
    ) as service:
        service.run(scenario(service.head))
