"""Backend "nixl_ep" keeps the contract, over nixl_ep's interface on the CPU."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from support.comm_ranks import LIMIT_S, Rank, random_table, vote
from support.nixl_backend_local import (
    SLOTS,
    SPEC,
    NixlRanks,
    check_sums,
    exchange,
    results,
    sent_by,
)
from torch.distributed import HashStore

from flexpert.comm import (
    Buffer,
    CommError,
    Interrupted,
    PeerUnreachable,
    RankLost,
    RankTimeout,
    make_buffer,
)
from flexpert.comm.buffer import Scales
from flexpert.comm.errors import StaleEpoch
from flexpert.comm.interpreter import INTERPRETED
from flexpert.comm.nixl_ep.meeting import MeetingPlace, pair_store, store_of
from flexpert.comm.nixl_ep.nixl_ep_buffer import NixlEpBuffer
from flexpert.comm.nixl_ep.package import Package
from flexpert.compat import nixl_ep as compat

if not INTERPRETED:
    pytest.skip("ranks would look for NVIDIA's package", allow_module_level=True)


@pytest.fixture
def ranks() -> Iterator[NixlRanks]:
    with NixlRanks() as made:
        yield made


def test_a_rank_alone_exchanges_without_an_epoch(ranks: NixlRanks) -> None:
    ranks.add(2)
    for seed in range(6):
        ranks.exchange(2, seed=seed)


@pytest.mark.parametrize("fp8", [None, "float32", "power2"])
def test_rows_and_sums_are_those_of_the_oracle(ranks: NixlRanks, fp8: Scales | None) -> None:
    ranks.add(0, 1, 3)
    ranks.activate(0, 1, 3)
    for seed in range(6):
        ranks.exchange(0, 1, 3, seed=seed, fp8=fp8)


def test_packed_exponents_travel(ranks: NixlRanks) -> None:
    ranks.add(0, 1, spec=replace(SPEC, hidden=512))
    ranks.activate(0, 1)
    sent = sent_by((0, 1), 3, spec=replace(SPEC, hidden=512))
    ranks.each((0, 1), exchange, sent, "ue8m0")


def test_ids_join_and_leave_in_any_order(ranks: NixlRanks) -> None:
    ranks.add(1)
    ranks.activate(1)
    ranks.exchange(1, seed=1)
    ranks.add(3, 0)
    for epoch, ids in enumerate([(1, 3), (0, 1, 3), (0,), (1, 3), (3, 0)]):
        ranks.activate(*ids)
        for seed in range(3):
            ranks.exchange(*ids, seed=10 * epoch + seed)
    ranks.buffers[0].disconnect([1])
    ranks.buffers[3].disconnect([1])
    assert ranks.buffers[0].connected == (0, 3)
    ranks.buffers.pop(1).close()
    ranks.activate(0, 3)
    ranks.add(1)  # the id in another buffer, of which its peers know nothing
    ranks.activate(0, 1, 3)
    ranks.exchange(0, 1, 3, seed=99)


def test_halves_overlap_with_what_is_computed_in_between(ranks: NixlRanks) -> None:
    ranks.add(0, 1)
    ranks.activate(0, 1)
    sent = sent_by((0, 1), 5)
    y = results(sent)

    def run(buffer: NixlEpBuffer) -> None:
        s = sent[buffer.rank]
        received = buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)()
        out = torch.zeros_like(s.x)
        pending = buffer.begin_combine(y[buffer.rank], received, out=out)
        assert pending() is out
        check_sums(out, sent, y, buffer.rank)

    ranks.each((0, 1), run)


def test_ranks_that_meet_through_a_store_and_unmask_each_other_need_no_epoch() -> None:
    with NixlRanks(store=HashStore()) as ranks:
        for rank in (0, 2):
            ranks.buffers[rank] = NixlEpBuffer(rank, SPEC, slots=SLOTS, **ranks.options)
        ranks.each((0, 2), lambda b: b.connect([0, 2], activate=True))
        ranks.each((0, 2), vote)
        ranks.exchange(0, 2, seed=4)
        ranks.each((0, 2), lambda b: b.mask({0, 2} - {b.rank}))
        ranks.each((0, 2), vote)
        for rank in (0, 2):
            ranks.exchange(rank, seed=5)
        ranks.each((0, 2), lambda b: b.unmask({0, 2}))
        ranks.each((0, 2), vote)
        ranks.exchange(0, 2, seed=6)


def test_votes_carry_payloads_whether_or_not_anything_changes(ranks: NixlRanks) -> None:
    ranks.add(0, 1)
    ranks.activate(0, 1)
    for step in range(3):
        votes = ranks.each((0, 1), lambda b, s=step: vote(b, bytes([b.rank, s])))
        assert votes[0] == votes[1] == {0: bytes([0, step]), 1: bytes([1, step])}
    with pytest.raises(ValueError, match="47 bytes"):
        ranks.buffers[0].post_vote(bytes(48))


def test_after_a_broken_exchange_the_next_epoch_is_whole(ranks: NixlRanks) -> None:
    ranks.add(0, 1)
    ranks.activate(0, 1)
    # one has dispatched and the other has not even begun: their sets of flags are out of step
    first = sent_by((0, 1), 2)[0]
    ranks.buffers[0].begin_dispatch(first.x, first.expert_ids, first.weights, first.table)
    ranks.buffers[0].interrupt()
    with pytest.raises(Interrupted):
        ranks.buffers[0].post_vote(b"")
    for _ in range(2):
        ranks.activate(0, 1)
        for seed in range(3):
            ranks.exchange(0, 1, seed=seed)


def test_an_epoch_begins_with_a_vote(ranks: NixlRanks) -> None:
    ranks.add(0)
    ranks.buffers[0].set_active([0], 1)
    with pytest.raises(CommError, match="before the first vote of epoch 1"):
        exchange(ranks.buffers[0], sent_by((0,), 0))


def test_an_expert_without_an_active_owner_is_skipped_and_told(ranks: NixlRanks) -> None:
    ranks.add(0, 1)
    ranks.activate(0)
    sent = sent_by((0, 1), 2)
    s, buffer = sent[0], ranks.buffers[0]
    got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    y = got.x.clone()
    out = buffer.combine(y, got)
    missing = buffer.missing_results(got)
    owner = s.table.rank[s.expert_ids.clamp(min=0)]
    gone = (s.expert_ids >= 0) & (owner == 1)
    assert bool(gone.any())
    assert missing is not None
    assert missing.ranks == (1,)
    assert torch.equal(missing.choices, gone)
    kept = torch.where((s.expert_ids >= 0) & ~gone, s.weights, 0.0).sum(1, keepdim=True)
    assert torch.allclose(out.float(), kept * s.x.float(), atol=0.05, rtol=0.02)


@pytest.mark.slow
def test_a_silent_rank_is_named_and_the_survivors_go_on() -> None:
    with NixlRanks(timeout_s=1.5) as ranks:
        ranks.add(0, 1, 2)
        ranks.activate(0, 1, 2)
        ranks.exchange(0, 1, 2, seed=0)
        sent = sent_by((0, 1, 2), 3)

        def fails(buffer: NixlEpBuffer) -> RankTimeout:
            with pytest.raises(RankTimeout) as caught:
                exchange(buffer, sent)
            with pytest.raises(StaleEpoch):
                buffer.post_vote(b"")
            return caught.value

        for error in ranks.each((0, 1), fails).values():
            assert error.ranks == (2,)
            assert (error.phase, error.epoch) == ("dispatch", 1)
        ranks.activate(0, 1)
        ranks.exchange(0, 1, seed=4)
        ranks.activate(0, 1, 2)  # it had only slept
        ranks.exchange(0, 1, 2, seed=5)


@pytest.mark.slow
def test_a_silent_rank_is_masked_and_what_it_took_along_is_told() -> None:
    with NixlRanks(timeout_s=1.5, on_timeout="mask") as ranks:
        ranks.add(0, 1, 2)
        ranks.activate(0, 1, 2)
        sent = sent_by((0, 1, 2), 3)
        y = results(sent)

        def goes_on(buffer: NixlEpBuffer) -> None:
            s = sent[buffer.rank]
            got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
            assert got.masked == (2,)
            assert set(got.source.tolist()) <= {0, 1}
            slot = torch.repeat_interleave(
                torch.arange(len(got.offsets) - 1), got.offsets.long().diff()
            )
            rows = (got.x.float() * (1.0 + 0.25 * slot[:, None])).bfloat16()
            out = buffer.combine(rows, got)
            check_sums(out, sent, y, buffer.rank, without=[2])
            missing = buffer.missing_results(got)
            assert missing is not None
            assert missing.ranks == (2,)
            assert buffer.active == (0, 1)

        ranks.each((0, 1), goes_on)
        ranks.each((0, 1), vote)
        ranks.exchange(0, 1, seed=7)


# ---- processes ----------------------------------------------------------------------------------


def process(rank: int, **options: object) -> Rank:
    return Rank(rank, SPEC, backend="nixl_ep", slots=SLOTS, **options)


def connect(buffer: Buffer, addresses: dict[int, bytes]) -> tuple[int, ...]:
    buffer.connect(addresses)
    return buffer.connected


def run_epoch(buffer: Buffer, ids: tuple[int, ...], epoch: int) -> int:
    assert isinstance(buffer, NixlEpBuffer)
    buffer.set_active(ids, epoch)
    vote(buffer)
    for seed in range(4):
        exchange(buffer, sent_by(ids, 10 * epoch + seed))
    return 4


def until_lost(buffer: Buffer, ids: tuple[int, ...]) -> tuple[int, ...]:
    assert isinstance(buffer, NixlEpBuffer)
    sent = sent_by(ids, 2)
    while True:
        try:
            exchange(buffer, sent)
        except (RankLost, RankTimeout) as error:
            return error.ranks


@pytest.mark.slow
def test_a_killed_process_is_named_and_its_id_used_again() -> None:
    # who notices one phase later than another waits for it in vain, too
    limit_s = 6.0
    ranks = {rank: process(rank, timeout_s=limit_s) for rank in (0, 1, 2)}

    def everybody(ids: tuple[int, ...], task: object, *args: object) -> list[object]:
        for rank in ids:
            ranks[rank].ask(task, *args)  # type: ignore[arg-type]
        return [ranks[rank].answer() for rank in ids]

    try:
        ids = (0, 1, 2)
        addresses = {rank: r.address for rank, r in ranks.items()}
        assert everybody(ids, connect, addresses) == [ids] * 3
        assert everybody(ids, run_epoch, ids, 1) == [4] * 3
        for rank in ids:
            ranks[rank].ask(until_lost, ids)
        ranks[1].kill()
        assert [ranks[rank].answer() for rank in (0, 2)] == [(1,), (1,)]
        assert everybody((0, 2), run_epoch, (0, 2), 2) == [4] * 2
        everybody((0, 2), disconnect, (1,))
        ranks[1] = process(1, timeout_s=limit_s)
        addresses[1] = ranks[1].address
        assert everybody(ids, connect, addresses) == [ids] * 3
        assert everybody(ids, run_epoch, ids, 3) == [4] * 3
    finally:
        for rank in ranks.values():
            rank.kill()


def disconnect(buffer: Buffer, ids: tuple[int, ...]) -> None:
    buffer.disconnect(ids)


def test_a_peer_that_does_not_come_is_named_in_time(ranks: NixlRanks) -> None:
    ranks.add(0)
    with NixlRanks() as others:
        others.add(1)
        with pytest.raises(RankTimeout, match="rank 1 did not answer in connect"):
            ranks.buffers[0].connect({1: others.buffers[1].address}, timeout_s=0.2)
        assert ranks.buffers[0].connected == (0,)


def test_an_expert_chosen_twice_gets_one_row_and_both_weights(ranks: NixlRanks) -> None:
    ranks.add(0)
    buffer, tokens = ranks.buffers[0], SPEC.max_tokens
    x = torch.randn(tokens, SPEC.hidden).bfloat16()
    table = random_table((0,), 10, 0, 0)
    chosen = torch.tensor([3, 7, 3, 3]).expand(tokens, 4)
    weights = torch.tensor([0.5, 0.25, 1.0, 2.0]).expand(tokens, 4).contiguous()
    got = buffer.dispatch(x, chosen.contiguous(), weights, table)
    assert int(got.offsets[-1]) == 2 * tokens
    assert torch.equal(buffer.combine(got.x, got), (3.75 * x.float()).bfloat16())


# ---- what is refused ----------------------------------------------------------------------------


def test_what_the_kernels_do_not_do_is_refused_before_anything_is_sent(ranks: NixlRanks) -> None:
    ranks.add(0)
    buffer, s = ranks.buffers[0], sent_by((0,), 0)[0]
    with pytest.raises(ValueError, match=r"not torch\.uint8"):
        buffer.dispatch(s.x.view(torch.uint8), s.expert_ids, s.weights, s.table)
    wide = replace(random_table((0,), 20, 0, 0), slots=SLOTS)
    with pytest.raises(ValueError, match="outside of the 11"):
        buffer.dispatch(s.x, s.expert_ids, s.weights, wide)
    got = buffer.dispatch(s.x, s.expert_ids, s.weights, s.table)
    with pytest.raises(ValueError, match="reduce='rank' only"):
        buffer.combine(got.x, got, reduce="home")
    with pytest.raises(CommError, match="router weights"):
        _ = got.weights
    buffer.combine(got.x, got)
    with pytest.raises(StaleEpoch, match="combined already"):
        buffer.combine(got.x, got)


@pytest.mark.parametrize("capacity", [1, 7, 8, 16, 24, 32])
def test_capacities_that_nixl_ep_takes(capacity: int) -> None:
    buffer = make_buffer(0, replace(SPEC, capacity=capacity), backend="nixl_ep", slots=2)
    assert isinstance(buffer, NixlEpBuffer)
    buffer.close()


@pytest.mark.parametrize("capacity", [9, 12, 33, 40])
def test_other_capacities_are_refused_with_those_it_takes(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 8, 16, 24 or 32, not {capacity}"):
        make_buffer(0, replace(SPEC, capacity=capacity), backend="nixl_ep", slots=2)


def test_other_dtypes_and_missing_slots_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 rows, not torch\.float32"):
        make_buffer(0, replace(SPEC, dtype=torch.float32), backend="nixl_ep", slots=2)
    with pytest.raises(ValueError, match="needs it"):
        make_buffer(0, SPEC, backend="nixl_ep")
    with pytest.raises(ValueError, match="for no other"):
        make_buffer(0, SPEC, slots=2)


def test_a_peer_of_other_sizes_is_refused(ranks: NixlRanks) -> None:
    ranks.add(0)
    with NixlRanks() as others:
        others.add(1, spec=replace(SPEC, max_tokens=8))
        with pytest.raises(ValueError, match="other sizes"):
            ranks.buffers[0].connect({1: others.buffers[1].address})
    assert LIMIT_S > 0


# ---- what NVIDIA's kernels rely on, and the CPU's do not ----------------------------------------


class Watched(compat.Buffer):
    """Writes down, in one list for all ranks, what is launched and who is let in."""

    log: ClassVar[list[tuple[int, str]]] = []
    lock = threading.Lock()

    def _note(self, what: str) -> None:
        with self.lock:
            self.log.append((self.rank, what))

    def dispatch(self, *args: Any, **options: Any) -> Any:
        self._note("launch")
        return super().dispatch(*args, **options)

    def combine(self, *args: Any, **options: Any) -> Any:
        self._note("launch")
        return super().combine(*args, **options)

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        self._note("mask" if mask else "unmask")
        super().update_mask_buffer(rank_to_mask, mask)


@pytest.fixture
def watched() -> Iterator[NixlRanks]:
    Watched.log.clear()
    module = SimpleNamespace(Buffer=Watched, topk_idx_t=torch.int64)
    with NixlRanks(package=Package(module, fixed=True)) as made:
        yield made


def test_nobody_is_let_in_before_all_have_cleared_their_flags(watched: NixlRanks) -> None:
    watched.add(0, 1, 2)
    for epoch in range(4):
        Watched.log.clear()
        watched.activate(0, 1, 2)
        steps = [what for _, what in Watched.log]
        assert steps.count("launch") == 6
        assert steps.count("unmask") == 6
        assert steps.index("unmask") > max(at for at, s in enumerate(steps) if s == "launch")
        last_mask = max(at for at, s in enumerate(steps) if s == "mask")
        for rank in range(3):  # and nobody clears while it may be sent anything
            assert Watched.log.index((rank, "mask")) < Watched.log.index((rank, "launch"))
        assert last_mask < steps.index("unmask")
        watched.exchange(0, 1, 2, seed=epoch)


def test_ranks_that_broke_off_at_different_points_are_in_step_again(watched: NixlRanks) -> None:
    watched.add(0, 1)
    watched.activate(0, 1)
    s = sent_by((0, 1), 2)[0]
    watched.buffers[0].begin_dispatch(s.x, s.expert_ids, s.weights, s.table)
    watched.activate(0, 1)
    for rank in (0, 1):
        launches = [what for r, what in Watched.log if (r, what) == (rank, "launch")]
        # its two sets of flags take turns with each launch
        assert len(launches) % 2 == 0


def test_a_vote_in_which_nothing_changes_launches_nothing(watched: NixlRanks) -> None:
    watched.add(0, 1)
    watched.activate(0, 1)
    Watched.log.clear()
    watched.each((0, 1), vote)
    assert Watched.log == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_histories(seed: int) -> None:
    """Epochs of any ids; some end in the middle of an exchange; ids leave and come again."""
    dice = random.Random(seed)
    with NixlRanks() as ranks:
        ranks.add(0, 1, 2, 3)
        for turn in range(25):
            ids = tuple(sorted(dice.sample(range(4), dice.randint(1, 4))))
            ranks.activate(*ids)
            for step in range(dice.randint(0, 3)):
                ranks.exchange(*ids, seed=100 * turn + step)
                if dice.random() < 0.5:
                    ranks.each(ids, vote)
            event = dice.random()
            if event < 0.3:  # one rank breaks off after a part of an exchange
                rank = dice.choice(ids)
                s, buffer = sent_by(ids, turn)[rank], ranks.buffers[rank]
                pending = buffer.begin_dispatch(s.x, s.expert_ids, s.weights, s.table)
                if len(ids) == 1 and dice.random() < 0.5:
                    pending()
                buffer.interrupt()
            elif event < 0.5:
                gone = dice.randrange(4)
                ranks.buffers.pop(gone).close()
                for buffer in ranks.buffers.values():
                    buffer.disconnect([gone])
                ranks.add(gone)


def test_what_nixl_ep_says_travels_through_a_peers_store_byte_for_byte() -> None:
    """As its Python does it: set, wait, multi_get, delete_key."""
    one, metadata = MeetingPlace(), bytes(range(256)) * 20
    address = one.address(b"", SPEC, SLOTS)
    try:
        with store_of(1, address) as theirs:
            pairs = (pair_store(store, "inside", b"a", b"b") for store in (one.store, theirs))
            here, there = pairs
            here.set("NIXL_EP/0", metadata)
            there.wait(["NIXL_EP/0"], timedelta(seconds=LIMIT_S))
            assert there.multi_get(["NIXL_EP/0"]) == [metadata]
            assert here.delete_key("NIXL_EP/0")
            assert not there.check(["NIXL_EP/0"])
    finally:
        one.close()
    with pytest.raises(PeerUnreachable), store_of(1, address):
        pass


class SizedByActive(compat.Buffer):
    """As releases before 1.5, which do not heed `num_experts`."""

    def dispatch(self, *args: Any, **options: Any) -> Any:
        del options["num_experts"]
        return super().dispatch(*args, **options)


def test_a_nixl_ep_that_sizes_tensors_by_who_is_active_is_followed() -> None:
    module = SimpleNamespace(Buffer=SizedByActive, topk_idx_t=torch.int64)
    with NixlRanks(package=Package(module, fixed=False)) as ranks:
        ranks.add(0, 1, 3)
        assert not ranks.buffers[0].capabilities.graph_capture
        for epoch, ids in enumerate([(0, 1), (0, 1, 3), (0,), (1, 3), (0, 1)]):
            ranks.activate(*ids)
            for seed in range(2):
                ranks.exchange(*ids, seed=10 * epoch + seed)
