"""Experts on slabs: peers copy exactly what is there, and a slab goes when nothing is on it.

Shelves lie in this machine's memory here; on a GPU only what `export_memory` and `import_memory` do
is other.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.experts import ExpertShape
from flexpert.moe.cuda.device_expert_store import DeviceExpertStore, ExportedDeviceExperts

PLAIN = ExpertShape(4, 6, 3, torch.bfloat16)
BIASED = ExpertShape(96, 64, 32, torch.bfloat16, biases=torch.bfloat16)
CPU = torch.device("cpu")


def store(slab_bytes: int = 40_000) -> DeviceExpertStore:
    """Two of the larger experts on a slab."""
    return DeviceExpertStore([PLAIN, BIASED], 5, CPU, slab_bytes=slab_bytes)


def fill(own: DeviceExpertStore, key: tuple[int, int], seed: int) -> list[torch.Tensor]:
    tensors = own.weights(key).tensors
    draw = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    own.filled(key)
    return [tensor.clone() for tensor in tensors]


def test_a_peer_copies_an_expert_as_it_is_and_no_other_place_changes() -> None:
    ours, theirs = store(), store()
    keys = [(0, 0), (0, 1), (1, 0), (1, 4), (0, 4), (1, 2), (1, 1)]
    filled = {key: fill(theirs, key, seed) for seed, key in enumerate(keys)}
    peer = ours.import_memory(theirs.address)
    for key in [(1, 4), (0, 1), (1, 1)]:
        assert ours.copy(key, peer)
        assert key in ours
        assert all(map(torch.equal, ours.weights(key).tensors, filled[key]))
    assert (0, 0) not in ours
    for key in keys:
        assert all(map(torch.equal, theirs.weights(key).tensors, filled[key]))


def test_what_a_peer_does_not_have_is_not_copied_and_takes_no_place() -> None:
    ours, theirs = store(), store()
    fill(theirs, (0, 1), seed=1)
    peer = ExportedDeviceExperts(theirs.address, ours)
    assert not ours.copy((0, 2), peer)
    theirs.weights((0, 3))  # a place that is not filled
    assert not ours.copy((0, 3), peer)
    theirs.drop([(0, 1)])
    assert not ours.copy((0, 1), peer)
    assert not ours._slabs


def test_a_place_is_used_again_and_an_empty_slab_goes() -> None:
    own = store()
    kept = fill(own, (1, 0), 0)
    fill(own, (1, 1), 1)
    assert len(own._slabs) == 1
    own.drop([(1, 1), (1, 3), (0, 0)])  # some of them are not there
    assert len(own._slabs) == 1
    fill(own, (1, 2), 2)
    assert len(own._slabs) == 1
    fill(own, (1, 4), 4)
    assert len(own._slabs) == 2
    own.drop([(1, 4)])
    assert len(own._slabs) == 1
    assert all(map(torch.equal, own.weights((1, 0)).tensors, kept))
    own.drop([(1, 0), (1, 2)])
    assert not own._slabs


def test_a_peer_that_has_an_old_slab_open_reads_the_new_one() -> None:
    """The number of a slab may come again, its address does not."""
    ours, theirs = store(), store()
    peer = ours.import_memory(theirs.address)
    for seed in range(3):
        theirs._last = -1
        expected = fill(theirs, (1, 0), seed)
        assert ours.copy((1, 0), peer)
        assert all(map(torch.equal, ours.weights((1, 0)).tensors, expected))
        theirs.drop([(1, 0)])
