"""Captured graphs of an engine go on with ranks that came, left or returned, as nixl_ep's do: after
`update_mask_buffer` the next replay has them, without a barrier and without an eager dispatch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from support.cuda_local import INTERPRETED
from support.nixl_ep_local import Ranks, Setup
from support.replayed_layers import ReplayedLayer, replay, send_early

from flexpert.comm.cuda.cuda_buffer import CudaBuffer
from flexpert.compat.nixl_ep import Buffer
from flexpert.compat.nixl_ep.device_exchange import VARIABLE

if not INTERPRETED:
    pytest.skip("ranks of one process wait for each other on a GPU", allow_module_level=True)

SETUP = Setup(capacity=4, max_tokens=4, hidden=64)


@dataclass
class Engine:
    """Ranks of an engine that replays its one graph from the first step on."""

    ranks: Ranks
    layers: dict[int, ReplayedLayer] = field(default_factory=dict)
    seed: int = 0

    def add(self, rank: int) -> None:
        """A rank that captures while it is alone."""
        self.layers[rank] = ReplayedLayer(self.ranks.add(rank), SETUP)

    def connect(self, ids: tuple[int, ...], peers: tuple[int, ...]) -> None:
        """`ids` and `peers` to each other, masked; in threads, for each waits for the other."""
        of = dict.fromkeys(ids, peers) | dict.fromkeys(peers, (*ids, *peers))
        self.ranks.each(of, lambda b: b.connect_ranks(of[b.rank], activate=False))

    def step(self, *ids: int) -> None:
        self.seed += 1
        replay(self.layers, SETUP, ids, self.seed)

    def buffer(self, rank: int) -> Buffer:
        return self.ranks.buffers[rank]

    def unmask(self, rank: int, peer: int) -> None:
        self.buffer(rank).update_mask_buffer(peer, False)

    def mask(self, rank: int, peer: int) -> None:
        self.buffer(rank).update_mask_buffer(peer, True)

    def status(self, rank: int) -> list[int]:
        status = torch.full((SETUP.capacity,), 9, dtype=torch.int32)
        self.buffer(rank).query_mask_buffer(status)
        return status.tolist()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv(VARIABLE, "cuda")
    with Ranks(SETUP) as ranks:
        yield Engine(ranks)


def two(engine: Engine) -> None:
    """Ranks 0 and 1, in step."""
    engine.add(0)
    engine.add(1)
    engine.connect((0,), (1,))
    engine.unmask(0, 1)
    engine.unmask(1, 0)
    engine.step(0, 1)


def test_a_newcomer_is_in_the_replay_after_it_was_unmasked(engine: Engine) -> None:
    two(engine)
    engine.add(2)
    engine.connect((0, 1), (2,))
    engine.step(0, 1)  # it is there, and masked
    for rank, peer in ((0, 2), (1, 2), (2, 0), (2, 1)):
        engine.unmask(rank, peer)
    for _ in range(3):
        engine.step(0, 1, 2)


def test_the_newcomer_may_unmask_all_others_first_and_send_before_they_have(
    engine: Engine,
) -> None:
    two(engine)
    engine.add(3)
    engine.connect((0, 1), (3,))
    engine.buffer(3).clean_mask_buffer()
    send_early(engine.layers[3], SETUP, seed=100)
    engine.step(0, 1)  # they are still without it
    engine.unmask(1, 3)
    engine.unmask(0, 3)
    replay(engine.layers, SETUP, (0, 1, 3), 100, early=(3,))
    engine.step(0, 1, 3)


def test_a_rank_leaves_and_its_id_comes_back_as_another_process_would(engine: Engine) -> None:
    two(engine)
    for _ in range(2):
        engine.buffer(0).disconnect_ranks([1])
        engine.buffer(1).disconnect_ranks([0])
        engine.step(0)
        engine.buffer(1).destroy()
        engine.add(1)
        engine.connect((0,), (1,))
        engine.step(0)
        engine.unmask(1, 0)
        engine.unmask(0, 1)
        engine.step(0, 1)


def test_two_processes_part_and_meet_again(engine: Engine) -> None:
    """Their flags of before are not those that they expect now, though the numbers are the same."""
    two(engine)
    for _ in range(2):
        engine.buffer(0).disconnect_ranks([1])
        engine.buffer(1).disconnect_ranks([0])
        engine.connect((0,), (1,))
        engine.unmask(1, 0)
        engine.unmask(0, 1)
        engine.step(0, 1)
    engine.buffer(0).disconnect_ranks([1])
    engine.buffer(1).disconnect_ranks([0])
    engine.connect((0,), (1,))
    engine.unmask(0, 1)
    engine.step(0)  # rank 1 has sent nothing
    assert engine.status(0) == [0, 1, 1, 1]


def test_what_a_rank_left_in_the_window_is_not_taken_for_its_successor_s(engine: Engine) -> None:
    """Of both, it is the first exchange, in which the numbers of flags are the same."""
    two(engine)
    engine.buffer(1).destroy()
    engine.buffer(0).disconnect_ranks([1])
    engine.add(1)
    engine.connect((0,), (1,))
    engine.unmask(0, 1)
    engine.unmask(1, 0)
    survivor = engine.layers[0]
    send_early(survivor, SETUP, seed=7)
    survivor.receive_dispatch()  # and rank 1 has sent nothing
    local = survivor.experts // SETUP.experts_per_rank == 0
    assert int(survivor.into.count.sum()) == int((local & (survivor.experts >= 0)).sum())
    assert engine.status(0) == [0, 1, 1, 1]


def test_ranks_masked_by_all_come_back_without_a_vote(engine: Engine) -> None:
    two(engine)
    for _ in range(2):
        engine.mask(0, 1)
        engine.mask(1, 0)
        engine.step(0)
        engine.step(1)
        engine.step(1)
        engine.unmask(0, 1)
        engine.unmask(1, 0)
        engine.step(0, 1)


def test_who_masks_and_unmasks_between_two_replays_has_done_nothing(engine: Engine) -> None:
    """Its peer, which was not told, goes on."""
    two(engine)
    engine.mask(0, 1)
    engine.unmask(0, 1)
    engine.step(0, 1)
    engine.mask(1, 0)
    engine.buffer(1).clean_mask_buffer()
    engine.step(0, 1)


def test_a_silent_rank_is_masked_by_a_replay_and_returns(engine: Engine) -> None:
    two(engine)
    engine.step(0, 1)
    for rank in (0, 1):  # each finds that the other does not come
        engine.step(rank)
        assert engine.status(rank)[1 - rank] == 1
    for rank in (0, 1):
        engine.buffer(rank).clean_mask_buffer()
    engine.step(0, 1)


def test_who_may_still_be_reading_is_not_sent_the_next_rows(engine: Engine) -> None:
    """Rank 1 is slow: rank 0 has given up the exchange that rank 1 is still in."""
    two(engine)
    engine.step(0)
    for _ in range(2):
        engine.buffer(0).clean_mask_buffer()
        rows = engine.layers[1].exchange.window.clone()
        engine.step(0)
        assert torch.equal(engine.layers[1].exchange.window, rows)
        assert engine.status(0) == [0, 1, 1, 1]
    slow = engine.layers[1]
    send_early(slow, SETUP, seed=9)
    slow.receive_dispatch()  # what rank 0 had sent is there
    slow.send_combine()
    slow.receive_combine()  # and rank 0 is not
    assert engine.status(1) == [1, 0, 1, 1]
    for rank in (0, 1):
        engine.buffer(rank).clean_mask_buffer()
    engine.step(0, 1)


def test_what_a_replay_found_is_not_forgotten_when_somebody_connects(engine: Engine) -> None:
    two(engine)
    engine.step(0)  # without rank 1
    engine.add(2)
    engine.connect((0,), (2,))
    engine.unmask(0, 2)
    engine.unmask(2, 0)
    assert engine.status(0) == [0, 1, 0, 1]
    engine.step(0, 2)


def test_a_vote_makes_links_that_were_counted_differently_begin_alike(engine: Engine) -> None:
    two(engine)
    engine.mask(0, 1)
    engine.step(0)
    engine.unmask(0, 1)  # rank 1 was not told, so it goes on with the old link
    assert tags(engine, 0)[1] != tags(engine, 1)[0]
    engine.ranks.each([0, 1], lambda b: b.barrier())
    engine.step(0, 1)


def tags(engine: Engine, rank: int) -> dict[int, int]:
    core = engine.buffer(rank).runtime
    assert isinstance(core, CudaBuffer)
    return core._tags
