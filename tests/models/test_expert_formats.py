"""Experts quantized at load: each is what its format makes of it, in any company, or refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint, prompt_of, single_runner

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels.weight_formats import FORMATS
from flexpert.models.source import TINY, ExpertFormat, ModelSource

SIZES = {
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},  # transposed, with biases
}


@pytest.mark.parametrize("family", list(SIZES))
@pytest.mark.parametrize("name", ["mxfp4", "int8", "int4", "fp8"])
def test_experts_are_quantized_at_load(family: str, name: ExpertFormat, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path, torch.bfloat16, **SIZES[family])
    packed = ModelSource.open(str(path), experts=name)
    whole = ModelSource.open(str(path))
    for layer in range(whole.info.moe_layers):
        memory = torch.empty(packed.expert_shape(layer).nbytes, dtype=torch.uint8)
        packed.read_expert(layer, 3, memory)
        read = packed.expert_shape(layer).over(memory)
        desired = whole.load_experts(layer, [3])[3].quantized(FORMATS[name])
        assert read.shape == desired.shape == packed.expert_shape(layer)
        for ours, theirs in zip(read.tensors, desired.tensors, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path, torch.bfloat16, **SIZES["qwen3_moe"])
    weights = load_file(path / "model.safetensors")
    key = next(k for k in sorted(weights) if "experts.2.down_proj" in k)
    weights[key][3, 4] = math.inf
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    opened = ModelSource.open(str(path), experts="mxfp4")
    layer = next(i for i, name in enumerate(opened.experts_names) if key.startswith(name))
    with pytest.raises(ModelError, match=r"expert 2 of .*down_proj is not finite: element"):
        opened.load_experts(layer, [2])


def test_sizes_that_a_format_does_not_have_are_refused_at_open(tmp_path: Path) -> None:
    path = make_checkpoint(
        "qwen3_moe", tmp_path, torch.bfloat16, hidden_size=64, moe_intermediate_size=40
    )
    with pytest.raises(UnsupportedModel, match="a matrix has 40: choose another --quantization"):
        ModelSource.open(str(path), experts="mxfp4")
    ModelSource.open(str(path), experts="int8")


@pytest.mark.parametrize("name", ["mxfp4", "int8", "int4"])
def test_deterministic_answers_depend_on_no_company(name: ExpertFormat) -> None:
    prompt = prompt_of(40, seed=1)
    runner = single_runner(TINY, deterministic=True, experts=name, blocks=96)
    whole = runner.step({"alone": prompt})["alone"]
    company = {i: prompt_of(30, seed=i + 2) for i in range(6)}
    first = runner.step({"cut": prompt[:25], **company})["cut"]
    rest = [runner.step({"cut": [token]})["cut"] for token in prompt[25:]]
    assert torch.equal(torch.cat([first, *rest]), whole)
