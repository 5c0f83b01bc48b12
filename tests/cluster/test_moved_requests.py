"""Requests move with their KV, experts come from peers' memory, and no answer differs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise

import httpx
import psutil
import pytest
from support.collector import Collector, told
from support.service import Service, active, answer_all, change, requests, running, until

from flexpert.cluster.head import Head
from flexpert.cluster.views import OperationView
from flexpert.config import load_config
from flexpert.engine.request import SamplingParams
from flexpert.server.app import create_app
from flexpert.server.tracing.otlp_export import OtlpExport
from flexpert.server.tracing.service_tracing import ServiceTracing

pytestmark = pytest.mark.slow
SETTINGS = {"engine__deterministic": True, "engine__kv_memory": "32MiB"}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(cluster__ranks=4, **SETTINGS) as service:
        yield service


def everywhere(head: Head, count: int) -> bool:
    ranks = head.cluster().ranks
    return sum(rank.running for rank in ranks) == count and all(rank.running for rank in ranks)


def test_four_to_one_with_long_answers_computes_nothing_again(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(16, tokens=200)
        expected = await answer_all(head, work, clients=16)
        traffic = asyncio.create_task(answer_all(head, work, clients=16))
        await until(lambda: everywhere(head, 16))
        done = await change(head, ranks=1)
        assert done.state == "done"
        assert done.moved_requests == done.moved_with_kv == 12
        assert done.recomputed_tokens == 0
        assert done.moved_kv_bytes > 0
        assert "migrate" in done.phases
        assert await traffic == expected
        text = head.registry
        assert text.get_sample_value("flexpert_moved_with_kv_total") == 12
        assert text.get_sample_value("flexpert_recomputed_tokens_total") == 0
        assert (await change(head, ranks=4)).state == "done"

    service.run(scenario(service.head))


def test_newcomers_take_over_what_all_who_leave_have_computed(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=500)  # they outlast the start of two processes
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: everywhere(head, 12))
        done = await change(head, add=2, remove=sorted(active(head)))
        assert done.state == "done"
        assert done.moved_with_kv == done.moved_requests == 12
        assert done.recomputed_tokens == 0
        assert await traffic == expected
        assert (await change(head, ranks=4)).state == "done"

    service.run(scenario(service.head))


def test_a_shared_prefix_moves_once(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=2)
        prefix = [(13 * i) % 3000 + 10 for i in range(960)]
        work = [
            ([*prefix, number + 5], SamplingParams(temperature=0, max_tokens=900, ignore_eos=True))
            for number in range(8)
        ]
        block = head.info.host.kv // head.info.kv_blocks
        expected = await answer_all(head, work, clients=8)
        await change(head, add=1, remove=[max(active(head))])  # a rank that knows no prefix
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) == 8)
        done = await change(head, add=1, remove=sorted(active(head)))
        assert done.moved_with_kv == 8
        # 60 blocks of the prefix from either rank at most, and no more of the requests' own than
        # there are by now; 8 times 60 otherwise
        (rank,) = (rank for rank in head.cluster().ranks if rank.running)
        held = round(rank.kv_used * head.info.kv_blocks)
        assert done.moved_kv_bytes <= (60 + held + 8) * block
        assert await traffic == expected
        assert (await change(head, ranks=4)).state == "done"

    service.run(scenario(service.head))


def test_more_requests_than_may_run_wait_with_their_kv() -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=150)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: everywhere(head, 12))
        done = await change(head, ranks=1)
        assert done.state == "done"
        assert done.moved_with_kv == done.moved_requests == 6
        assert done.recomputed_tokens == 0
        assert await traffic == expected
        await until(lambda: all(rank.kv_used == 0 for rank in head.cluster().ranks))

    with running(cluster__ranks=2, **SETTINGS, engine__max_running=6) as service:
        service.run(scenario(service.head))


def test_without_room_requests_are_computed_again_and_said_so() -> None:
    async def scenario(head: Head) -> None:
        work = [
            (prompt, SamplingParams(temperature=0, max_tokens=120, ignore_eos=True))
            for prompt, _ in requests(12)
        ]
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        # together they hold more than one cache has room for
        await until(lambda: sum(rank.kv_used for rank in head.cluster().ranks) > 1.2)
        done = await change(head, ranks=1)
        assert done.state == "done"
        assert done.recomputed_tokens > 0
        assert await traffic == expected

    small = {**SETTINGS, "engine__kv_memory": "1MiB", "engine__max_running": 4}
    with running(cluster__ranks=2, **small) as service:
        service.run(scenario(service.head))


@pytest.mark.parametrize("victim", ["leaver", "destination"])
def test_a_rank_that_dies_while_kv_moves_costs_no_answer(service: Service, victim: str) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=3)
        work = requests(12, tokens=150)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: everywhere(head, 12))
        leaver, destination = max(active(head)), min(active(head))
        pid = {rank.id: rank.pid for rank in head.cluster().ranks}
        operation = head.begin_operation(remove=[leaver])

        async def listen() -> None:
            async for event in head.events():
                if event.kind == "operation" and event.data["phase"] == "migrate":
                    psutil.Process(pid[leaver if victim == "leaver" else destination]).kill()
                    return

        listening = asyncio.create_task(listen())
        await asyncio.wait_for(listening, 20)
        await head.wait_operation(operation.id)
        assert await traffic == expected
        await until(lambda: active(head) == set(head.cluster().desired))
        assert (await change(head, ranks=4)).state == "done"

    service.run(scenario(service.head))


def test_a_change_cancelled_while_kv_moves_leaves_everything_as_it_was(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=3)
        work = requests(12, tokens=150)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: everywhere(head, 12))
        before = head.cluster()
        operation = head.begin_operation(ranks=1)

        async def cancel() -> None:
            async for event in head.events():
                if event.kind == "operation" and event.data["phase"] == "migrate":
                    head.cancel_operation(operation.id)
                    return

        await asyncio.wait_for(cancel(), 20)
        assert (await head.wait_operation(operation.id)).state == "cancelled"
        assert head.cluster().epoch == before.epoch
        assert await traffic == expected
        await until(lambda: all(rank.kv_used == 0 for rank in head.cluster().ranks))
        assert (await change(head, ranks=1)).state == "done"
        assert (await change(head, ranks=4)).state == "done"

    service.run(scenario(service.head))


def test_newcomers_copy_experts_from_peers_and_survivors_read_what_nobody_has(
    service: Service,
) -> None:
    async def scenario(head: Head) -> None:
        await change(head, ranks=2)
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        grown = await change(head, ranks=4)
        assert grown.moved_experts == grown.copied_experts > 0
        loss: asyncio.Future[dict[str, object]] = asyncio.get_running_loop().create_future()

        async def listen() -> None:
            async for event in head.events():
                if event.kind == "operation" and event.data["state"] == "done":
                    loss.set_result(event.data)
                    return

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        psutil.Process(next(r.pid for r in head.cluster().ranks if r.id == 1)).kill()
        done = await asyncio.wait_for(loss, 20)
        await listening
        assert done["moved_experts"] == grown.moved_experts // 2
        assert done["copied_experts"] == 0, "only the dead rank had them"
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2, 3})

    service.run(scenario(service.head))


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def test_the_trace_of_a_request_that_moves_arrives_whole(
    service: Service, collector: Collector
) -> None:
    trace_id, caller = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    url = load_config(
        environment={}, overrides={"server.otlp_traces_endpoint": collector.url}
    ).server.otlp_traces_endpoint
    assert url
    export = OtlpExport(url)

    async def scenario(head: Head) -> OperationView:
        await change(head, ranks=2)
        tracing = ServiceTracing(export.provider, head.model_name, lambda: head.epoch)
        app = create_app(head, tracing=tracing)
        try:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://flexpert", timeout=60
            ) as client:
                asking = asyncio.create_task(
                    client.post(
                        "/v1/completions",
                        json={
                            "prompt": list(range(20, 60)),
                            "max_tokens": 1500,
                            "temperature": 0,
                            "ignore_eos": True,
                            "stream": True,
                        },
                        headers={"traceparent": f"00-{trace_id}-{caller}-01"},
                    )
                )
                await until(lambda: sum(rank.running for rank in head.cluster().ranks) == 1)
                ran_on = next(rank.id for rank in head.cluster().ranks if rank.running)
                done = await change(head, add=1, remove=[ran_on])
                answer = await asking
                assert answer.status_code == 200
                assert b"[DONE]" in answer.content
            return done
        finally:
            head.tracer = None
            app.state.preprocessors.close()

    done = service.run(scenario(service.head))
    service.change(ranks=4)
    export.close()
    assert collector.services == {"flexpert"}
    spans = [span for span in collector.spans if span.trace_id.hex() == trace_id]
    (request,) = [span for span in spans if span.parent_span_id.hex() == caller]
    assert request.name == "text_completion tiny"
    parts = sorted(
        (span for span in spans if span is not request), key=lambda span: span.start_time_unix_nano
    )
    assert {span.parent_span_id for span in parts} == {request.span_id}
    names = [span.name for span in parts]
    assert names == ["preprocess", "queue", "prefill", "decode", "decode"]
    for before, after in pairwise(parts[1:]):
        assert before.end_time_unix_nano == after.start_time_unix_nano
    assert request.start_time_unix_nano <= parts[0].start_time_unix_nano
    assert parts[-1].end_time_unix_nano <= request.end_time_unix_nano

    (leaver,), (newcomer,) = done.remove, done.add
    ranks = [told(span).get("flexpert.rank") for span in parts[2:]]
    assert ranks[:2] == [leaver, leaver]
    moved_to = ranks[2]
    assert moved_to != leaver
    assert sum(told(span)["flexpert.tokens"] for span in parts[2:]) == 1500
    about = told(request)
    assert about["gen_ai.usage.input_tokens"] == about["gen_ai.usage.prompt_tokens"] == 40
    assert about["gen_ai.usage.output_tokens"] == 1500
    assert about["gen_ai.request.max_tokens"] == 1500
    assert about["gen_ai.response.finish_reasons"] == ["length"]
    assert about["flexpert.ranks"] == [leaver, moved_to]
    assert about["flexpert.epochs"] == [done.epoch - 1, done.epoch]
    latencies = [about[f"gen_ai.latency.{one}"] for one in ("time_to_first_token", "e2e")]
    assert 0 < latencies[0] < latencies[1]

    events = {event.name: told(event) for event in request.events}
    assert list(events) == ["first token", "moved", "epoch began"]
    assert events["moved"]["flexpert.rank.from"] == leaver
    assert events["moved"]["flexpert.rank.to"] == moved_to
    assert events["moved"]["flexpert.operation.id"] == done.id
    assert events["moved"]["flexpert.kv_tokens"] > 40
    assert events["moved"]["flexpert.tokens_without_kv"] == 0
    assert events["epoch began"]["flexpert.pause_ms"] == pytest.approx(done.pause_ms, abs=0.01)

    (scale,) = [span for span in collector.spans if span.name == "scale"]
    assert not scale.parent_span_id
    assert told(scale)["flexpert.operation.id"] == done.id
    assert told(scale)["flexpert.ranks.after"] == done.target
    phases = [span for span in collector.spans if span.parent_span_id == scale.span_id]
    names = [span.name for span in sorted(phases, key=lambda span: span.start_time_unix_nano)]
    assert names == list(done.phases)
    assert sum(span.end_time_unix_nano - span.start_time_unix_nano for span in phases) == (
        pytest.approx(scale.end_time_unix_nano - scale.start_time_unix_nano, rel=0.01)
    )
    assert newcomer in done.target
