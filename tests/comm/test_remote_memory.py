"""Memory that is read over NIXL: one process plays owner and reader, another one dies."""

import importlib.util
import multiprocessing
import threading
import time
from datetime import timedelta

import pytest
import torch

from flexpert.comm.errors import CommError, PeerUnreachable
from flexpert.comm.remote_memory import CHUNK_BYTES, HostRegion, MemoryServer, RemoteMemory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12")),
        reason="NIXL is not installed",
    ),
]

SIZE = 3 * CHUNK_BYTES + 17


def memory() -> torch.Tensor:
    return torch.randint(256, (SIZE,), dtype=torch.uint8, generator=torch.manual_seed(1))


def own(port: int) -> None:
    """A process that lets rank 0 read until it is killed."""
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20))
    server = MemoryServer(1)
    server.export("kv", HostRegion(memory()))
    server.attend()
    server.connect(store, [0], timeout_s=20)
    threading.Event().wait(60)


def read_until_killed(port: int) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=20))
    server = MemoryServer(1)
    server.connect(store, [0], timeout_s=20)
    into = torch.zeros(SIZE, dtype=torch.uint8)
    for number in range(100_000):
        server.read_many(0, "kv", [(0, into)], timeout_s=20)
        if number == 3:
            store.set("reading", "yes")


def read_again_and_again(reader: MemoryServer) -> None:
    for _ in range(500):
        reader.read_many(1, "kv", [(0, torch.zeros(5, dtype=torch.uint8))])
        time.sleep(0.01)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    process = multiprocessing.get_context("spawn").Process(target=own, args=(store.port,))
    process.start()
    reader = MemoryServer(0)
    try:
        assert reader.connect(store, [1], timeout_s=30) == (1,)
        yield reader, process
    finally:
        process.kill()
        process.join()
        reader.close()


def test_reads_what_the_owner_has(pair):
    reader, _ = pair
    expected = memory()
    whole, part = torch.zeros(SIZE, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    RemoteMemory(reader, 1, "kv").copy([(0, whole), (9, part)])
    assert torch.equal(whole, expected)
    assert torch.equal(part, expected[9:14])
    for at in range(1000):
        reader.read_many(1, "kv", [(at, part)], timeout_s=10)
        assert torch.equal(part, expected[at : at + 5])


@pytest.mark.parametrize(("region", "at"), [("kv", SIZE - 4), ("experts", 0)])
def test_a_request_beyond_what_is_exported_cuts_the_link(pair, region, at):
    reader, process = pair
    with pytest.raises(PeerUnreachable, match="closed the link"):
        reader.read_many(1, region, [(at, torch.zeros(5, dtype=torch.uint8))], timeout_s=10)
    assert 1 in reader.broken()
    assert process.is_alive()


@pytest.mark.parametrize(
    "message",
    [b"", b"nonsense", bytes(22), bytes([0, 9]) + bytes(20), bytes([7, 0, 1]) + bytes(30)],
)
def test_a_message_that_is_no_request_cuts_the_link(pair, message):
    reader, process = pair
    reader._links[1].link.notify(message)
    with pytest.raises(PeerUnreachable, match="closed the link"):
        read_again_and_again(reader)
    assert process.is_alive()


def test_a_rank_that_leaves_is_read_until_it_ends_and_then_forgotten(pair):
    reader, process = pair
    reader.attend()
    reader.rest([0])
    part = torch.zeros(5, dtype=torch.uint8)
    time.sleep(0.2)
    RemoteMemory(reader, 1, "kv").copy([(3, part)])
    assert torch.equal(part, memory()[3:8])
    process.kill()
    process.join()
    deadline = time.monotonic() + 5
    while reader._links and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not reader._links
    with pytest.raises(PeerUnreachable, match="no link"):
        RemoteMemory(reader, 1, "kv").copy([(3, part)])


def test_nothing_runs_while_nobody_reads(pair):
    reader, _ = pair
    polls = []
    poll = reader._endpoint.poll
    reader._endpoint.poll = lambda: polls.append(0) or poll()
    reader.attend()
    time.sleep(0.1)
    reader.rest([0, 1])
    time.sleep(0.05)
    attended = len(polls)
    time.sleep(0.3)
    assert 0 < attended == len(polls)


def test_a_killed_owner_is_noticed(pair):
    reader, process = pair
    process.kill()
    process.join()
    with pytest.raises(PeerUnreachable):
        reader.read_many(1, "kv", [(0, torch.zeros(5, dtype=torch.uint8))], timeout_s=5)


def test_a_cancelled_read_ends(pair):
    reader, _ = pair
    into = torch.zeros(SIZE, dtype=torch.uint8)
    with pytest.raises(CommError, match="cancelled"):
        reader.read_many(1, "kv", [(0, into)], timeout_s=10, cancelled=lambda: True)


def test_a_killed_reader_is_noticed_by_the_owner(monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=read_until_killed, args=(store.port,))
    process.start()
    owner = MemoryServer(0)
    owner.export("kv", HostRegion(memory()))
    try:
        owner.attend()
        owner.connect(store, [1], timeout_s=30)
        store.wait(["reading"], timedelta(seconds=20))
        process.kill()
        process.join()
        deadline = time.monotonic() + 5
        while not owner.broken() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(owner.broken()) == [1]
    finally:
        process.kill()
        process.join()
        owner.close()
