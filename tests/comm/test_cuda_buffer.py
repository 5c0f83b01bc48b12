"""CudaBuffer keeps the contract; in the interpreter without a GPU, several ranks in one process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support.comm_local import check_received, same_bits
from support.comm_ranks import apply_experts, random_sent, spec_of
from support.cuda_local import DEVICE, FEW, INTERPRETED, parts

from flexpert.comm import BufferSpec, CommError, ExpertTable, Interrupted, RankTimeout
from flexpert.comm.buffer import OnTimeout, Reduce
from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.comm.cuda.cuda_layout import Word
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.routing import Sent, expected_rows, expected_sums

if not INTERPRETED:
    pytest.skip("ranks of one process wait for each other on a GPU", allow_module_level=True)

SPEC = spec_of(4, dtype=torch.float32, max_tokens=4, hidden=40)


class CudaRanks:
    """Buffers by id; each phase of all before the next of any, as the interpreter needs it."""

    def __init__(self) -> None:
        self.buffers: dict[int, CudaBuffer] = {}
        self.epoch = 0

    def start(
        self, ids: Iterable[int], spec: BufferSpec = SPEC, on_timeout: OnTimeout = "raise"
    ) -> dict[int, CudaBuffer]:
        for rank in ids:
            self.buffers[rank] = CudaBuffer(
                rank,
                spec,
                timeout_s=20.0,
                on_timeout=on_timeout,
                device=torch.device(DEVICE),
                tuning=FEW,
            )
        addresses = {rank: b.address for rank, b in self.buffers.items()}
        for buffer in self.buffers.values():
            buffer.connect(addresses)
        return self.buffers

    def activate(self, ids: Iterable[int]) -> None:
        self.epoch += 1
        chosen = tuple(ids)
        for rank in chosen:
            self.buffers[rank].set_active(chosen, self.epoch)
        self.vote(chosen)

    def vote(self, ids: Iterable[int]) -> None:
        chosen = tuple(ids)
        for rank in chosen:
            self.buffers[rank].post_vote(b"")
        for rank in chosen:
            assert set(self.buffers[rank].collect_votes(20.0)) >= set(chosen)

    def exchange(self, sent: dict[int, Sent], reduce: Reduce = "rank") -> None:
        """One exchange of the ranks in `sent`, held against the oracle."""
        hooks = {r: self.buffers[r].begin_dispatch(*parts(s)) for r, s in sent.items()}
        got = {rank: hook() for rank, hook in hooks.items()}
        y = {}
        for rank, received in got.items():
            check_received(received, sent, rank)
            y[rank] = apply_experts(received.x, received.offsets)
        sums = {
            rank: self.buffers[rank].begin_combine(y[rank], got[rank], reduce=reduce)
            for rank in sent
        }
        for rank, hook in sums.items():
            assert same_bits(hook(), expected_sums(sent, y, rank, reduce))


@pytest.fixture
def ranks() -> Iterator[CudaRanks]:
    several = CudaRanks()
    yield several
    for buffer in several.buffers.values():
        buffer.close()


@pytest.mark.slow
def test_ranks_join_and_leave_and_every_exchange_is_right(ranks: CudaRanks) -> None:
    ranks.start(range(4))
    for seed, ids in enumerate([(0,), (0, 2), (0, 1, 2, 3), (1, 3)]):
        ranks.activate(ids)
        ranks.exchange(random_sent(SPEC, ids, seed), "rank")
        ranks.exchange(random_sent(SPEC, ids, 50 + seed), "home")


@pytest.mark.slow
def test_a_link_unmasked_again_starts_afresh(ranks: CudaRanks) -> None:
    """Exchanges behind two ranks differ; after a vote they count together again."""
    a, b = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    ranks.exchange(random_sent(SPEC, (0, 1), 1))
    a.mask([1])
    b.mask([0])
    assert a.active == (0,)
    for seed in range(3):
        ranks.exchange(random_sent(SPEC, (0,), seed))
    ranks.exchange(random_sent(SPEC, (1,), 9))
    a.unmask([1])
    b.unmask([0])
    ranks.vote([0, 1])
    assert a.active == b.active == (0, 1)
    ranks.exchange(random_sent(SPEC, (0, 1), 2))


def test_a_peer_unmasked_waits_for_a_vote_also_when_it_was_masked_in_an_exchange(
    ranks: CudaRanks,
) -> None:
    a, b = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    assert not a.vote_due
    sent = random_sent(SPEC, (0, 1), 1)
    hooks = {r: ranks.buffers[r].begin_dispatch(*parts(s)) for r, s in sent.items()}
    for buffer, peer in ((a, 1), (b, 0)):
        buffer.mask([peer])
        assert not buffer.vote_due
        buffer.unmask([peer])
        assert buffer.vote_due
    got = {rank: hook() for rank, hook in hooks.items()}
    y = {rank: apply_experts(received.x, received.offsets) for rank, received in got.items()}
    for hook in [ranks.buffers[r].begin_combine(y[r], got[r]) for r in sent]:
        hook()
    for seed in (2, 3):
        ranks.exchange(random_sent(SPEC, (seed - 2,), seed))  # each alone
    ranks.vote([0, 1])
    assert not a.vote_due
    ranks.exchange(random_sent(SPEC, (0, 1), 4))


def test_who_sends_nothing_is_named_and_the_epoch_is_over(ranks: CudaRanks) -> None:
    a, _ = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    s = random_sent(SPEC, (0, 1), 1)
    hook = a.begin_dispatch(*parts(s[0]))
    with pytest.raises(RankTimeout, match=r"rank 1 did not answer in dispatch \(epoch 1"):
        hook()
    with pytest.raises(StaleEpoch, match="epoch 1 is over"):
        a.post_vote(b"")
    a.set_active([0], 2)
    with pytest.raises(CommError, match="before the first vote of epoch 2"):
        a.begin_dispatch(*parts(s[0]))
    a.post_vote(b"")
    a.collect_votes(20.0)
    ranks.exchange(random_sent(SPEC, (0,), 3))


def test_who_sends_nothing_is_masked_and_the_result_tells(ranks: CudaRanks) -> None:
    a, _ = ranks.start([0, 1], on_timeout="mask").values()
    ranks.activate([0, 1])
    table = ExpertTable(
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 0], dtype=torch.int32), 1
    )
    x = torch.randn(2, SPEC.hidden)
    ids, weights = torch.tensor([[0, 1], [0, -1]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    received = a.begin_dispatch(x, ids, weights, table)()
    assert received.masked == (1,)
    assert a.active == (0,)
    out = a.begin_combine(received.x, received)()
    assert same_bits(out, x * torch.tensor([[0.25], [1.0]]))
    missing = a.missing_results(received)
    assert missing is not None
    assert missing.ranks == (1,)
    assert missing.weight.tolist() == [0.75, 0.0]
    assert missing.choices.tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("reduce", ["rank", "home"])
def test_results_of_an_earlier_exchange_are_not_taken_for_new(
    ranks: CudaRanks, reduce: Reduce
) -> None:
    a, b = ranks.start([0, 1], on_timeout="mask").values()
    ranks.activate([0, 1])
    sent = random_sent(SPEC, (0, 1), 2)
    ids = torch.arange(10)[sent[0].table.rank == 1][:1].expand(4, 1).contiguous()  # all on rank 1
    s = replace(sent[0], x=torch.randn(4, SPEC.hidden), expert_ids=ids, weights=torch.ones(4, 1))
    sent = {**sent, 0: s}
    ranks.exchange(sent, reduce)
    hooks = [a.begin_dispatch(*parts(s)), b.begin_dispatch(*parts(sent[1]))]
    received = hooks[0]()
    hooks[1]()
    out = a.begin_combine(apply_experts(received.x, received.offsets), received, reduce=reduce)()
    assert not out.any()
    missing = a.missing_results(received)
    assert missing is not None
    assert missing.ranks == (1,)


def test_who_returns_nothing_in_combine_is_named(ranks: CudaRanks) -> None:
    a, b = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    s = random_sent(SPEC, (0, 1), 1)
    hooks = [a.begin_dispatch(*parts(s[0])), b.begin_dispatch(*parts(s[1]))]
    received = hooks[0]()
    with pytest.raises(RankTimeout, match="rank 1 did not answer in combine"):
        a.begin_combine(apply_experts(received.x, received.offsets), received)()


def test_what_a_replay_reported_is_raised_by_the_next_vote(ranks: CudaRanks) -> None:
    """Nothing of Python runs in a replay: its launches alone find that a peer is silent."""
    a, _ = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    sent = a.exchange.send_dispatch(*parts(random_sent(SPEC, (0, 1), 1)[0]), wait=False)
    a.exchange.wait_dispatch(sent)
    a.exchange.index(sent)
    with pytest.raises(RankTimeout, match="rank 1 did not answer in dispatch"):
        a.post_vote(b"")
    with pytest.raises(StaleEpoch):
        a.post_vote(b"")


def exchange_alone(buffer: CudaBuffer) -> None:
    """An exchange of which the host has not heard yet that the peer is silent."""
    sent = buffer.exchange.send_dispatch(*parts(random_sent(SPEC, (0, 1), 1)[0]), wait=False)
    buffer.exchange.wait_dispatch(sent)
    buffer.exchange.index(sent)


def test_what_is_reported_late_is_raised_by_the_next_exchange(ranks: CudaRanks) -> None:
    a, _ = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    exchange_alone(a)
    with pytest.raises(RankTimeout, match="rank 1 did not answer in dispatch"):
        a.begin_dispatch(*parts(random_sent(SPEC, (0, 1), 1)[0]))


def test_what_is_reported_late_is_raised_before_rows_are_read(ranks: CudaRanks) -> None:
    a, b = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    sent = random_sent(SPEC, (0, 1), 1)
    hooks = [buffer.begin_dispatch(*parts(sent[buffer.rank])) for buffer in (a, b)]
    received = hooks[0]()
    a.exchange.wait_combine()  # b sends none
    with pytest.raises(RankTimeout, match="rank 1 did not answer in combine"):
        _ = received.x
    with pytest.raises(StaleEpoch, match="epoch 1 is over"):
        a.begin_combine(torch.zeros(a.most_rows, SPEC.hidden), received)


def test_an_epoch_after_a_loss_of_which_nobody_was_told_begins_with_a_vote(
    ranks: CudaRanks,
) -> None:
    a, _ = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    exchange_alone(a)
    a.set_active([0], 2)
    with pytest.raises(CommError, match="before the first vote of epoch 2"):
        a.begin_dispatch(*parts(random_sent(SPEC, (0,), 1)[0]))


def test_who_was_masked_must_be_asked_before_the_next_dispatch(ranks: CudaRanks) -> None:
    (a,) = ranks.start([0], on_timeout="mask").values()
    arguments = parts(random_sent(SPEC, (0,), 4)[0])
    kept = []
    for _ in range(2):
        kept.append(a.dispatch(*arguments))
        a.combine(torch.zeros(a.most_rows, SPEC.hidden), kept[-1])
    assert kept[1].masked == ()
    with pytest.raises(StaleEpoch, match="ask before the next dispatch"):
        _ = kept[0].masked


def test_other_threads_leave_the_table_to_the_one_that_exchanges(ranks: CudaRanks) -> None:
    a, b = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    before = a.exchange.table.clone()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(a.disconnect, [1]).result()
    assert a.active == (0,)
    assert torch.equal(a.exchange.table, before)
    ranks.vote([0])
    table = a.exchange.table
    assert table[Word.PEER + 1] == 0
    assert table[Word.ACTIVE : Word.ACTIVE + 2].tolist() == [1, 0]
    ranks.exchange(random_sent(SPEC, (0,), 3))
    assert b.active == (0, 1)


def test_interrupt_ends_a_wait(ranks: CudaRanks) -> None:
    a, _ = ranks.start([0, 1]).values()
    ranks.activate([0, 1])
    hook = a.begin_dispatch(*parts(random_sent(SPEC, (0, 1), 1)[0]))
    a.interrupt()
    with pytest.raises(Interrupted):
        hook()
    a.set_active([0, 1], 2)
    ranks.buffers[1].set_active([0, 1], 2)
    ranks.vote([0, 1])
    ranks.exchange(random_sent(SPEC, (0, 1), 4))


def test_bytes_travel_as_they_are(ranks: CudaRanks) -> None:
    (a,) = ranks.start([0]).values()
    s = random_sent(SPEC, (0,), 4)[0]
    for size in (1, 7, 64, SPEC.hidden * 4):
        x = torch.randint(0, 256, (s.x.shape[0], size), dtype=torch.uint8)
        received = a.begin_dispatch(x, s.expert_ids, s.weights, s.table)()
        desired, offsets, _ = expected_rows({0: replace(s, x=x)}, 0)
        assert torch.equal(received.x, desired)
        assert torch.equal(received.offsets, offsets)
        a.begin_combine(torch.zeros(received.count, SPEC.hidden), received)()


def test_calls_out_of_turn_and_wrong_sizes_are_refused(ranks: CudaRanks) -> None:
    (a,) = ranks.start([0]).values()
    s = random_sent(SPEC, (0,), 4)[0]
    with pytest.raises(ValueError, match="hidden size that is a multiple of 128"):
        a.begin_dispatch(*parts(s), fp8="float32")
    hook = a.begin_dispatch(*parts(s))
    with pytest.raises(CommError, match="dispatch before combine"):
        a.begin_dispatch(*parts(s))
    received = hook()
    y = apply_experts(received.x, received.offsets)
    with pytest.raises(ValueError, match="y must be"):
        a.begin_combine(y[1:], received)
    with pytest.raises(ValueError, match="reduce='home'"):
        a.begin_combine(y, received, weights=s.weights)
    a.begin_combine(y, received)()
    with pytest.raises(StaleEpoch, match="combined already"):
        a.begin_combine(y, received)
    with pytest.raises(StaleEpoch, match="were not copied"):
        _ = received.rows
    with pytest.raises(ValueError, match="start with the largest capacity"):
        a.grow(8)
