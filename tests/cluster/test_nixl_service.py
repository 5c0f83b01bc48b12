"""A service whose ranks reach each other over NIXL, as those of several hosts do."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib.util
import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import generate_latest
from support.service import Service, active, answer_all, change, requests, running, until

from flexpert.cluster import head as head_module
from flexpert.cluster.head import Head
from flexpert.cluster.processes.rank_spec import RankSpec
from flexpert.engine.request import SamplingParams

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("nixl_cu13", "nixl_cu12"))),
        reason="pip install 'flexpert[nixl]' to test it",
    ),
]
SETTINGS = {"engine__deterministic": True, "engine__kv_memory": "32MiB"}


def _spec_of_two_machines(rank: int, config: str, *rest: Any) -> RankSpec:
    """Even ranks are on machine a, odd ones on b."""
    settings = json.loads(config)
    settings["engine"]["machine"] = "ab"[rank % 2]
    return RankSpec(rank, json.dumps(settings), *rest)


_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def _cut_connections(pid: int) -> int:
    """Shut every TCP connection of a process down, which lives on; how many there were."""
    pidfd, cut = os.pidfd_open(pid), 0
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            copy = _libc.syscall(_PIDFD_GETFD, pidfd, int(name), 0)
            if copy < 0 and ctypes.get_errno() == errno.EPERM:
                pytest.skip("this user may not take descriptors of other processes")
            if copy >= 0:
                cut += _shut_down(copy)
    finally:
        os.close(pidfd)
    return cut


def _shut_down(descriptor: int) -> bool:
    """Whether it was a connection over TCP. Closes the descriptor."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:  # it is no socket
        os.close(descriptor)
        return False
    with connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False  # who is cut off can be reached again
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is not connected
            return False
    return True


@pytest.fixture(params=["nixl", "two machines"])
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Two ranks: all pairs use NIXL, or those of different machines."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    if request.param == "two machines":
        monkeypatch.setattr(head_module, "RankSpec", _spec_of_two_machines)
        settings = {}
    else:
        settings = {"engine__transport": "nixl"}
    with running(
        cluster__ranks=2, cluster__exchange_timeout=3.0, **SETTINGS, **settings
    ) as service:
        yield service


def assert_links_follow_the_names(head: Head) -> None:
    ranks = head.cluster().ranks
    far = {r.id: [p.id for p in ranks if p.machine != r.machine] for r in ranks}
    assert {rank.id: rank.over_nixl for rank in ranks} == far
    assert any(far.values())


def test_ranks_come_and_go_and_one_is_killed_while_answers_stay_the_same(
    service: Service,
) -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=60)
        expected = await answer_all(head, work, clients=12)
        for ranks in (4, 3):
            traffic = asyncio.create_task(answer_all(head, work, clients=12))
            await asyncio.sleep(0.1)
            assert (await change(head, ranks=ranks)).state == "done"
            assert await traffic == expected
        machines = {rank.machine for rank in head.cluster().ranks}
        assert len(machines) == (2 if machines == {"a", "b"} else 3)
        assert_links_follow_the_names(head)
        before = {rank.id: rank.pid for rank in head.cluster().ranks}
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 6)
        os.kill(before[1], signal.SIGKILL)
        assert await traffic == expected
        await until(lambda: active(head) == set(before))
        assert next(r.pid for r in head.cluster().ranks if r.id == 1) != before[1]
        assert await answer_all(head, work, clients=12) == expected
        assert_links_follow_the_names(head)

    service.run(scenario(service.head))


def test_a_link_that_is_cut_between_ranks_that_live_costs_one_of_them(service: Service) -> None:
    async def scenario(head: Head) -> None:
        work = requests(12, tokens=120)
        expected = await answer_all(head, work, clients=12)
        before = {rank.id: rank.pid for rank in head.cluster().ranks}
        epoch = head.cluster().epoch
        traffic = asyncio.create_task(answer_all(head, work, clients=12))
        await until(lambda: sum(rank.running for rank in head.cluster().ranks) >= 6)
        assert _cut_connections(before[0]) > 0
        assert await traffic == expected
        await until(lambda: active(head) == set(before))
        now = {rank.id: rank.pid for rank in head.cluster().ranks}
        assert sum(now[rank] != before[rank] for rank in before) == 1
        assert head.cluster().epoch <= epoch + 20, "it does not go on recovering"
        assert_links_follow_the_names(head)

    service.run(scenario(service.head))


def _between_machines(head: Head) -> int:
    """Bytes that ranks of different names, as `_spec_of_two_machines` gives them, have written."""
    return sum(
        count
        for rank in head.cluster().ranks
        for peer, count in rank.wire_bytes.items()
        if peer % 2 != rank.id % 2
    )


async def _bytes_of_requests(head: Head) -> int:
    prompt = [(17 * place) % 3000 + 10 for place in range(128)]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    work = [([number + 10, *prompt], params) for number in range(8)]
    before = _between_machines(head)
    await answer_all(head, work, clients=8)
    written, known = 0, -1
    while written != known:  # ranks tell with their beats
        known = written
        await asyncio.sleep(0.5)
        written = _between_machines(head) - before
    return written


def test_a_token_goes_to_a_machine_once_as_the_service_itself_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4 ranks on 2 machines, against each rank on a machine of its own: one row a rank."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(head_module, "RankSpec", _spec_of_two_machines)
    written = {}
    for transport in ("auto", "nixl"):
        with running(
            cluster__ranks=4,
            cluster__exchange_timeout=20.0,
            engine__kv_memory="32MiB",
            engine__prefix_cache=False,
            engine__transport=transport,
        ) as service:
            written[transport] = service.run(_bytes_of_requests(service.head))
            metrics = generate_latest(service.head.registry).decode()
        assert 'flexpert_rank_wire_bytes{peer="1",rank="0"}' in metrics
    assert 0 < written["auto"] < 0.75 * written["nixl"]
