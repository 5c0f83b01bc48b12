"""The host's copy of the experts: what it has comes from it, the rest from the files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from flexpert.comm import PeerUnreachable
from flexpert.errors import ModelError
from flexpert.kernels.experts import ExpertShape, ExpertWeights
from flexpert.moe.expert_cache import CachedExperts, ExpertCache

SHAPES = [ExpertShape(4, 6, 3, torch.bfloat16), ExpertShape(96, 64, 32, torch.bfloat16)]
EXPERTS = 5


class Files:
    """Each expert has bytes of its own; `read` says which were read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def load_experts(
        self, layer: int, experts: Sequence[int], place: Callable[[int], ExpertWeights]
    ) -> object:
        return layer, experts

    def read_expert(self, layer: int, expert: int, into: torch.Tensor) -> None:
        if (layer, expert) == (1, 4):
            raise ModelError("it cannot be read")
        self.read.append((layer, expert))
        into.fill_(layer * 100 + expert + 1)


def test_what_is_filled_comes_from_the_cache_and_the_rest_from_the_files() -> None:
    files = Files()
    cache = ExpertCache(SHAPES, EXPERTS, 1 << 30)
    assert len(cache.keys) == 2 * EXPERTS
    for key in [(0, 2), (1, 0)]:
        cache.fill(Files(), key)
    with pytest.raises(ModelError):
        cache.fill(Files(), (1, 4))
    cached = CachedExperts(cache.address, SHAPES, EXPERTS, files)
    cache.close()  # who has it open goes on
    for layer, expert in [(0, 2), (1, 0), (1, 1)]:
        into = torch.zeros(SHAPES[layer].nbytes, dtype=torch.uint8)
        cached.read_expert(layer, expert, into)
        assert (into == layer * 100 + expert + 1).all()
    assert files.read == [(1, 1)]
    with pytest.raises(ModelError):
        cached.read_expert(1, 4, torch.zeros(SHAPES[1].nbytes, dtype=torch.uint8))


def test_a_part_of_the_experts_is_a_part_of_each_layer_and_within_the_bytes() -> None:
    layers = [SHAPES[0]] * 4
    cache = ExpertCache(layers, EXPERTS, 9 * SHAPES[0].nbytes)
    assert cache.nbytes == 9 * SHAPES[0].nbytes
    counts = [sum(layer == key[0] for key in cache.keys) for layer in range(4)]
    assert max(counts) - min(counts) <= 1
    cache.close()


def test_a_cache_that_is_gone_cannot_be_opened() -> None:
    cache = ExpertCache(SHAPES, EXPERTS, 1 << 30)
    cache.close()
    with pytest.raises(PeerUnreachable):
        CachedExperts(cache.address, SHAPES, EXPERTS, Files())
