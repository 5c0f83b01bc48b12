"""A thousand times connected and disconnected: nothing is left behind, over any channel.

What a rank holds is taken from its own /proc after a warm-up and at the end. Descriptors and
threads must be the same. Maps and resident memory belong to the allocator, too, and get a margin
far below one map, or one page, for each round.
"""

from __future__ import annotations

import gc
import os

import msgspec
import pytest
from comm_ranks import spec_of
from test_channels import Meeting, exchanges, meet, needs_nixl, part

from flexpert.comm import Buffer

ROUNDS = int(os.environ.get("FLEXPERT_ROUNDS", "1000"))
WARM_UP = 50
EXCHANGE_EVERY = 10

MORE_MAPS = 8
MORE_KIB = 1024


class Held(msgspec.Struct, frozen=True):
    """What a process holds."""

    descriptors: int
    maps: int
    threads: int
    resident_kib: int


def held(_: Buffer) -> Held:
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as memory:
        resident_pages = int(memory.read().split()[1])
        return Held(
            descriptors=len(os.listdir("/proc/self/fd")),
            maps=sum(1 for _ in maps),
            threads=len(os.listdir("/proc/self/task")),
            resident_kib=resident_pages * os.sysconf("SC_PAGESIZE") // 1024,
        )


def rounds(meeting: Meeting, count: int) -> None:
    """Rank 1 meets all others and parts from them; these stay connected to each other."""
    ids = tuple(meeting.ranks)
    for number in range(count):
        meeting.all(meet, ids)
        if number % EXCHANGE_EVERY == 0:
            meeting.all(exchanges, ids, range(2))
        meeting.ranks[1].ask(part, ids)
        others = [rank for rank in ids if rank != 1]
        for rank in others:
            meeting.ranks[rank].ask(part, [1])
        assert meeting.ranks[1].answer() == (1,)
        for rank in others:
            assert meeting.ranks[rank].answer() == tuple(others)


def check_nothing_is_left(channel: str, ids: range, count: int) -> None:
    with Meeting(channel) as meeting:
        meeting.spec = spec_of(4, max_tokens=8, hidden=64)
        meeting.start(ids)
        rounds(meeting, WARM_UP)
        before: dict[int, Held] = meeting.all(held)
        rounds(meeting, count)
        after: dict[int, Held] = meeting.all(held)
    print(f"{channel}, {len(ids)} ranks, {count} rounds:", *before.values(), *after.values())
    for rank, then in before.items():
        now = after[rank]
        told = f"rank {rank} held {then}, and {now} {count} rounds later"
        assert (now.descriptors, now.threads) == (then.descriptors, then.threads), told
        assert now.maps <= then.maps + MORE_MAPS, told
        assert now.resident_kib <= then.resident_kib + MORE_KIB, told


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("channel", ["shm", pytest.param("nixl", marks=needs_nixl)])
def test_a_thousand_rounds_of_two_leave_nothing(channel: str) -> None:
    """Over NIXL, its agent ends with the last peer: here in every round."""
    check_nothing_is_left(channel, range(2), ROUNDS)
