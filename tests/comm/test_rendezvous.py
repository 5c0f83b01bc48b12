"""Meeting through a store: any order, stale keys, and ranks that never come."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from flexpert.comm import CommError, PeerUnreachable, RankTimeout
from flexpert.comm.errors import ChannelDown
from flexpert.comm.rendezvous import meet

LIMIT_S = 30.0


@dataclass
class Fake:
    """A host that writes down what it is asked; `name` tells one life of a rank from another."""

    rank: int
    name: str
    dead: set[str] = field(default_factory=set)
    prepared: dict[int, str] = field(default_factory=dict)
    opened: dict[int, str] = field(default_factory=dict)
    forgotten: list[int] = field(default_factory=list)

    def greet(self) -> bytes:
        return self.name.encode()

    def prepare(self, peer: int, greeting: bytes) -> bytes:
        if greeting.decode() in self.dead:
            raise PeerUnreachable("gone")
        if greeting == b"odd":
            raise ValueError("another spec")
        self.prepared[peer] = greeting.decode()
        return f"{self.name} for {greeting.decode()}".encode()

    def open(self, peer: int, details: bytes) -> None:
        self.opened[peer] = details.decode()

    def forget(self, peer: int) -> None:
        self.prepared.pop(peer, None)
        self.forgotten.append(peer)


def tcp() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def file() -> dist.Store:
    return dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 2)


@pytest.fixture(params=[tcp, file, dist.HashStore, lambda: dist.PrefixStore("group", tcp())])
def store(request: pytest.FixtureRequest) -> dist.Store:
    made: dist.Store = request.param()
    made.set_timeout(timedelta(seconds=2))
    return made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def test_all_meet_all_at_any_time(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    hosts = {rank: Fake(rank, f"life of {rank}") for rank in range(4)}

    def one(rank: int) -> tuple[int, ...]:
        threading.Event().wait(random.Random(rank).random() / 10)
        return meet(store, rank, range(4), hosts[rank], timeout_s=LIMIT_S)

    for rank, met in enumerate(pool.map(one, range(4))):
        assert met == tuple(sorted(set(range(4)) - {rank}))
    for rank, host in hosts.items():
        assert host.opened == {
            peer: f"life of {peer} for life of {rank}" for peer in set(range(4)) - {rank}
        }
    for a in range(4):
        for b in range(4):
            assert not store.check([f"flexpert/{a}>{b}"])


def test_subsets_in_any_order(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    hosts = {rank: Fake(rank, str(rank)) for rank in range(4)}
    plan: dict[int, list[list[int]]] = {
        0: [[1, 2, 3]],
        1: [[0], [3]],
        2: [[3], [0]],
        3: [[0], [2, 1]],
    }

    def one(rank: int) -> None:
        for peers in plan[rank]:
            meet(store, rank, peers, hosts[rank], timeout_s=LIMIT_S)

    list(pool.map(one, plan))
    assert {rank: set(host.opened) for rank, host in hosts.items()} == {
        0: {1, 2, 3},
        1: {0, 3},
        2: {0, 3},
        3: {0, 1, 2},
    }


def test_who_does_not_come_is_named_and_the_others_stay_met(
    store: dist.Store, pool: ThreadPoolExecutor
) -> None:
    zero, one = Fake(0, "0"), Fake(1, "1")
    there = pool.submit(meet, store, 1, [0], one, timeout_s=LIMIT_S)
    with pytest.raises(RankTimeout) as caught:
        meet(store, 0, [1, 2, 5], zero, timeout_s=0.5, epoch=7)
    error = caught.value
    assert (error.ranks, error.phase, error.epoch, error.limit_s) == ((2, 5), "connect", 7, 0.5)
    assert there.result(LIMIT_S) == (0,)
    assert set(zero.opened) == {1}
    assert zero.forgotten == [2, 5]


@pytest.mark.parametrize("answered", [False, True])
def test_what_a_dead_rank_left_behind_completes_nothing(
    store: dist.Store, pool: ThreadPoolExecutor, answered: bool
) -> None:
    """Rank 1 died while meeting; its offer, answered or not, lies in the store. Then it rejoins."""
    first = Fake(1, "first life")
    cut = threading.Event()
    dying = pool.submit(meet, store, 1, [0], first, timeout_s=LIMIT_S, cancelled=cut.is_set)
    zero = Fake(0, "0")
    if answered:  # rank 0 has prepared for the first life, which dies before it reads that
        first.open = fail  # type: ignore[method-assign, assignment]
    else:
        cut.set()
        with pytest.raises(CommError, match="cancelled"):
            dying.result(LIMIT_S)
        zero.dead.add("first life")
    waiting = pool.submit(meet, store, 0, [1], zero, timeout_s=LIMIT_S)
    if answered:
        with pytest.raises(OSError, match="killed"):
            dying.result(LIMIT_S)
    second = Fake(1, "second life")
    rejoining = pool.submit(meet, store, 1, [0], second, timeout_s=LIMIT_S)
    assert waiting.result(LIMIT_S) == (1,)
    if answered and zero.opened[1] == "first life for 0":  # it could not know; it meets again
        zero.dead.add("first life")
        assert meet(store, 0, [1], zero, timeout_s=LIMIT_S) == (1,)
    assert rejoining.result(LIMIT_S) == (0,)
    assert zero.opened[1] == "second life for 0"
    assert second.opened[0] == "0 for second life"


def test_a_channel_that_is_down_for_a_while_is_tried_again(
    store: dist.Store, pool: ThreadPoolExecutor
) -> None:
    zero, one = Fake(0, "0"), Fake(1, "1")
    tries = 0
    prepare = zero.prepare

    def down(peer: int, greeting: bytes) -> bytes:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise ChannelDown("no network")
        return prepare(peer, greeting)

    zero.prepare = down  # type: ignore[method-assign]
    there = pool.submit(meet, store, 1, [0], one, timeout_s=LIMIT_S)
    assert meet(store, 0, [1], zero, timeout_s=LIMIT_S) == (1,)
    assert there.result(LIMIT_S) == (0,)


def test_a_channel_that_stays_down_is_the_reason(store: dist.Store) -> None:
    def down(peer: int, greeting: bytes) -> bytes:
        raise ChannelDown("no network")

    cut = threading.Event()
    zero, one = Fake(0, "0"), Fake(1, "1")
    zero.prepare = down  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(meet, store, 1, [0], one, timeout_s=LIMIT_S, cancelled=cut.is_set)
        with pytest.raises(RankTimeout) as caught:
            meet(store, 0, [1], zero, timeout_s=0.5)
        cut.set()
        with pytest.raises(CommError, match="cancelled"):
            there.result(LIMIT_S)
    assert isinstance(caught.value.__cause__, ChannelDown)


def fail(peer: int, details: bytes) -> None:
    raise OSError("killed")


def test_a_rank_rejoins_again_and_again(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    for life in range(20):
        zero, one = Fake(0, "0"), Fake(1, f"life {life}")
        both = [
            pool.submit(meet, store, 0, [1], zero, timeout_s=LIMIT_S),
            pool.submit(meet, store, 1, [0], one, timeout_s=LIMIT_S),
        ]
        assert [job.result(LIMIT_S) for job in both] == [(1,), (0,)]
        assert zero.opened == {1: f"life {life} for 0"}
        assert one.opened == {0: f"0 for life {life}"}


def test_those_who_can_never_meet_are_told(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    cut = threading.Event()
    odd = pool.submit(meet, store, 1, [0], Fake(1, "odd"), timeout_s=LIMIT_S, cancelled=cut.is_set)
    with pytest.raises(ValueError, match="another spec"):
        meet(store, 0, [1], Fake(0, "0"), timeout_s=LIMIT_S)
    cut.set()
    with pytest.raises(CommError, match="cancelled"):
        odd.result(LIMIT_S)


def test_other_things_under_our_key_do_no_harm(store: dist.Store, pool: ThreadPoolExecutor) -> None:
    store.set("flexpert/1>0", "not ours")
    waiting = pool.submit(meet, store, 0, [1], Fake(0, "0"), timeout_s=LIMIT_S)
    assert meet(store, 1, [0], Fake(1, "1"), timeout_s=LIMIT_S) == (0,)
    assert waiting.result(LIMIT_S) == (1,)


def test_a_store_that_is_gone_is_a_clear_error(pool: ThreadPoolExecutor) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=2))
    waiting = pool.submit(meet, client, 0, [1], Fake(0, "0"), timeout_s=LIMIT_S)
    threading.Event().wait(0.1)
    del server
    with pytest.raises(CommError, match="store that ranks meet through"):
        waiting.result(LIMIT_S)
