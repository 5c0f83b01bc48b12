"""Ranks that meet through a store, over shared memory, NIXL, or both at once."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.comm_local import applied, check_received, masked_ids, same_bits
from support.comm_ranks import LIMIT_S, Rank, apply_experts, random_sent, spec_of

from flexpert.comm import Buffer, RankLost, RankTimeout
from flexpert.comm.routing import Sent

pytestmark = pytest.mark.slow

HAS_NIXL = any(importlib.util.find_spec(f"nixl_cu{cuda}") for cuda in (12, 13))
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason="pip install 'flexpert[nixl]' to test it")
CHANNELS = ["shm", pytest.param("nixl", marks=needs_nixl), pytest.param("both", marks=needs_nixl)]


class Meeting:
    """Rank processes that meet through a store. "both": even ids on one machine, odd on another."""

    def __init__(self, channel: str, **options: Any) -> None:
        self.channel = channel
        self.options = options
        self.spec = spec_of(6, hidden=256)
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks: dict[int, Rank] = {}

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks.values():
            rank.kill()

    def start(self, ids: Iterable[int]) -> None:
        for rank in ids:
            options = dict(self.options)
            if self.channel == "both":
                options["machine"] = f"machine {rank % 2}"
            else:
                options["channel"] = self.channel
            self.ranks[rank] = Rank(rank, self.spec, self.store.port, **options)

    def all(self, task: Callable[..., Any], *args: Any) -> dict[int, Any]:
        for rank in self.ranks.values():
            rank.ask(task, *args)
        return {rank: r.answer() for rank, r in self.ranks.items()}

    def stop(self, rank: int) -> Rank:
        pid = self.ranks[rank].process.pid
        assert pid
        os.kill(pid, signal.SIGSTOP)
        return self.ranks.pop(rank)


@pytest.fixture(params=CHANNELS)
def channel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---- tasks of the ranks -------------------------------------------------------------------------


def meet(buffer: Buffer, ids: list[int]) -> dict[int, str]:
    buffer.connect(ids, activate=True)
    return {peer: buffer.channel(peer) for peer in buffer.connected}


def part(buffer: Buffer, ids: list[int]) -> tuple[int, ...]:
    buffer.disconnect(ids)
    return buffer.connected


def exchanges(buffer: Buffer, ids: tuple[int, ...], seeds: range) -> None:
    for seed in seeds:
        sent = random_sent(buffer.spec, ids, seed)
        s = sent[buffer.rank]
        got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
        check_received(got, sent, buffer.rank)
        reduce = "rank" if seed % 2 else "home"
        out = buffer.combine(apply_experts(got.x, got.offsets), got, reduce=reduce)  # type: ignore[arg-type]
        assert same_bits(out, applied(s, reduce))
        assert buffer.missing_results(got) is None


def votes(buffer: Buffer, rounds: int) -> None:
    for number in range(rounds):
        seen = buffer.barrier(bytes([buffer.rank, number]), timeout_s=LIMIT_S)
        assert seen == {rank: bytes([rank, number]) for rank in buffer.active}


def loses(
    buffer: Buffer, ids: tuple[int, ...], gone: int, seed: int, timeout_s: float
) -> tuple[float, tuple[int, ...], dict[int, str]]:
    """One exchange in which `gone` does not take part; seconds until it is masked."""
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    began = time.monotonic()
    got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, timeout_s=timeout_s)
    took = time.monotonic() - began
    out = buffer.combine(apply_experts(got.x, got.offsets), got, timeout_s=timeout_s)
    left = Sent(s.x, masked_ids(s, set(ids) - {gone}), s.weights, s.table)
    assert same_bits(out, applied(left, "rank"))
    missing = buffer.missing_results(got)
    assert missing is None or missing.ranks == (gone,)
    return took, buffer.active, buffer.lost


def fails(buffer: Buffer, ids: tuple[int, ...], seed: int) -> tuple[str, tuple[int, ...]]:
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    try:
        buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    except (RankLost, RankTimeout) as error:
        return type(error).__name__, error.ranks
    raise AssertionError("the dispatch was whole")


def fp8(buffer: Buffer, ids: tuple[int, ...], seed: int) -> bool:
    s = random_sent(buffer.spec, ids, seed)[buffer.rank]
    got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, fp8="float32")
    quantised = got.x.dtype is torch.float8_e4m3fn
    buffer.combine(buffer.combine_input(got).zero_(), got)
    return quantised


# ---- tests --------------------------------------------------------------------------------------


def test_ranks_come_and_go_over_any_channel(channel: str) -> None:
    with Meeting(channel) as meeting:
        meeting.start([0, 2, 3])
        told = meeting.all(meet, [0, 2, 3])
        if channel == "both":
            assert told[0] == {0: "self", 2: "shm", 3: "nixl"}
        else:
            assert told[0] == {0: "self", 2: channel, 3: channel}
        meeting.all(exchanges, (0, 2, 3), range(5))
        meeting.all(votes, 3)
        meeting.start([1])
        meeting.all(meet, [0, 1, 2, 3])
        meeting.all(exchanges, (0, 1, 2, 3), range(5, 9))
        meeting.all(fp8, (0, 1, 2, 3), 20)
        gone = meeting.ranks.pop(0)
        assert set(meeting.all(part, [0]).values()) == {(1, 2, 3)}
        meeting.all(exchanges, (1, 2, 3), range(9, 12))
        gone.kill()


def test_a_killed_rank_is_masked_long_before_the_limit(channel: str) -> None:
    with Meeting(channel, on_timeout="mask") as meeting:
        meeting.start(range(4))
        meeting.all(meet, [0, 1, 2, 3])
        meeting.all(exchanges, (0, 1, 2, 3), range(2))
        meeting.ranks.pop(1).kill()
        for took, active, lost in meeting.all(loses, (0, 1, 2, 3), 1, 7, LIMIT_S).values():
            assert took < LIMIT_S / 2
            assert active == (0, 2, 3)
            assert set(lost) == {1}
        meeting.all(part, [1])
        meeting.start([1])  # under the same id
        meeting.all(meet, [0, 1, 2, 3])
        meeting.all(exchanges, (0, 1, 2, 3), range(10, 13))


def test_a_killed_rank_ends_the_exchange_of_those_who_want_that(channel: str) -> None:
    with Meeting(channel) as meeting:
        meeting.start(range(3))
        meeting.all(meet, [0, 1, 2])
        meeting.all(exchanges, (0, 1, 2), range(2))
        meeting.ranks.pop(2).kill()
        told = meeting.all(fails, (0, 1, 2), 5)
        assert told == {0: ("RankLost", (2,)), 1: ("RankLost", (2,))}


def test_a_stopped_rank_is_masked_and_its_id_goes_to_another(channel: str) -> None:
    """It wakes while the one with its id exchanges, and changes nothing."""
    with Meeting(channel, on_timeout="mask") as meeting:
        meeting.start(range(3))
        meeting.all(meet, [0, 1, 2])
        meeting.all(exchanges, (0, 1, 2), range(3))
        old = meeting.stop(2)
        old.ask(loses_everybody, (0, 1, 2), 6)
        for took, active, _ in meeting.all(loses, (0, 1, 2), 2, 6, 0.5).values():
            assert took >= 0.5
            assert active == (0, 1)
        meeting.all(part, [2])
        meeting.start([2])
        meeting.all(meet, [0, 1, 2])
        meeting.all(exchanges, (0, 1, 2), range(20, 23))
        pid = old.process.pid
        assert pid
        os.kill(pid, signal.SIGCONT)
        meeting.all(exchanges, (0, 1, 2), range(23, 40))
        assert old.answer() == (2,)
        meeting.all(exchanges, (0, 1, 2), range(40, 43))
        old.kill()


def loses_everybody(buffer: Buffer, ids: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """What a rank finds that was stopped while the others went on without it."""
    for number in range(3):
        s = random_sent(buffer.spec, ids, seed + number)[buffer.rank]
        got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table, timeout_s=0.2)
        buffer.combine(apply_experts(got.x, got.offsets), got, timeout_s=0.2)
    return buffer.active


def test_ids_need_a_store_and_those_who_do_not_come_are_named() -> None:
    with Meeting("shm") as meeting:
        meeting.start([0, 1])
        for rank in (0, 1):
            meeting.ranks[rank].ask(meets_in_vain, [0, 1, 4])
        assert [meeting.ranks[rank].answer() for rank in (0, 1)] == [((4,), (0, 1))] * 2


def meets_in_vain(buffer: Buffer, ids: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    try:
        buffer.connect(ids, timeout_s=1.0)
    except RankTimeout as error:
        return error.ranks, buffer.connected
    raise AssertionError("somebody came")


@needs_nixl
def test_channels_that_do_not_fit_are_refused() -> None:
    with Meeting("shm") as meeting:
        meeting.start([0])
        meeting.channel = "nixl"
        meeting.start([1])
        for rank in (0, 1):
            meeting.ranks[rank].ask(quarrels, [0, 1])
        told = [meeting.ranks[rank].answer() for rank in (0, 1)]
        assert any("wants channel" in text for text in told)


def quarrels(buffer: Buffer, ids: list[int]) -> str:
    try:
        buffer.connect(ids, timeout_s=3.0)
    except (ValueError, RankTimeout) as error:
        return str(error)
    return ""
