"""GPU ranks of several machines: what the kernels exchange goes over NIXL, by way of the hosts.

Without a GPU in Triton's interpreter; on one, where each rank needs its own or MPS, with `make
test-gpu`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.comm_ranks import LIMIT_S, Rank, random_sent, vote
from support.cuda_local import DEVICE
from support.gpu_exchanges import exchanges, placed

from flexpert.comm import Buffer, BufferSpec, RankLost, RankTimeout
from flexpert.comm.buffer import Reduce, Scales

HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_NIXL, reason="pip install 'flexpert[nixl]' to test it"),
]

ON_GPU = DEVICE == "cuda"
# the interpreter takes a second for what a GPU does in microseconds
SPEC = (
    BufferSpec(4, 32, 512, 4, torch.bfloat16)
    if ON_GPU
    else BufferSpec(4, 6, 128, 3, torch.bfloat16)
)


class Meeting:
    """Ranks that meet through a store. "far": each on a machine of its own; "mixed": 0 and 1 on
    one, the others on another."""

    def __init__(self, machines: str, ids: tuple[int, ...], **options: Any) -> None:
        self.machines = machines
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.options = options
        self.ranks: dict[int, Rank] = {}
        self.start(ids)
        self.all(meet, sorted(ids))

    def start(self, ids: tuple[int, ...]) -> None:
        def make(rank: int) -> Rank:
            machine = str(rank if self.machines == "far" else rank // 2)
            options = {"backend": "cuda", "machine": machine, **self.options}
            return Rank(rank, SPEC, self.store.port, **options)

        with ThreadPoolExecutor(len(ids)) as pool:
            self.ranks |= dict(zip(ids, pool.map(make, ids), strict=True))

    def all(
        self, task: Callable[..., Any], *args: Any, but: tuple[int, ...] = ()
    ) -> dict[int, Any]:
        asked = {rank: r for rank, r in self.ranks.items() if rank not in but}
        for rank in asked.values():
            rank.ask(task, *args)
        return {rank: r.answer() for rank, r in asked.items()}

    def stop(self) -> None:
        for rank in self.ranks.values():
            rank.kill()


# ---- tasks of the ranks -------------------------------------------------------------------------


def meet(buffer: Buffer, ids: list[int]) -> dict[int, str]:
    buffer.connect(ids, timeout_s=LIMIT_S)
    return {peer: buffer.channel(peer) for peer in buffer.connected}


def begin(buffer: Buffer, ids: tuple[int, ...], epoch: int) -> None:
    buffer.set_active(ids, epoch)
    vote(buffer)


def fails(buffer: Buffer, ids: tuple[int, ...]) -> tuple[str, float]:
    """An exchange in which a peer takes no part: what it raises, and after how long."""
    s = placed(random_sent(buffer.spec, ids, 3)[buffer.rank])
    began = time.monotonic()
    with pytest.raises((RankLost, RankTimeout)) as raised:
        buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    return str(raised.value), time.monotonic() - began


def part(buffer: Buffer, ids: tuple[int, ...]) -> None:
    buffer.disconnect(ids)


# ---- the tests ----------------------------------------------------------------------------------


# the interpreter takes half a minute for each
CASES: list[tuple[str, Reduce, Scales | None]] = [
    ("far", "rank", None),
    ("mixed", "home", "power2"),
]
if ON_GPU:
    CASES += [("far", "home", None), ("far", "rank", "float32")]


@pytest.mark.parametrize(("machines", "reduce", "fp8"), CASES)
def test_ranks_of_several_machines_exchange_what_the_oracle_says(
    machines: str, reduce: Reduce, fp8: Scales | None
) -> None:
    meeting = Meeting(machines, (0, 1) if ON_GPU or machines == "far" else (0, 1, 2))
    try:
        exchange_all(meeting, reduce, fp8)
    finally:
        meeting.stop()


def exchange_all(meeting: Meeting, reduce: Reduce, fp8: Scales | None) -> None:
    ids = tuple(meeting.ranks)
    channels = meeting.all(meet, sorted(ids))
    near = {(0, 1), (1, 0)} if meeting.machines == "mixed" else set()
    for rank, known in channels.items():
        for peer, channel in known.items():
            expected = "self" if peer == rank else "shm" if (rank, peer) in near else "nixl"
            assert channel == expected
    meeting.all(begin, ids, 1)
    count = 40 if ON_GPU else 4
    assert set(meeting.all(exchanges, ids, range(count), reduce, fp8).values()) == {count}


def test_a_rank_of_another_machine_that_is_killed_is_lost_and_its_id_joins_again() -> None:
    meeting = Meeting("far", (0, 1))
    try:
        meeting.all(begin, (0, 1), 1)
        meeting.all(exchanges, (0, 1), range(2), "rank")
        meeting.ranks.pop(1).kill()
        meeting.ranks[0].ask(fails, (0, 1))
        said, took_s = meeting.ranks[0].answer()
        assert "rank 1" in said
        assert "link broken" in said
        assert took_s < LIMIT_S / 4
        meeting.all(part, (1,))
        meeting.all(begin, (0,), 2)
        meeting.all(exchanges, (0,), range(2), "rank")
        meeting.start((1,))
        meeting.all(meet, [0, 1])
        meeting.all(begin, (0, 1), 3)
        meeting.all(exchanges, (0, 1), range(4, 8), "home")
    finally:
        meeting.stop()


def test_one_that_stops_for_a_while_is_given_up_and_meets_no_old_rows() -> None:
    """What was on its way in the epoch that is over must not be taken for what is sent in the
    next."""
    meeting = Meeting("far", (0, 1), timeout_s=4.0 if ON_GPU else 0.5)
    try:
        meeting.all(begin, (0, 1), 1)
        meeting.all(exchanges, (0, 1), range(2), "rank")
        pid = meeting.ranks[1].process.pid
        assert pid
        for epoch in range(2, 5 if ON_GPU else 3):
            os.kill(pid, signal.SIGSTOP)
            meeting.ranks[0].ask(leaves_half, (0, 1))
            assert "rank 1 did not answer" in meeting.ranks[0].answer()
            os.kill(pid, signal.SIGCONT)
            meeting.all(begin, (0, 1), epoch)
            meeting.all(exchanges, (0, 1), range(10 * epoch, 10 * epoch + 4), "rank")
    finally:
        meeting.stop()


def leaves_half(buffer: Buffer, ids: tuple[int, ...]) -> str:
    s = placed(random_sent(buffer.spec, ids, 77)[buffer.rank])
    with pytest.raises(RankTimeout) as raised:
        buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    return str(raised.value)
