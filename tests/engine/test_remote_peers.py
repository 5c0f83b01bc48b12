"""Which ranks of other machines meet, and what becomes of what cannot be read from there."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexpert.comm.errors import PeerUnreachable
from flexpert.comm.peer_memory import ImportedPages, export_pages
from flexpert.comm.remote_memory import HostRegion
from flexpert.engine.rank_protocol import Prepare
from flexpert.engine.remote_peers import EXPERTS, RemotePeers, to_meet
from flexpert.kernels.experts import ExpertShape
from flexpert.models.kv_cache import KVCache
from flexpert.models.source import ModelSource
from flexpert.models.state_view import StateKey, StateShape
from flexpert.moe.expert_store import ExpertLoad, ExpertStore
from flexpert.moe.placement import replan

SHAPES = [ExpertShape(4, 6, 3, torch.bfloat16)]


class NoStore:
    """Nobody is met through it."""

    def set(self, key: str, value: str, /) -> None:
        raise AssertionError(key)

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        raise AssertionError(key)

    def delete_key(self, key: str, /) -> bool:
        raise AssertionError(key)


class Breaking:
    """Memory of a peer whose link breaks after some reads."""

    def __init__(self, memory: ImportedPages, reads: int) -> None:
        self.memory, self.left = memory, reads

    def copy(self, parts: Sequence[tuple[int, Tensor]]) -> None:
        if self.left == 0:
            raise PeerUnreachable("cut")
        self.left -= 1
        self.memory.copy(parts)


class Files:
    """Experts whose bytes are all 7."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def load_experts(self, layer: int, experts: Sequence[int], place: object) -> None:
        self.read += experts


def plan(machines: dict[int, str], stay: set[int], come: set[int], leave: set[int]) -> Prepare:
    assert set(machines) == stay | come | leave
    members = dict.fromkeys(stay | come, b"")
    exporters = dict.fromkeys(stay | leave, b"")
    return Prepare(
        3, members, replan(None, members, layers=1, experts=4), exporters, machines=machines
    )


def test_newcomers_meet_who_has_experts_and_leavers_who_goes_on() -> None:
    machines = dict(enumerate("abcdefab"))
    found = plan(machines, stay={0, 1, 6}, come={2, 3}, leave={4, 5, 7})
    met = {rank: set(to_meet(found, rank)) for rank in machines}
    assert met[0] == {2, 3, 4, 5, 7}, "who stays is linked already, and 6 is on the same machine"
    assert met[2] == {0, 1, 6, 4, 5, 7}
    assert met[4] == {0, 1, 6, 2, 3}
    assert met[7] == {0, 6, 2, 3}, "1 is on the same machine"
    for a, b in itertools.permutations(machines, 2):
        assert (b in met[a]) == (a in met[b])


@pytest.mark.parametrize("machines", [{0: "a", 1: "a"}, {0: "a", 1: "b"}])
def test_survivors_of_a_loss_meet_nobody(machines: dict[int, str]) -> None:
    found = plan(machines, stay={0, 1}, come=set(), leave=set())
    assert not to_meet(found, 0)
    peers = RemotePeers(0, NoStore(), {EXPERTS: HostRegion(torch.zeros(1))}, exchange_timeout_s=3.0)
    peers.meet(found, threading.Event())
    assert peers.is_far(1) == (machines[1] == "b")
    with pytest.raises(PeerUnreachable):
        peers.kv(1, lambda: False)
    peers.close()


@pytest.mark.parametrize("reads", range(5))
def test_experts_of_a_link_that_breaks_come_from_the_files(reads: int) -> None:
    theirs, ours, files = (*(ExpertStore(n, SHAPES, experts=4) for n in (1, 0)), Files())
    keys = [(0, expert) for expert in range(4)]
    for key in keys:
        theirs.weights(key).gate_up.fill_(key[1] + 1)
        theirs.filled(key)
    far = {1: Breaking(ImportedPages(theirs.address), reads)}
    load = ExpertLoad(keys, {}, files, lambda: None, lambda share: None, far)
    copied = ours.load(load)
    assert copied == max(0, reads - 1), "the first read is that of the directory"
    assert files.read == list(range(copied, 4))
    for key in keys[:copied]:
        assert torch.equal(ours.weights(key).gate_up, theirs.weights(key).gate_up)


def test_an_expert_that_is_dropped_meanwhile_is_not_taken() -> None:
    theirs, ours = ExpertStore(1, SHAPES, experts=4), ExpertStore(0, SHAPES, experts=4)
    theirs.filled((0, 2))
    peer = ours.import_memory(theirs.address)
    theirs.drop([(0, 2)])
    assert not ours.copy((0, 2), peer)
    assert (0, 2) not in ours


def test_kv_that_is_read_piece_by_piece_is_what_is_copied_as_a_whole() -> None:
    info = ModelSource.open("tiny").info
    size = KVCache.nbytes(info, 5, 16)
    theirs = export_pages(size)
    theirs.bytes.copy_(torch.randint(256, (size,), dtype=torch.uint8))
    source = ImportedPages(theirs.address)
    one, other = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    pairs = [(4, 0), (1, 1), (0, 3)]
    copied = KVCache(info, 5, 16, one).copy_from(KVCache(info, 5, 16, source.bytes), pairs)
    assert KVCache(info, 5, 16, other).read_from(source, pairs) == copied > 0
    assert torch.equal(one, other)


def test_a_state_that_is_read_piece_by_piece_is_what_is_copied_as_a_whole() -> None:
    layer = (
        StateShape(StateKey("conv"), (5, 3), torch.bfloat16),
        StateShape(StateKey("recurrent"), (2, 7), torch.float32),
    )
    info = replace(ModelSource.open("tiny").info, states=(layer, layer[1:]))
    size = KVCache.nbytes(info, 5, 16, 4)
    theirs = export_pages(size)
    theirs.bytes.copy_(torch.randint(256, (size,), dtype=torch.uint8))
    source = ImportedPages(theirs.address)
    one, other = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
    mine, there = KVCache(info, 5, 16, one, 4), KVCache(info, 5, 16, source.bytes, 4)
    assert mine.copy_state(there, 3, 1) == info.state_nbytes == 30 + 2 * 56
    assert KVCache(info, 5, 16, other, 4).copy_state(source, 3, 1) == info.state_nbytes
    assert torch.equal(one, other)
    for here, those in zip(mine.states, there.states, strict=True):
        for key, state in here.items():
            assert state[1].view(torch.uint8).equal(those[key][3].view(torch.uint8))
            assert not state[[0, 2, 3]].any()
