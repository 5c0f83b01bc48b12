"""Weights reach a GPU through pinned memory as they are in the files."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from torch import Tensor

from flexpert.kernels.device_stream import CudaStream
from flexpert.models import dense_weights, registrations
from flexpert.models.dense_weights import load_dense
from flexpert.models.source import ModelSource
from flexpert.parallel import run_parallel

LARGE = {"hidden_size": 1024, "moe_intermediate_size": 512, "vocab_size": 40_000}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    path = tmp_path_factory.mktemp("large")
    make_checkpoint("qwen3_moe", path, torch.bfloat16, **LARGE)
    return ModelSource.open(str(path))


def dense(opened: ModelSource, stream: CudaStream | None) -> dict[str, Tensor]:
    model: Any = opened.build(attention=registrations.IMPLEMENTATION)
    for name in opened.experts_names:
        model.get_submodule(name)._parameters.clear()
    with torch.no_grad():
        load_dense(model, opened, stream)
    state = model.state_dict()
    return {name: state[name] for name in state if name not in opened.expert_parameters}


@pytest.mark.parametrize("piece", [4096, dense_weights.PIECE])
def test_every_gpu_gets_the_dense_weights_of_the_host(
    piece: int, opened: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_weights, "PIECE", piece)
    host = dense(opened, None)
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for _ in range(5):
            copied = dense(opened, CudaStream(device))
            assert copied.keys() == host.keys()
            for name, tensor in copied.items():
                assert tensor.device == device
                assert torch.equal(tensor.cpu(), host[name]), name


def test_experts_are_read_into_pinned_memory(opened: ModelSource) -> None:
    shape = opened.expert_shape()
    keys = [
        (layer, expert)
        for layer in range(opened.info.moe_layers)
        for expert in range(opened.info.experts)
    ]
    local = threading.local()

    def compare(key: tuple[int, int]) -> None:
        if not hasattr(local, "pinned"):
            local.pinned = torch.zeros(shape.nbytes, dtype=torch.uint8, pin_memory=True)
        opened.read_expert(*key, local.pinned)
        expected = shape.empty()
        opened._experts.read_converted(*key, expected)
        for ours, theirs in zip(shape.over(local.pinned).tensors, expected.tensors, strict=True):
            assert torch.equal(ours, theirs)

    run_parallel(keys, compare, 8)
