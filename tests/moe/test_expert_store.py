"""Experts in exported memory: peers copy exactly what is there, and memory follows use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from flexpert.errors import FlexpertError
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.kernels.weight_formats import FP8, INT8, MXFP4
from flexpert.moe.expert_store import ExpertLoad, ExpertStore

PLAIN = ExpertShape(4, 6, 3, torch.bfloat16)
BIASED = ExpertShape(96, 64, 32, torch.bfloat16, biases=torch.bfloat16)


def test_packed_experts_come_from_a_peer_as_bytes() -> None:
    shapes = [ExpertShape(64, 96, 32, of, torch.bfloat16) for of in (MXFP4, INT8, FP8)]
    ours, theirs = (ExpertStore(0, shapes, experts=2) for _ in range(2))
    for layer in range(3):
        there = theirs.weights((layer, 1))
        for tensor in there.tensors:
            tensor.view(torch.uint8).random_(0, 256)
        theirs.filled((layer, 1))
        assert ours.copy((layer, 1), ours.import_memory(theirs.address))
        here = ours.weights((layer, 1))
        assert here.shape == shapes[layer]
        for mine, other in zip(here.tensors, there.tensors, strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


def store() -> ExpertStore:
    return ExpertStore(0, [PLAIN, BIASED], experts=5)


def fill(own: ExpertStore, key: tuple[int, int], seed: int) -> list[torch.Tensor]:
    made = own.weights(key)
    tensors = [made.gate_up, made.down, made.gate_up_bias, made.down_bias]
    draw = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape, generator=draw))
    own.filled(key)
    return [tensor.clone() for tensor in tensors if tensor is not None]


def read(own: ExpertStore, key: tuple[int, int]) -> list[torch.Tensor]:
    made = own.weights(key)
    tensors = [made.gate_up, made.down, made.gate_up_bias, made.down_bias]
    return [tensor for tensor in tensors if tensor is not None]


def test_a_peer_copies_an_expert_as_it_is_and_no_other_place_changes() -> None:
    ours, theirs = store(), store()
    keys = [(0, 0), (0, 1), (1, 0), (1, 4), (0, 4)]
    filled = {key: fill(theirs, key, seed) for seed, key in enumerate(keys)}
    peer = ours.import_memory(theirs.address)
    for key in [(1, 4), (0, 1)]:
        assert ours.copy(key, peer)
        assert key in ours
        for mine, there in zip(read(ours, key), filled[key], strict=True):
            assert torch.equal(mine, there)
    assert (0, 0) not in ours
    assert all(not tensor.any() for tensor in read(ours, (0, 0)))
    for key in keys:
        assert all(map(torch.equal, read(theirs, key), filled[key]))


def test_what_a_peer_does_not_have_is_not_copied() -> None:
    ours, theirs = store(), store()
    fill(theirs, (0, 1), seed=1)
    peer = ours.import_memory(theirs.address)
    assert not ours.copy((0, 2), peer)
    assert (0, 2) not in ours
    theirs.drop([(0, 1)])
    assert not ours.copy((0, 1), peer)


def test_dropped_experts_give_their_memory_back() -> None:
    own = ExpertStore(0, [ExpertShape(1024, 512, 256, torch.float32)], experts=8)
    empty = own.resident
    for expert in range(8):
        fill(own, (0, expert), expert)
    assert own.resident >= 8 * 3 << 20
    kept = [tensor.clone() for tensor in read(own, (0, 3))]
    own.drop((0, expert) for expert in range(8) if expert != 3)
    assert own.resident - empty < 4 << 20
    assert all(map(torch.equal, read(own, (0, 3)), kept))
    own.drop([(0, 3)])
    assert own.resident <= empty + 4096


class Files:
    """A checkpoint of which every expert but the last of a layer can be mapped."""

    def __init__(self) -> None:
        self.there = {
            (layer, expert): random_expert(shape, seed=10 * layer + expert)
            for layer, shape in enumerate((PLAIN, BIASED))
            for expert in range(5)
        }
        self.read: list[tuple[int, int]] = []

    def map_experts(self, layer: int, experts: Sequence[int]) -> dict[int, ExpertWeights]:
        return {expert: self.there[layer, expert] for expert in experts if expert != 4}

    def load_experts(
        self, layer: int, experts: Sequence[int], place: Callable[[int], ExpertWeights]
    ) -> object:
        for expert in experts:
            self.read.append((layer, expert))
            for to, tensor in zip(
                place(expert).tensors, self.there[layer, expert].tensors, strict=True
            ):
                to.copy_(tensor)
        return None

    def read_expert(self, layer: int, expert: int, into: torch.Tensor) -> None:
        raise NotImplementedError


def random_expert(shape: ExpertShape, seed: int) -> ExpertWeights:
    made, draw = shape.empty(), torch.Generator().manual_seed(seed)
    for tensor in made.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    return made


def mapping_store(rank: int, files: Files) -> ExpertStore:
    return ExpertStore(rank, [PLAIN, BIASED], experts=5, maps=files.map_experts)


def load_of(
    files: Files, keys: Sequence[tuple[int, int]], exporters: dict[int, bytes]
) -> ExpertLoad:
    return ExpertLoad(keys, exporters, files, lambda: None, lambda share: None)


def test_mapped_experts_take_no_place_and_others_are_copied() -> None:
    files = Files()
    own = mapping_store(0, files)
    empty = own.resident
    keys = [(0, 0), (0, 3), (1, 2), (1, 4)]
    assert own.load(load_of(files, keys, {})) == 0
    assert files.read == [(1, 4)]
    assert all(key in own for key in keys)
    assert own.weights((1, 2)) is files.there[1, 2]
    assert own.mapped == 2 * PLAIN.nbytes + BIASED.nbytes
    assert own.resident - empty == 2 * 4096 * -(-BIASED.nbytes // 4096) // 2 + 4096
    held = own.layer(1, [4, 2]).experts
    assert torch.equal(held[0].gate_up, files.there[1, 4].gate_up)
    assert held[1] is files.there[1, 2]


def test_a_peer_maps_for_itself_what_is_mapped_and_copies_the_rest() -> None:
    files, other = Files(), Files()
    theirs = mapping_store(0, files)
    keys = [(1, 2), (1, 4)]
    theirs.load(load_of(files, keys, {}))
    ours, plain = mapping_store(1, other), ExpertStore(2, [PLAIN, BIASED], experts=5)
    assert ours.load(load_of(other, keys, {0: theirs.address})) == 1
    assert (ours.weights((1, 2)) is other.there[1, 2], other.read) == (True, [])
    assert plain.load(load_of(other, keys, {0: theirs.address})) == 1
    assert other.read == [(1, 2)]  # which nobody has in memory


def test_dropped_mapped_experts_are_gone_and_come_again() -> None:
    files = Files()
    own = mapping_store(0, files)
    own.load(load_of(files, [(0, 1), (1, 1), (1, 4)], {}))
    own.drop([(0, 1), (1, 4)])
    assert ((0, 1) in own, (1, 1) in own, (1, 4) in own) == (False, True, False)
    assert own.mapped == BIASED.nbytes
    assert not own.weights((0, 1)).gate_up.any()  # a place of its own again
    own.drop([(0, 1)])
    own.load(load_of(files, [(0, 1)], {}))
    assert own.weights((0, 1)) is files.there[0, 1]


def test_what_cannot_be_mapped_because_it_is_damaged_fails_the_load() -> None:
    def damaged(layer: int, experts: Sequence[int]) -> dict[int, ExpertWeights]:
        raise FlexpertError("not finite")

    own = ExpertStore(0, [PLAIN, BIASED], experts=5, maps=damaged)
    with pytest.raises(FlexpertError, match="not finite"):
        own.load(load_of(Files(), [(0, 0)], {}))
    assert (0, 0) not in own
