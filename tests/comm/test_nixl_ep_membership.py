"""Ranks come, go and are masked through nixl_ep's interface."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from support.nixl_ep_local import Ranks, Setup, apply_experts, check_combined, check_dispatched
from torch.distributed import HashStore

from flexpert.comm import CommError, Interrupted
from flexpert.compat.nixl_ep import Buffer


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with Ranks() as started:
        yield started


def masks(buffer: Buffer) -> list[int]:
    status = torch.full((buffer.group_size,), 9, dtype=torch.int32)
    buffer.query_mask_buffer(status)
    return status.tolist()


# ---- joining and leaving ------------------------------------------------------------------------


def test_growing_and_shrinking_to_any_set(ranks: Ranks) -> None:
    ranks.start([0, 1])
    seed = 0
    connected: set[int] = {0, 1}
    for members in ([0, 1, 2, 3], [0, 2, 3], [2, 3], [1, 2, 3], [0, 1, 2, 3], [3]):
        gone, new = connected - set(members), set(members) - connected
        for rank in connected - gone:
            ranks.buffers[rank].disconnect_ranks(gone)
        for rank in gone:
            ranks.buffers.pop(rank).destroy()
        for rank in new:
            ranks.add(rank)
        ranks.each(
            members, lambda b, m=members, n=new: b.connect_ranks(m if b.rank in n else sorted(n))
        )
        connected = set(members)
        for _ in range(3):
            seed += 1
            ranks.exchange(members, seed)
        for rank in members:
            assert masks(ranks.buffers[rank]) == [int(r not in connected) for r in range(4)]


def test_newcomers_connect_masked_beside_exchanges(ranks: Ranks) -> None:
    ranks.start([0, 1])
    ranks.add(3)
    connecting = [
        ranks.pool.submit(ranks.buffers[rank].connect_ranks, peers, activate=False)
        for rank, peers in ((0, [3]), (1, [3]), (3, [0, 1]))
    ]
    seed = 1
    while not all(job.done() for job in connecting) or seed < 4:
        ranks.exchange([0, 1], seed)
        seed += 1
    for job in connecting:
        job.result()
    for rank, want in ((0, [0, 0, 1, 1]), (1, [0, 0, 1, 1]), (3, [1, 1, 1, 0])):
        assert masks(ranks.buffers[rank]) == want
    ranks.exchange([0, 1], seed)  # still without the newcomer

    for rank, peers in ((0, [3]), (1, [3]), (3, [0, 1])):
        for peer in peers:
            ranks.buffers[rank].update_mask_buffer(peer)  # the default unmasks
    ranks.exchange([0, 1, 3], seed + 1)


def test_capacity_may_grow(ranks: Ranks) -> None:
    ranks.start([0, 1])
    with pytest.raises(ValueError, match="rank 5"):
        ranks.buffers[0].connect_ranks([5])
    ranks.setup = Setup(capacity=6)
    for buffer in ranks.buffers.values():
        buffer.update_memory_buffers(6, 3, ranks.setup.hint())
        assert buffer.group_size == 6
    ranks.add(5)
    ranks.each([0, 1, 5], lambda b: b.connect_ranks([0, 1, 5]))
    ranks.exchange([0, 1, 5], 1)
    assert masks(ranks.buffers[0]) == [0, 0, 1, 1, 1, 0]


def test_only_the_capacity_may_change(ranks: Ranks) -> None:
    buffer = ranks.add(0)
    buffer.update_memory_buffers(4, 3, ranks.setup.hint())
    other = Buffer.get_rdma_size_hint(16, 512, 4, 12)
    with pytest.raises(ValueError, match="8 tokens of 512 channels and 3 experts"):
        buffer.update_memory_buffers(4, 3, other)
    with pytest.raises(ValueError, match="only be given more ranks"):
        buffer.update_memory_buffers(4, 2, ranks.setup.hint())
    with pytest.raises(ValueError, match="cannot shrink"):
        buffer.update_memory_buffers(2, 3, ranks.setup.hint())


def test_the_store_may_be_given_and_replaced_later(ranks: Ranks) -> None:
    for rank in (0, 1, 2):
        ranks.add(rank).set_tcp_store_group(None)
    with pytest.raises(ValueError, match="set_tcp_store_group"):
        ranks.buffers[0].connect_ranks([1])
    stores = HashStore(), HashStore()

    def connect(buffer: Buffer) -> None:
        first, second = stores
        if buffer.rank < 2:
            buffer.set_tcp_store_group(first)
            buffer.connect_ranks([0, 1])
        buffer.set_tcp_store_group(second)
        assert buffer.tcp_store_group is second
        buffer.connect_ranks([0, 1, 2])

    ranks.each([0, 1, 2], connect)
    ranks.exchange([0, 1, 2], 1)


# ---- masks --------------------------------------------------------------------------------------


def test_experts_of_a_masked_rank_are_skipped_and_weights_not_renormalised(ranks: Ranks) -> None:
    ranks.start([0, 1, 2])
    for rank in (0, 1):
        ranks.buffers[rank].update_mask_buffer(2, mask=True)
        assert masks(ranks.buffers[rank]) == [0, 0, 1, 1]
    sent = ranks.inputs([0, 1], 5)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, count, handle, _, _ = buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
        check_dispatched(ranks.setup, sent, buffer.rank, recv_x, count, handle)
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 1})

    ranks.each([0, 1], run)

    ranks.buffers[2].update_mask_buffer(0, mask=True)
    ranks.buffers[2].update_mask_buffer(1, mask=True)
    for buffer in ranks.buffers.values():
        buffer.clean_mask_buffer()
        assert masks(buffer) == [0, 0, 0, 1]
    ranks.exchange([0, 1, 2], 6)


def test_masks_that_cannot_be(ranks: Ranks) -> None:
    ranks.start([0, 1])
    buffer = ranks.buffers[0]
    with pytest.raises(ValueError, match="rank 0"):
        buffer.update_mask_buffer(0, mask=True)
    buffer.update_mask_buffer(0)
    for rank in (2, 4, -1):
        with pytest.raises(ValueError, match=f"rank {rank}"):
            buffer.update_mask_buffer(rank)
    buffer.update_mask_buffer(2, mask=True)
    for wrong in (torch.zeros(3, dtype=torch.int32), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"mask_status must be \[4\] int32"):
            buffer.query_mask_buffer(wrong)
    assert masks(buffer) == [0, 0, 1, 1]


def test_a_rank_that_does_not_dispatch_in_time_is_masked(ranks: Ranks) -> None:
    ranks.start([0, 1, 2])
    for rank in (0, 2):
        ranks.buffers[rank].destroy()
        ranks.buffers[rank] = ranks.add(rank, timeout_ms=200)
    ranks.buffers[1].disconnect_ranks([0, 2])
    ranks.each([0, 1, 2], lambda b: b.connect_ranks([0, 1, 2]))
    sent = ranks.inputs([0, 2], 3)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, count, handle, _, _ = buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
        assert masks(buffer) == [0, 1, 0, 1]
        check_dispatched(ranks.setup, sent, buffer.rank, recv_x, count, handle)
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 2})

    ranks.each([0, 2], run)
    for rank in (0, 2):
        ranks.buffers[rank].disconnect_ranks([1])
    ranks.exchange([0, 2], 4)


def test_a_second_combine_after_a_rank_was_masked(ranks: Ranks) -> None:
    ranks.start([0, 1, 2])
    sent = ranks.inputs([0, 1, 2], 15)
    barrier = threading.Barrier(3)

    def run(buffer: Buffer) -> None:
        mine = sent[buffer.rank]
        recv_x, _, handle, _, _ = buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
        y = apply_experts(ranks.setup, buffer.rank, recv_x)
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 1, 2})
        barrier.wait(60)
        if buffer.rank == 1:
            return
        buffer.disconnect_ranks([1])
        out, _, _ = buffer.combine(y, mine.experts, mine.weights, handle)
        check_combined(ranks.setup, mine, out, up={0, 2})

    ranks.each([0, 1, 2], run)


def test_the_barrier_masks_whoever_does_not_come(ranks: Ranks) -> None:
    ranks.start([0, 1])
    ranks.each([0, 1], lambda b: b.barrier())
    assert masks(ranks.buffers[0]) == [0, 0, 1, 1]
    ranks.buffers[1].destroy()
    ranks.buffers[0].timeout_ms = 200
    ranks.buffers[0].barrier()
    assert masks(ranks.buffers[0]) == [0, 1, 1, 1]


# ---- life and death -----------------------------------------------------------------------------


def test_the_rank_is_not_the_first_argument() -> None:
    with pytest.raises(TypeError, match="Buffer\\(rank="):
        Buffer(1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"low_latency_mode": False}, "low_latency_mode"),
        ({"rank": -1}, "rank"),
        ({"timeout_ms": 0}, "timeout_ms"),
    ],
)
def test_what_a_buffer_cannot_be(arguments: dict[str, int], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Buffer(**arguments)  # type: ignore[arg-type]


def test_calls_before_memory_and_after_destroy(ranks: Ranks) -> None:
    buffer = Buffer(rank=1, explicitly_destroy=True, tcp_store_group=ranks.store)
    assert buffer.runtime is None
    with pytest.raises(CommError, match="update_memory_buffers first"):
        buffer.connect_ranks([0])
    buffer.update_memory_buffers(4, 3, ranks.setup.hint())
    assert buffer.runtime is not None
    buffer.destroy()
    buffer.destroy()
    assert buffer.runtime is None
    for call in (buffer.barrier, buffer.clean_mask_buffer, lambda: buffer.connect_ranks([0])):
        with pytest.raises(CommError, match="rank 1 is destroyed"):
            call()


@pytest.mark.parametrize("explicitly", [False, True])
def test_a_buffer_that_goes_releases_its_memory_unless_told_not_to(
    ranks: Ranks, explicitly: bool
) -> None:
    buffer = Buffer(rank=0, explicitly_destroy=explicitly)
    buffer.update_memory_buffers(4, 3, ranks.setup.hint())
    mine = ranks.inputs([0], 1)[0]
    buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
    core = buffer.runtime
    assert core is not None
    gc.disable()  # by reference counts alone
    try:
        del buffer
        if explicitly:
            core.unmask([])
            core.close()
        with pytest.raises(CommError, match="closed"):
            core.unmask([])
    finally:
        gc.enable()


def test_destroy_in_a_signal_handler_ends_the_exchange_that_it_struck(ranks: Ranks) -> None:
    ranks.start([0, 1])
    buffer, mine = ranks.buffers[0], ranks.inputs([0], 1)[0]
    core = buffer.runtime
    assert core is not None
    struck: list[bool] = []

    def handler(_signal: int, _frame: object) -> None:
        struck.append(buffer.runtime is not None)
        buffer.destroy()

    before = signal.signal(signal.SIGUSR1, handler)
    alarm = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    alarm.start()
    try:
        with pytest.raises(Interrupted):  # rank 1 never comes
            buffer.dispatch(mine.x, mine.experts, 8, use_fp8=False)
    finally:
        alarm.join()
        signal.signal(signal.SIGUSR1, before)
    assert struck == [True]
    with pytest.raises(CommError, match="closed"):
        core.unmask([])


# ---- what is tied to GPUs -----------------------------------------------------------------------


def test_what_a_cpu_has_instead_of_a_gpu(ranks: Ranks) -> None:
    buffer = ranks.add(0)
    assert not Buffer.is_sm90_compiled()
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    Buffer.set_num_sms(20)
    with pytest.raises(ValueError, match="even"):
        Buffer.set_num_sms(3)
    with Buffer.capture() as event:
        event.current_stream_wait()
    assert buffer.get_comm_stream() is not None


def test_the_local_buffer_can_be_seen_as_any_tensor(ranks: Ranks) -> None:
    buffer = ranks.add(0)
    assert buffer.get_local_buffer_tensor(torch.bfloat16).numel() == 0
    buffer.update_memory_buffers(4, 3, ranks.setup.hint(), num_nvl_bytes=66)
    whole = buffer.get_local_buffer_tensor(torch.int32)
    assert whole.shape == (16,)
    view = buffer.get_local_buffer_tensor(torch.int32, torch.Size([2, 3]), offset=4)
    view.fill_(7)
    assert whole[4:10].tolist() == [7] * 6
    rdma = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    assert rdma.numel() == ranks.setup.hint()
    with pytest.raises(ValueError, match="66 bytes"):
        buffer.get_local_buffer_tensor(torch.int32, torch.Size([4, 4]), offset=1)
