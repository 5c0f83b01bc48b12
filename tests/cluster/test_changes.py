"""Promises 1, 3, 5 on real ranks: nothing is lost, nothing differs, failed changes are undone."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.service import Answer, Service, active, answer_all, change, requests, running, until

import flexpert.models
from flexpert.cluster.head import Head
from flexpert.errors import OperationConflict, OperationRefused, UnknownOperation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(
        cluster__ranks=2, engine__deterministic=True, engine__kv_memory="32MiB"
    ) as service:
        yield service


CHANGES = [
    {"ranks": 4},
    {"remove": [1]},  # by place, see `named`
    {"ranks": 1},
    {"add": 1, "remove": [0]},
    {"ranks": 3},
    {"remove": [0]},
    {"add": 2},
    {"add": 1, "remove": [2]},
    {"ranks": 5},
    {"ranks": 2},
]


def named(head: Head, target: dict[str, Any]) -> dict[str, Any]:
    """A change of `CHANGES`, where places among the ranks there are stand for what is removed."""
    here = sorted(active(head))
    return {**target, "remove": [here[place] for place in target.get("remove", ())]}


async def bring_to(head: Head, ids: set[int]) -> None:
    """Have just these ranks, whichever an earlier test has left."""
    while (have := active(head)) != ids:
        target = {"add": len(ids - have), "remove": sorted(have - ids)}
        assert (await change(head, **target)).state == "done"


@pytest.mark.timeout(300)
def test_answers_are_identical_through_ten_changes_under_load(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(200)
        undisturbed = await answer_all(head, work, clients=16)
        disturbed = asyncio.create_task(answer_all(head, work, clients=16))
        for number, target in enumerate(CHANGES):
            done = await change(head, **named(head, target))
            assert done.state == "done", (number, done)
            assert sorted(rank.id for rank in head.cluster().ranks) == done.target
            await asyncio.sleep(0.1)
        answers = await disturbed
        for number, (before, after) in enumerate(zip(undisturbed, answers, strict=True)):
            assert before.finish == after.finish == "length"
            assert before.tokens == after.tokens, f"request {number} differs"

    service.run(scenario(service.head), timeout_s=280)


def test_mapped_experts_serve_the_same_answers_through_changes_and_a_kill(
    service: Service,
) -> None:
    work = requests(48)

    async def undisturbed(head: Head) -> list[Answer]:
        return await answer_all(head, work, clients=16)

    async def scenario(head: Head) -> list[Answer]:
        answers = asyncio.create_task(answer_all(head, work, clients=16))
        for target in ({"ranks": 3}, {"add": 1, "remove": [0]}, {"ranks": 2}):
            done = await change(head, **target)
            assert done.state == "done", done
            assert done.moved_experts > done.copied_experts == 0
        os.kill(next(rank.pid for rank in head.cluster().ranks), signal.SIGKILL)
        found = await answers
        await until(lambda: len(active(head)) == 2)
        assert await answer_all(head, work, clients=16) == found
        return found

    expected = service.run(undisturbed(service.head))
    with running(
        cluster__ranks=2,
        engine__deterministic=True,
        engine__kv_memory="32MiB",
        engine__map_experts="on",
    ) as mapped:
        assert mapped.run(scenario(mapped.head)) == expected


def test_a_newcomer_killed_while_it_loads_is_undone_and_traffic_does_not_notice(
    service: Service,
) -> None:
    async def scenario(head: Head) -> None:
        await bring_to(head, {0, 1})
        work = requests(16)
        expected = await answer_all(head, work, clients=8)
        traffic = asyncio.create_task(answer_all(head, work, clients=8))
        before = head.cluster()
        operation = head.begin_operation(ranks=3)
        await until(lambda: any(r.pid and r.id == 2 for r in head.cluster().ranks))
        victim = next(r.pid for r in head.cluster().ranks if r.id == 2)
        os.kill(victim, signal.SIGKILL)
        failed = await head.wait_operation(operation.id)
        assert failed.state == "failed"
        assert failed.error
        assert "rank 2" in failed.error  # its end, or the peer that could not reach it
        after = head.cluster()
        assert after.epoch == before.epoch
        assert after.placement == before.placement
        assert [r.id for r in after.ranks] == [0, 1]
        assert await traffic == expected
        assert (await change(head, ranks=3)).state == "done"

    service.run(scenario(service.head))


def test_a_cancelled_change_leaves_everything_as_it_was(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await bring_to(head, {0, 1})
        operation = head.begin_operation(ranks=4)
        assert head.begin_operation(ranks=4).id == operation.id, "the same target again"
        with pytest.raises(OperationConflict, match="is running"):
            head.begin_operation(ranks=3)
        head.cancel_operation(operation.id)
        cancelled = await head.wait_operation(operation.id)
        assert cancelled.state == "cancelled"
        assert [r.id for r in head.cluster().ranks] == [0, 1]
        assert head.cluster().operation is None
        with pytest.raises(OperationConflict, match="is over"):
            head.cancel_operation(operation.id)
        assert (await change(head, ranks=4)).state == "done"
        assert (await change(head, ranks=2)).state == "done"

    service.run(scenario(service.head))


def test_impossible_targets_are_refused_at_once(service: Service) -> None:
    async def scenario(head: Head) -> None:
        with pytest.raises(OperationRefused, match="capacity of 8"):
            head.begin_operation(ranks=9)
        with pytest.raises(UnknownOperation):
            head.operation("op-nope")
        same = head.begin_operation(ranks=len(head.cluster().ranks))
        assert same.state == "done"

    service.run(scenario(service.head))


def test_a_client_that_goes_away_frees_its_sequence(service: Service) -> None:
    async def scenario(head: Head) -> None:
        prompt, params = requests(1, tokens=1000)[0]
        stream = head.submit(prompt, params)
        async for _ in stream:
            break
        stream.cancel()
        prompt, params = requests(1, tokens=5)[0]
        await answer_all(head, [(prompt, params)] * 4, clients=4)
        await until(lambda: all(r.running == 0 for r in head.cluster().ranks))

    service.run(scenario(service.head))


def test_a_deadline_that_passes_in_prepare_undoes_the_change(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await bring_to(head, {0, 1})
        operation = head.begin_operation(ranks=3)
        await until(lambda: any(r.pid and r.id == 2 for r in head.cluster().ranks))
        newcomer = next(r.pid for r in head.cluster().ranks if r.id == 2)
        os.kill(newcomer, signal.SIGSTOP)
        head._need_coordinator()._clock.expire()  # the clock is the coordinator's own
        failed = await head.wait_operation(operation.id)
        assert failed.state == "failed"
        assert failed.error
        assert "deadline passed in" in failed.error
        assert [r.id for r in head.cluster().ranks] == [0, 1]
        assert (await change(head, ranks=3)).state == "done"

    service.run(scenario(service.head))


def test_a_changed_checkpoint_file_fails_the_change_and_not_the_service(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(Path(flexpert.models.__path__[0]) / "tiny", model)
    weights = model / "model.safetensors"

    async def scenario(head: Head) -> None:
        work = requests(8)
        expected = await answer_all(head, work, clients=8)
        written = weights.stat()
        os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns + 1))
        for target in ({"ranks": 3}, {"ranks": 1}):
            failed = await change(head, **target)
            assert failed.state == "failed"
            assert failed.error
            assert "model.safetensors" in failed.error
            assert [r.id for r in head.cluster().ranks] == [0, 1]
        assert await answer_all(head, work, clients=8) == expected
        os.utime(weights, ns=(written.st_atime_ns, written.st_mtime_ns))
        weights.rename(tmp_path / "away")  # which the service has opened: it goes on with it
        for target in ({"ranks": 3}, {"ranks": 1}):
            assert (await change(head, **target)).state == "done"
        assert await answer_all(head, work, clients=8) == expected

    with running(
        model__model=str(model),
        cluster__ranks=2,
        engine__deterministic=True,
        engine__kv_memory="32MiB",
    ) as service:
        service.run(scenario(service.head))


def test_a_killed_member_costs_no_request_and_changes_none(service: Service) -> None:
    async def scenario(head: Head) -> None:
        await bring_to(head, {0, 1, 2, 3})
        work = requests(32, tokens=60)
        expected = await answer_all(head, work, clients=16)
        for victim in (1, 3):
            traffic = asyncio.create_task(answer_all(head, work, clients=16))
            await until(lambda: sum(r.running for r in head.cluster().ranks) >= 8)
            members = {r.id: r.pid for r in head.cluster().ranks}
            os.kill(members[victim], signal.SIGKILL)
            assert await traffic == expected
            await until(lambda: active(head) == {0, 1, 2, 3})
            assert {r.id: r.pid for r in head.cluster().ranks}[victim] != members[victim]
        assert head.cluster().desired == [0, 1, 2, 3]

    service.run(scenario(service.head))


def test_a_stopped_member_is_ended_and_costs_no_request() -> None:
    async def scenario(head: Head) -> None:
        work = requests(24, tokens=60)
        expected = await answer_all(head, work, clients=12)
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(r.running for r in head.cluster().ranks) >= 6)
        os.kill(head.cluster().ranks[1].pid, signal.SIGSTOP)
        assert await traffic == expected
        await until(lambda: active(head) == {0, 1, 2})

    with running(
        cluster__ranks=3,
        cluster__exchange_timeout=1.0,
        cluster__stall_timeout=0.5,
        engine__deterministic=True,
        engine__kv_memory="32MiB",
    ) as service:
        service.run(scenario(service.head))


def test_sizes_that_cannot_hold_the_model_are_refused_with_the_reason() -> None:
    async def scenario(head: Head) -> None:
        with pytest.raises(OperationRefused, match=r"1 ranks cannot hold the experts: .*80 MiB"):
            head.begin_operation(ranks=1)
        assert (await change(head, ranks=3)).state == "done"

    with running(
        cluster__ranks=4, cluster__memory_per_rank="80MiB", engine__kv_memory="4MiB"
    ) as service:
        service.run(scenario(service.head))
    with (
        pytest.raises(OperationRefused, match=r"need .* MiB but .* MiB of memory are free"),
        running(cluster__ranks=2, engine__kv_memory="1000GiB"),
    ):
        pass
