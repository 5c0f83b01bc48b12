"""fp8 checkpoints: dequantized for a CPU, taken as they are for a GPU, refused where malformed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import prompt_of, reference_logits, single_runner
from support.fp8_checkpoints import change_settings, make_fp8_checkpoint

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels.experts import ExpertWeights
from flexpert.kernels.weight_formats import FP8
from flexpert.models.source import ModelSource


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_fp8_checkpoint("qwen3_moe", tmp_path)


def experts(path: Path, **opened: str) -> list[ExpertWeights]:
    """All of a checkpoint."""
    source = ModelSource.open(str(path), **opened)  # type: ignore[arg-type]
    every = range(source.info.experts)
    found = [source.load_experts(layer, every) for layer in range(source.info.moe_layers)]
    assert all(e.nbytes <= source.expert_nbytes() for layer in found for e in layer.values())
    return [layer[expert] for layer in found for expert in every]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_a_cpu_serves_what_transformers_computes_with_the_dequantized_weights(
    family: str, tmp_path: Path
) -> None:
    small, whole = make_fp8_checkpoint(family, tmp_path)
    prompt = prompt_of(12, 3)
    got = single_runner(small).step({"a": prompt})["a"]
    torch.testing.assert_close(got, reference_logits(whole, prompt), rtol=2e-4, atol=2e-4)
    for a, b in zip(experts(small), experts(whole), strict=True):
        assert torch.equal(a.gate_up, b.gate_up)
        assert torch.equal(a.down, b.down)


def test_a_gpu_takes_weights_and_scales_as_they_are_in_the_files(pair: tuple[Path, Path]) -> None:
    small, whole = pair
    files = load_file(small / "model.safetensors")
    held = experts(small, experts="stored")
    for index, expert in enumerate(held):
        layer, number = divmod(index, 8)
        key = f"model.layers.{layer}.mlp.experts.{number}."
        up = [files[f"{key}{part}_proj.weight"].view(torch.uint8) for part in ("gate", "up")]
        scale = [files[f"{key}{part}_proj.weight_scale_inv"] for part in ("gate", "up")]
        assert expert.shape.weights is FP8
        assert torch.equal(expert.gate_up.view(torch.uint8), torch.cat(up))
        assert expert.gate_up_scale is not None
        assert torch.equal(expert.gate_up_scale, torch.cat(scale))
        assert expert.down_scale is not None
        assert torch.equal(expert.down_scale, files[f"{key}down_proj.weight_scale_inv"])
    for a, b in zip(held, experts(whole), strict=True):
        assert torch.equal(a.dequantized().gate_up, b.gate_up)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_unquantized_weights_are_quantized_at_load_when_that_is_wanted(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    whole = checkpoint(family)
    assert ModelSource.open(str(whole), experts="stored").expert_format is None
    for a, b in zip(experts(whole, experts="fp8"), experts(whole), strict=True):
        desired = b.quantized(FP8)
        assert torch.equal(a.gate_up.view(torch.uint8), desired.gate_up.view(torch.uint8))
        assert a.down_scale is not None
        assert desired.down_scale is not None
        assert torch.equal(a.down_scale, desired.down_scale)
        assert (a.gate_up_bias is None) == (b.gate_up_bias is None)
        if a.gate_up_bias is not None and b.gate_up_bias is not None:
            assert torch.equal(a.gate_up_bias, b.gate_up_bias)


def test_gate_and_up_that_would_share_a_block_are_quantized_anew(tmp_path: Path) -> None:
    small, whole = make_fp8_checkpoint("qwen3_moe", tmp_path, moe_intermediate_size=208)
    for a, b in zip(experts(small, experts="stored"), experts(whole), strict=True):
        assert a.gate_up_scale is not None
        assert a.gate_up_scale.shape == (4, 2)  # 416 rows, not two times 208
        back = a.dequantized().gate_up
        assert float((back - b.gate_up).norm() / b.gate_up.norm()) < 0.04


@pytest.mark.parametrize("block", [[64, 64], [128, 64]])
def test_blocks_of_other_sizes_are_read_too(block: list[int], pair: tuple[Path, Path]) -> None:
    small, whole = pair
    rows, columns = 128 // block[0], 128 // block[1]
    state = {
        key: tensor.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        if key.endswith("_scale_inv")
        else tensor
        for key, tensor in load_file(small / "model.safetensors").items()
    }
    # a scale for the rows that there are, no more
    state = {
        key: tensor[: -(-state[key.removesuffix("_scale_inv")].shape[0] // block[0])]
        if key.endswith("_scale_inv")
        else tensor
        for key, tensor in state.items()
    }
    state = {
        key: tensor[
            :, : -(-state[key.removesuffix("_scale_inv")].shape[1] // block[1])
        ].contiguous()
        if key.endswith("_scale_inv")
        else tensor
        for key, tensor in state.items()
    }
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    change_settings(small, weight_block_size=block)
    for a, b in zip(experts(small), experts(whole), strict=True):
        assert torch.equal(a.gate_up, b.gate_up)
    for a, b in zip(experts(small, experts="stored"), experts(whole), strict=True):
        torch.testing.assert_close(a.dequantized().gate_up, b.gate_up, rtol=1e-5, atol=1e-6)


def test_scales_of_another_shape_are_told(pair: tuple[Path, Path]) -> None:
    small, _ = pair
    change_settings(small, weight_block_size=[64, 64])
    with pytest.raises(ModelError, match=r"down_proj.*blocks of 64 x 64 need \(4, 2\)"):
        ModelSource.open(str(small))


def test_a_weight_without_scales_is_told(pair: tuple[Path, Path]) -> None:
    small, _ = pair
    state = load_file(small / "model.safetensors")
    del state["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    complaint = r"experts\.3\.up_proj\.weight in F8_E4M3 without .*\.up_proj\.weight_scale_inv"
    with pytest.raises(ModelError, match=complaint):
        ModelSource.open(str(small))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [0, 128]}, "bfloat16.* checkpoint"),
        ({"fmt": "e5m2"}, "e4m3 is served"),
        (
            {"quant_method": "bitsandbytes"},
            r"quantized \(bitsandbytes.*served are fp8, .*gptq, awq",
        ),
    ],
)
def test_other_quantizations_are_refused(
    settings: dict[str, object], complaint: str, pair: tuple[Path, Path]
) -> None:
    small, _ = pair
    change_settings(small, **settings)
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelSource.open(str(small))
