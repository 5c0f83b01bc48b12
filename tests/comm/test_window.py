"""Windows: found only by the right peer, gone without a trace, and never trusted."""

from __future__ import annotations

import gc
import os
import resource
import struct
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch
from support.comm_local import Local, dispatch, poke
from support.comm_ranks import Rank, Ranks, random_sent, spec_of, vote

from flexpert.comm import BufferSpec, CommError, PeerUnreachable, RankTimeout
from flexpert.comm.host import memfd
from flexpert.comm.host.host_buffer import HostBuffer
from flexpert.comm.host.window import HostWindow, WindowAddress, decode, encode
from flexpert.comm.peer_memory import export_pages
from flexpert.comm.window_layout import (
    COMBINE_FLAG_AT,
    DISPATCH_FLAG_AT,
    HEADER_BYTES,
    ROWS_AT,
    layout,
    size_bytes,
)


def test_an_address_is_short(local: Local) -> None:
    (buffer,) = local.start(spec_of(256), [255]).values()
    assert len(buffer.address) <= 200


def test_a_killed_peer_is_unreachable_and_nothing_is_connected(local: Local) -> None:
    spec = spec_of(4)
    local.start(spec, [0, 1])
    peer = Rank(2, spec)
    peer.kill()
    fresh = HostBuffer(3, spec)
    with pytest.raises(PeerUnreachable, match=r"rank 2 \(pid \d+\)"):
        fresh.connect({0: local.buffers[0].address, 2: peer.address, 1: local.buffers[1].address})
    assert list(fresh.connected) == [3]
    fresh.connect({0: local.buffers[0].address})
    assert list(fresh.connected) == [0, 3]
    fresh.close()


@pytest.mark.parametrize(
    "forge",
    [
        lambda a: msgspec.structs.replace(a, started=a.started + 1),
        lambda a: msgspec.structs.replace(a, nonce=bytes(16)),
        lambda a: msgspec.structs.replace(a, boot_id="another"),
        lambda a: msgspec.structs.replace(a, fd=0),
        lambda a: msgspec.structs.replace(a, fd=9999),
        lambda a: msgspec.structs.replace(a, pid=2**22 + 1),
    ],
    ids=["start time", "nonce", "machine", "other file", "no file", "no process"],
)
def test_an_address_that_fits_in_all_but_one_field_is_unreachable(
    local: Local, forge: Callable[[WindowAddress], WindowAddress]
) -> None:
    one, two = local.start(spec_of(4), [0, 1]).values()
    fresh = HostBuffer(2, spec_of(4))
    with pytest.raises(PeerUnreachable):
        fresh.connect({0: encode(forge(decode(one.address)))})
    fresh.connect({0: one.address, 1: two.address})
    fresh.close()


def test_addresses_of_another_rank_spec_or_kind_are_refused(local: Local) -> None:
    spec = spec_of(4)
    one, two = local.start(spec, [0, 1]).values()
    other = HostBuffer(3, replace(spec, hidden=spec.hidden + 1))
    for peers, message in (
        ({4: one.address}, "capacity"),
        ({-1: one.address}, "capacity"),
        ({2: one.address}, "that of rank 0"),
        ({3: other.address}, "another spec"),
        ({2: b"\xc1 no address"}, "not an address"),
        ({2: b""}, "not an address"),
    ):
        with pytest.raises(ValueError, match=message):
            two.connect(peers)
    again = HostBuffer(0, spec)
    with pytest.raises(ValueError, match="disconnect it before"):
        two.connect({0: again.address})
    two.connect({0: one.address, 1: again.address})  # known, and the own id: skipped
    assert two.connected == (0, 1)
    again.close()
    other.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def window_maps() -> int:
    with open("/proc/self/maps") as maps:
        return sum("flexpert-window" in line for line in maps)


def test_200_rounds_of_connecting_leave_no_descriptor_and_no_map(local: Local) -> None:
    spec = spec_of(8)
    local.start(spec, [0])
    gc.collect()
    before = (descriptors(), window_maps())
    for round_ in range(200):
        peer = HostBuffer(1 + round_ % 7, spec)
        local.buffers[0].connect({peer.rank: peer.address})
        peer.connect({0: local.buffers[0].address})
        local.epoch += 1
        for buffer in (local.buffers[0], peer):
            buffer.set_active([0, peer.rank], local.epoch)
        local.epoch += 1
        local.buffers[0].set_active([0], local.epoch)
        local.buffers[0].disconnect([peer.rank, 99])
        if round_ % 2:
            peer.set_active([peer.rank], local.epoch)
            peer.disconnect([0])
        peer.close()
    assert (descriptors(), window_maps()) == before


def test_failed_connects_leave_no_descriptor_and_no_map(local: Local) -> None:
    spec = spec_of(4)
    one, two = local.start(spec, [0, 1]).values()
    fresh = HostBuffer(2, spec)
    before = (descriptors(), window_maps())
    bad = encode(msgspec.structs.replace(decode(two.address), nonce=bytes(16)))
    for _ in range(20):
        with pytest.raises(PeerUnreachable):
            fresh.connect({0: one.address, 1: bad})
    assert (descriptors(), window_maps()) == before
    fresh.close()


def test_nothing_is_left_in_shared_memory_after_sigkill(in_shm: Callable[[], set[str]]) -> None:
    before = in_shm()
    with Ranks(spec_of(2), (0, 1)):
        pass  # leaving kills them
    assert in_shm() <= before


def test_a_window_takes_the_memory_that_was_written_and_gives_it_back(local: Local) -> None:
    spec = spec_of(256, max_tokens=1024, hidden=2048, topk=8)
    local.start(spec, [0, 1])
    window = local.buffers[0]._core.window
    assert size_bytes(spec) > 2**30
    assert window.memory_bytes() < 2**18
    local.activate([0, 1])
    small = replace(spec, max_tokens=16)
    local.exchange(random_sent(small, (0, 1), 1), "rank")
    local.exchange(random_sent(small, (0, 1), 2), "home")
    local.each([0, 1], vote)  # so nothing is read any more
    used = window.memory_bytes()
    assert 16 * 2048 * 2 < used < 2**21
    local.activate([0])
    local.buffers[0].disconnect([1])
    assert window.memory_bytes() < 2**18


def test_where_the_kernel_promises_no_more_than_it_has_pages_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There, one that is missing at first use is SIGBUS. To switch the kernel itself would be for
    the whole machine."""
    monkeypatch.setattr(memfd, "overcommits", lambda: False)
    spec = spec_of(2)
    window = HostWindow(0, spec)
    place = window.export_memory()
    assert window.memory_bytes() >= window.layout.place_bytes
    window.take_back(place)
    window.close()
    exported = export_pages(1 << 20)
    assert exported.resident >= 1 << 20
    exported.close()


def test_pages_that_are_not_to_be_had_are_an_error() -> None:
    fd = memfd.create("test", 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="no memory for 2097152 bytes of shared memory"):
            memfd.reserve(fd, 0, 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        os.close(fd)


def test_disconnecting_an_active_peer_masks_it(local: Local) -> None:
    local.start(spec_of(2), [0, 1])
    local.activate([0, 1])
    local.buffers[0].disconnect([1])
    assert local.buffers[0].connected == local.buffers[0].active == (0,)


def test_a_peer_cannot_shrink_a_window_under_its_owner(local: Local) -> None:
    local.start(spec_of(2), [0, 1])
    with pytest.raises(PermissionError):
        os.ftruncate(local.buffers[0]._core.window.fd, HEADER_BYTES)


# ---- garbage: rank 1 writes what no rank of ours would ------------------------------------------


def flag(tag: int, rows: int, mode: int, row_bytes: int = 0) -> bytes:
    return struct.pack("=QIII", tag, rows, mode, row_bytes)


SHARED = 0x200  # in the mode of a flag, see kernels.c


def slots_of_row(spec: BufferSpec, row: int) -> int:
    """Where the slots of a row lie, from the start of a place."""
    where = layout(spec)
    return ROWS_AT + row * (where.meta_bytes + where.result_stride) + 8 + 4 * spec.topk


@pytest.mark.parametrize(
    ("rows", "slots"),
    [
        (2**32 - 1, ()),
        (17, ()),
        (1, (-2, -1, -1, -1)),
        (2, (0, 0, 0, 2**15 - 1)),
        (1, (-(2**15), 0, 0, 0)),
    ],
)
def test_garbage_in_a_dispatch_is_refused_and_its_writer_named(
    local: Local, rows: int, slots: tuple[int, ...]
) -> None:
    spec = spec_of(2)
    row_bytes = layout(spec).row_bytes
    zero, one = local.start(spec, [0, 1]).values()
    local.activate([0, 1])
    for row in range(min(rows, 2)):
        poke(
            one._core.b.outbox[0] + slots_of_row(spec, row), struct.pack(f"={len(slots)}h", *slots)
        )
    poke(one._core.b.outbox[0] + DISPATCH_FLAG_AT, flag(1 << 32 | 1, rows, 0, row_bytes))
    sent = random_sent(spec, (0, 1), 1)
    with pytest.raises(CommError, match="rank 1 sent rows or slots"):
        dispatch(zero, sent[0])
    local.activate([0])
    local.exchange(random_sent(spec, (0,), 2), "rank")


@pytest.mark.parametrize(
    ("extra", "mode", "message"),
    [
        (0, 1, "another reduce mode"),
        (1, 0, "a wrong number of rows"),
        (0, 9, "another reduce mode"),
    ],
)
def test_garbage_in_a_combine_is_refused_and_its_writer_named(
    local: Local, extra: int, mode: int, message: str
) -> None:
    spec = spec_of(2)
    zero, one = local.start(spec, [0, 1]).values()
    local.activate([0, 1])
    sent = random_sent(spec, (0, 1), 1)
    received = local.each(sent, lambda b: dispatch(b, sent[b.rank]))
    at = one._core.b.outbox[0] + COMBINE_FLAG_AT
    poke(at, flag(1 << 32 | 1, zero._core.b.sent_rows[1] + extra, mode))
    with pytest.raises(CommError, match=f"rank 1 sent {message}"):
        zero.combine(received[0].x.clone(), received[0], reduce="rank")


def test_random_bytes_in_all_that_a_peer_may_write_never_crash_the_owner(local: Local) -> None:
    spec = spec_of(2, max_tokens=4)
    where = layout(spec)
    zero, one = local.start(spec, [0, 1]).values()
    generator = torch.Generator().manual_seed(3)
    sent = random_sent(spec, (0, 1), 1)
    refused: list[str] = []
    for turn in range(100):
        local.epoch += 1
        zero.set_active([0, 1], local.epoch)
        zero._core.must_vote = False
        for row in range(spec.max_tokens):
            slots = torch.randint(-2, 3, (spec.topk,), generator=generator, dtype=torch.int16)
            poke(one._core.b.outbox[0] + slots_of_row(spec, row), slots.numpy().tobytes())
            token = int(torch.randint(-1, spec.max_tokens + 1, (1,), generator=generator))
            at = one._core.b.outbox[0] + ROWS_AT + row * where.meta_bytes
            poke(at, struct.pack("=i", token))
        rows = int(torch.randint(0, 6, (1,), generator=generator))
        tag, mode = local.epoch << 32 | 1, SHARED * (turn % 2)
        poke(one._core.b.outbox[0] + DISPATCH_FLAG_AT, flag(tag, rows, mode, where.row_bytes))
        try:
            got = dispatch(zero, sent[0], 1.0)
        except CommError as error:
            refused.append(str(error))
            continue
        assert got.x.shape[0] == int(got.offsets[-1])
        with pytest.raises(RankTimeout):
            zero.combine(got.x.clone(), got, timeout_s=0.0)
    assert 0 < len(refused) < 100
    assert all("rank 1 sent rows or slots that cannot be" in message for message in refused)
