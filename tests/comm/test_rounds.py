"""Hundreds of times connected and disconnected: nothing is left behind, over any channel.

What a rank holds is taken from its own /proc after a warm-up and at the end. Descriptors and
threads must be the same, but for sockets that are about to go. Maps and memory belong to the
allocator, too, and get a margin far below one map, one page and one place for each round.
Addresses that can be used are counted, because maps alone would not show memory that is kept from
use: the kernel joins such maps.
"""

from __future__ import annotations

import gc
import os

import msgspec
import pytest
from support.comm_ranks import spec_of
from test_channels import Meeting, exchanges, meet, needs_nixl, part

from flexpert.comm import Buffer

ROUNDS = int(os.environ.get("FLEXPERT_ROUNDS", "400"))
WARM_UP = 50
EXCHANGE_EVERY = 10

MORE_MAPS = 8
MORE_ADDRESSES_KIB = 16384  # a thread that meets others may get a stack of 8 MiB that is kept
MORE_RESIDENT_KIB = 4096  # the allocator's own ups and downs took 1.5 MiB

PLACE = {"max_tokens": 64, "hidden": 1024}  # a quarter of a MiB for each peer


class Held(msgspec.Struct, frozen=True):
    """What a process holds."""

    descriptors: int
    maps: int
    threads: int
    addresses_kib: int
    resident_kib: int


def held(_: Buffer) -> Held:
    gc.collect()
    with open("/proc/self/maps") as maps, open("/proc/self/statm") as memory:
        lines = maps.read().splitlines()
        resident = int(memory.read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
    return Held(
        descriptors=len(os.listdir("/proc/self/fd")),
        maps=len(lines),
        threads=len(os.listdir("/proc/self/task")),
        addresses_kib=sum(map(usable_kib, lines)),
        resident_kib=resident,
    )


def usable_kib(line: str) -> int:
    """Of one map; what the allocator only reserves for a new arena cannot be used."""
    where, permissions = line.split()[:2]
    begin, end = (int(address, 16) for address in where.split("-"))
    return 0 if permissions.startswith("---") else (end - begin) // 1024


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


def check_nothing_is_left(
    channel: str, ids: range, count: int, *, more_descriptors: int = 0
) -> None:
    with Meeting(channel) as meeting:
        meeting.spec = spec_of(4, **PLACE)
        meeting.start(ids)
        rounds(meeting, WARM_UP)
        before: dict[int, Held] = meeting.all(held)
        rounds(meeting, count)
        after: dict[int, Held] = meeting.all(held)
    print(f"{channel}, {len(ids)} ranks, {count} rounds:", *before.values(), *after.values())
    for rank, then in before.items():
        now = after[rank]
        told = f"rank {rank} held {then}, and {now} {count} rounds later"
        assert abs(now.descriptors - then.descriptors) <= more_descriptors, told
        assert now.threads == then.threads, told
        assert now.maps <= then.maps + MORE_MAPS, told
        assert now.addresses_kib <= then.addresses_kib + MORE_ADDRESSES_KIB, told
        assert now.resident_kib <= then.resident_kib + MORE_RESIDENT_KIB, told


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("channel", ["shm", pytest.param("nixl", marks=needs_nixl)])
def test_hundreds_of_rounds_of_two_leave_nothing(channel: str) -> None:
    """Over NIXL, its agent ends with the last peer: here in every round."""
    rounds = ROUNDS if channel != "nixl" else ROUNDS // 4  # 0.1 s each
    check_nothing_is_left(channel, range(2), rounds)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("channel", ["shm", pytest.param("nixl", marks=needs_nixl)])
def test_one_that_comes_and_goes_leaves_nothing_with_those_who_stay(channel: str) -> None:
    """Over NIXL, these keep their agents, and idle between the rounds. A socket or two of the agent
    that ended last stay open until they look at it again."""
    more = 4 if channel == "nixl" else 0
    check_nothing_is_left(channel, range(3), max(ROUNDS // 10, 1), more_descriptors=more)
