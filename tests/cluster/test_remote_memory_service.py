"""Ranks of different machines copy experts and KV over NIXL, and no answer differs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator

import msgspec
import pytest
from support.service import Service, active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.processes import transport
from flexpert.engine import rank_protocol as msg

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
        reason="pip install 'flexpert[nixl]' to test it",
    ),
]


_decode = msg.decode_report


def _decode_without_addresses(data: bytes) -> msg.Report:
    """What ranks export cannot be opened through /proc: its addresses get lost on their way."""
    report = _decode(data)
    if isinstance(report, msg.Hello):
        return msgspec.structs.replace(report, experts=b"nowhere", kv=b"nowhere")
    return report


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """One rank, and a machine for each that comes."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(transport.msg, "decode_report", _decode_without_addresses)
    with running(
        cluster__ranks=1,
        cluster__exchange_timeout=3.0,
        engine__transport="nixl",
        engine__deterministic=True,
        engine__kv_memory="32MiB",
    ) as service:
        yield service


def test_experts_come_and_kv_goes_between_machines(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(8, tokens=150)
        expected = await answer_all(head, work, clients=8)
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        await asyncio.sleep(0.1)
        grown = await change(head, ranks=2)
        assert grown.state == "done"
        assert grown.copied_experts > 0
        assert await traffic == expected
        for leaver in (1, 0):
            traffic = asyncio.create_task(answer_all(head, work, clients=8))
            await until(lambda: all(rank.running for rank in head.cluster().ranks))
            done = await change(head, remove=[leaver])
            assert done.state == "done"
            assert done.copied_experts > 0
            assert done.moved_with_kv == done.moved_requests > 0
            assert done.recomputed_tokens == 0
            assert await traffic == expected
            assert active(head) == {1 - leaver}
            if leaver:
                assert (await change(head, ranks=2)).copied_experts > 0

    service.run(scenario(service.head))


@pytest.mark.parametrize("delay_s", [0.0, 0.03, 0.1])
def test_a_leaver_that_is_killed_while_it_is_read_costs_no_answer(
    service: Service, delay_s: float
) -> None:
    async def scenario(head: Head) -> None:
        work = requests(8, tokens=150)
        expected = await answer_all(head, work, clients=8)
        assert (await change(head, ranks=2)).state == "done"
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        await until(lambda: all(rank.running for rank in head.cluster().ranks))
        pids = {rank.id: rank.pid for rank in head.cluster().ranks}
        removal = asyncio.create_task(change(head, remove=[1]))
        await asyncio.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(pids[1], signal.SIGKILL)
        await removal
        assert await traffic == expected
        await until(lambda: active(head))
        assert (await change(head, ranks=2)).state == "done"
        assert await answer_all(head, work, clients=8) == expected

    service.run(scenario(service.head))
