"""Random histories of GPU ranks: who is there changes, some fall silent, and sums are always right.

In Triton's interpreter; each history is a function of its seed.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from support.comm_local import applied, masked_ids, same_bits
from support.comm_ranks import apply_experts, random_sent, spec_of
from support.cuda_local import INTERPRETED, parts
from test_cuda_buffer import CudaRanks

from flexpert.comm.buffer import Reduce
from flexpert.comm.cuda.cuda_received import CudaReceived

if not INTERPRETED:
    pytest.skip("ranks of one process wait for each other on a GPU", allow_module_level=True)

SPEC = spec_of(4, dtype=torch.float32, max_tokens=3, hidden=8, topk=3)
STEPS = 6


class History:
    """Ranks with on_timeout="mask", and what each of them must know of the others.

    view: id → ids that it exchanges with, itself among them.
    """

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.seed = seed
        self.ranks = CudaRanks()
        self.ranks.start(range(SPEC.capacity), SPEC, "mask")
        self.view: dict[int, set[int]] = {}
        self.begin()

    def begin(self) -> None:
        """A new epoch of some of the ids."""
        ids = self.dice.sample(range(SPEC.capacity), self.dice.randint(1, SPEC.capacity))
        self.ranks.activate(sorted(ids))
        self.view = {rank: set(ids) for rank in ids}

    def exchange(self, silent: set[int], mute: set[int]) -> None:
        """All ranks but `silent` dispatch; all of those but `mute` combine."""
        self.seed += 1000
        sent = random_sent(SPEC, tuple(sorted(self.view)), self.seed)
        reduce: Reduce = self.dice.choice(("rank", "home"))
        here = [rank for rank in sorted(self.view) if rank not in silent]
        hooks = {r: self.ranks.buffers[r].begin_dispatch(*parts(sent[r])) for r in here}
        got: dict[int, CudaReceived] = {}
        for rank, hook in hooks.items():
            received = hook()
            assert isinstance(received, CudaReceived)
            got[rank] = received
            gone = self.view[rank] & silent
            assert set(received.masked) == gone
            self.view[rank] -= gone
        for rank in here:  # who has been left out sends, but nobody listens
            heard = {r for r in here if r in self.view[rank]}
            sources = set(got[rank].source.tolist())
            assert sources <= heard
        speaking = [rank for rank in here if rank not in mute]
        y = {rank: apply_experts(got[rank].x, got[rank].offsets) for rank in speaking}
        sums = {
            rank: self.ranks.buffers[rank].begin_combine(y[rank], got[rank], reduce=reduce)
            for rank in speaking
        }
        for rank, pending in sums.items():
            self.view[rank] -= mute
            out = pending()
            s = sent[rank]
            desired = applied(replace(s, expert_ids=masked_ids(s, self.view[rank])), reduce)
            assert same_bits(out, desired), (self.seed, rank)
            assert set(self.ranks.buffers[rank].active) == self.view[rank]
        for rank in silent | mute:  # their exchange is over, too: only an epoch brings them back
            self.view.pop(rank, None)

    def step(self) -> None:
        move = self.dice.choice(("begin", "exchange", "exchange", "silent", "mute", "vote"))
        several = len(self.view) > 1
        if move == "begin":
            self.begin()
        elif move == "vote":
            self.ranks.vote(sorted(self.view))
        elif move == "silent" and several:
            self.exchange({self.dice.choice(sorted(self.view))}, set())
        elif move == "mute" and several:
            self.exchange(set(), {self.dice.choice(sorted(self.view))})
        else:
            self.exchange(set(), set())

    def close(self) -> None:
        for buffer in self.ranks.buffers.values():
            buffer.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_sums_are_right_whoever_comes_goes_or_falls_silent(seed: int) -> None:
    history = History(seed)
    try:
        for _ in range(STEPS):
            history.step()
    finally:
        history.close()
