"""Experts on slabs: peers copy exactly what is there, the rest comes from the files, and a slab
goes when nothing is on it.

Slabs lie in this machine's memory here; on a GPU only what `export_memory` and `import_memory` do
is other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.comm.capture_guard import CAPTURE_GUARD
from flexpert.errors import ModelError
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.moe.cuda.device_expert_store import DeviceExpertStore
from flexpert.moe.expert_store import ExpertLoad, Key

PLAIN = ExpertShape(4, 6, 3, torch.bfloat16)
BIASED = ExpertShape(96, 64, 32, torch.bfloat16, biases=torch.bfloat16)
SHAPES = [PLAIN, BIASED]
CPU = torch.device("cpu")


class Files:
    """Each expert has bytes of its own; `read` says which were read."""

    def __init__(self, broken: Key | None = None) -> None:
        self.broken = broken
        self.read: list[Key] = []

    def load_experts(
        self, layer: int, experts: Sequence[int], place: Callable[[int], ExpertWeights]
    ) -> object:
        raise NotImplementedError

    def read_expert(self, layer: int, expert: int, into: torch.Tensor) -> None:
        if (layer, expert) == self.broken:
            raise ModelError("it cannot be read")
        self.read.append((layer, expert))
        into.copy_(content((layer, expert)))


def content(key: Key) -> torch.Tensor:
    draw = torch.Generator().manual_seed(key[0] * 100 + key[1])
    return torch.randint(0, 256, (SHAPES[key[0]].nbytes,), generator=draw, dtype=torch.uint8)


def store(rank: int = 0, slab_bytes: int = 40_000) -> DeviceExpertStore:
    """Two of the larger experts on a slab."""
    return DeviceExpertStore(rank, SHAPES, 5, CPU, slab_bytes=slab_bytes)


def load(
    own: DeviceExpertStore,
    keys: list[Key],
    *peers: DeviceExpertStore,
    files: Files | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    exporters = {7 + index: peer.address for index, peer in enumerate(peers)}
    shares: list[float] = []
    copied = own.load(ExpertLoad(sorted(keys), exporters, files or Files(), check, shares.append))
    assert all(0 < share <= 1 for share in shares)
    return copied


def right(own: DeviceExpertStore, keys: list[Key]) -> bool:
    return all(key in own and torch.equal(own.memory(key), content(key)) for key in keys)


def test_what_a_peer_has_is_copied_and_the_rest_is_read_from_the_files() -> None:
    ours, theirs, files = store(), store(), Files()
    has = [(0, 0), (0, 1), (1, 0), (1, 4), (0, 4), (1, 2), (1, 1)]
    load(theirs, has)
    wanted = [(1, 4), (0, 1), (1, 1), (0, 2), (1, 3)]
    assert load(ours, wanted, theirs, files=files) == 3
    assert sorted(files.read) == [(0, 2), (1, 3)]
    assert right(ours, wanted)
    assert (0, 0) not in ours
    assert right(theirs, has)


def test_a_rank_that_copies_all_has_what_uploads_need_before_it_serves() -> None:
    ours, theirs = store(), store()
    keys = [(0, 0), (1, 1)]
    load(theirs, keys)
    assert load(ours, keys, theirs) == 2
    assert ours._uploader.prepared == min(2, len(os.sched_getaffinity(0)))


def test_a_place_that_is_not_filled_yet_is_not_copied() -> None:
    ours, theirs, files = store(), store(), Files()
    load(theirs, [(0, 1)])
    theirs.reserve([(0, 3)])
    theirs.drop([(0, 1)])
    assert load(ours, [(0, 1), (0, 3)], theirs, files=files) == 0
    assert sorted(files.read) == [(0, 1), (0, 3)]


def test_a_place_that_changes_hands_while_it_is_copied_is_read_from_the_files() -> None:
    ours, theirs, files = store(), store(), Files()
    load(theirs, [(0, 1), (0, 2)])
    synchronize = ours._stream.synchronize

    def moved() -> None:  # when the copies are computed, the peer has dropped one of the two
        synchronize()
        theirs.drop([(0, 2)])

    ours._stream.synchronize = moved  # type: ignore[method-assign]
    assert load(ours, [(0, 1), (0, 2)], theirs, files=files) == 1
    assert files.read == [(0, 2)]
    assert right(ours, [(0, 1), (0, 2)])


def test_the_first_error_ends_a_load_and_its_places_can_be_dropped() -> None:
    own = store()
    load(own, [(1, 0)])
    with pytest.raises(ModelError, match="cannot be read"):
        load(own, [(1, 1), (1, 2), (1, 3), (1, 4)], files=Files(broken=(1, 2)))

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load(own, [(0, 1)], check=stop)
    own.drop([(1, 1), (1, 2), (1, 3), (1, 4), (0, 1)])
    assert len(own._slabs) == 1
    assert right(own, [(1, 0)])


def test_a_place_is_used_again_and_an_empty_slab_goes() -> None:
    own = store()
    load(own, [(1, 0), (1, 1)])
    assert len(own._slabs) == 1
    own.drop([(1, 1), (1, 3), (0, 0)])  # some of them are not there
    load(own, [(1, 2)])
    assert len(own._slabs) == 1
    load(own, [(1, 4), (1, 3), (1, 1)])
    assert len(own._slabs) == 3
    own.drop([(1, 1), (1, 3), (1, 4)])
    assert len(own._slabs) == 1
    assert right(own, [(1, 0), (1, 2)])
    own.drop([(1, 0), (1, 2)])
    assert not own._slabs
    assert CAPTURE_GUARD.settle(10)  # their memory is given back in the background


def test_a_peer_that_has_an_old_slab_open_reads_the_new_one() -> None:
    """The number of a slab may come again, its address does not."""
    ours, theirs = store(), store()
    peer = ours.import_memory(theirs.address)
    for expert in (0, 3, 2):
        theirs._last = -1
        load(theirs, [(1, expert)])
        there = peer.memory((1, expert), peer.entry((1, expert)))
        assert there is not None
        assert torch.equal(there, content((1, expert)))
        theirs.drop([(1, expert)])


def test_slots_are_computed_with_where_their_experts_lie() -> None:
    own = store()
    load(own, [(1, 0), (1, 1), (1, 2)])
    found = own.layer(1, [2, 0]).table
    for slot, expert in enumerate((2, 0)):
        tensors = own.weights((1, expert))
        expected = [tensors.gate_up, tensors.down, tensors.gate_up_bias, tensors.down_bias]
        assert found[:, slot].tolist() == [t.data_ptr() for t in expected if t is not None] + [0, 0]
