"""Experts in exported memory: peers copy exactly what is there, and memory follows use."""

from __future__ import annotations

import torch

from flexpert.kernels.experts import ExpertShape
from flexpert.kernels.weight_formats import FP8, INT8, MXFP4
from flexpert.moe.expert_store import ExpertStore

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
