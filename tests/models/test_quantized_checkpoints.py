"""Whole checkpoints in published quantized layouts: served as their dequantized weights are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import greedy, prompt_of, reference_logits, single_runner
from support.quantized_checkpoints import GROUP, LAYOUTS, make_quantized_checkpoint

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels.cpu import ops
from flexpert.kernels.experts import ExpertWeights
from flexpert.kernels.weight_formats import MXFP4, int4_of
from flexpert.models.quantization import read_quantization
from flexpert.models.quantized_files import QuantizedFiles
from flexpert.models.source import ModelSource

CASES = [
    ("gptq", "mixtral", {}),
    ("awq", "qwen3_moe", {}),
    ("mixed", "deepseek_v3", {}),
    ("fp8_powers", "qwen3_moe", {}),
    ("modelopt_fp8", "olmoe", {"side_file": True}),
    ("modelopt_nvfp4", "mixtral", {"side_file": True}),
    ("mxfp4", "gpt_oss", {}),
]


def experts(path: Path, **opened: Any) -> list[ExpertWeights]:
    """All of a checkpoint."""
    source = ModelSource.open(str(path), **opened)
    every = range(source.info.experts)
    found = [source.load_experts(layer, every) for layer in range(source.info.moe_layers)]
    return [layer[expert] for layer in found for expert in every]


@pytest.mark.parametrize(("layout", "family", "how"), CASES, ids=[case[0] for case in CASES])
def test_a_quantized_checkpoint_is_served_as_transformers_serves_its_dequantized_weights(
    layout: str, family: str, how: dict[str, Any], tmp_path: Path
) -> None:
    small, whole = make_quantized_checkpoint(layout, family, tmp_path, **how)
    files = ModelSource.open(str(small)).checkpoint.files
    assert isinstance(files, QuantizedFiles)
    dense = [key for key in files.weights if "expert" not in key]
    assert len(files.weights) - len(dense) >= 4  # experts are quantized
    assert dense or layout == "mxfp4"  # and attention
    for a, b in zip(experts(small), experts(whole), strict=True):
        torch.testing.assert_close(a.gate_up, b.gate_up, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(a.down, b.down, rtol=1e-6, atol=1e-7)
    prompt = prompt_of(12, 3)
    runner = single_runner(small)
    logits = runner.step({"a": prompt})["a"]
    torch.testing.assert_close(logits, reference_logits(whole, prompt), rtol=2e-4, atol=2e-4)
    tokens = []
    for _ in range(4):
        tokens.append(int(logits[-1].argmax()))
        logits = runner.step({"a": tokens[-1:]})["a"]
    assert tokens == greedy(whole, prompt, 4)


def test_fp8_with_one_scale_for_a_weight_is_taken_by_a_gpu_as_it_is(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 128}
    small, whole = make_quantized_checkpoint("modelopt_fp8", "qwen3_moe", tmp_path, **sizes)
    state = load_file(small / "model.safetensors")
    held = experts(small, experts="stored")
    codes = state["model.layers.0.mlp.experts.0.down_proj.weight"]
    assert torch.equal(held[0].down.view(torch.uint8), codes.view(torch.uint8))
    for a, b in zip(held, experts(whole), strict=True):
        assert a.gate_up_scale is not None
        torch.testing.assert_close(a.dequantized().gate_up, b.gate_up, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("asked", ["stored", "mxfp4"])
def test_mxfp4_is_taken_as_it_is(asked: str, tmp_path: Path) -> None:
    small, whole = make_quantized_checkpoint("mxfp4", "gpt_oss", tmp_path)
    state = load_file(small / "model.safetensors")
    held = experts(small, experts=asked)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    for number in range(8):
        assert held[number].shape.weights is MXFP4
        blocks, scales = state[f"{key}_blocks"][number], state[f"{key}_scales"][number]
        assert torch.equal(held[number].gate_up, blocks.flatten(-2))
        assert held[number].gate_up_scale is not None
        assert torch.equal(held[number].gate_up_scale, scales)
    for a, b in zip(held, experts(whole), strict=True):
        back = a.dequantized()
        assert torch.equal(back.gate_up, b.gate_up)
        assert torch.equal(back.down, b.down)
        assert a.down_bias is not None
        assert b.down_bias is not None
        assert torch.equal(a.down_bias, b.down_bias)


def test_int4_is_quantized_anew_where_fp8_is_asked_for(tmp_path: Path) -> None:
    small, whole = make_quantized_checkpoint("awq", "qwen3_moe", tmp_path)
    for a, b in zip(experts(small, experts="fp8"), experts(whole), strict=True):
        assert a.gate_up_scale is not None
        back = a.dequantized().gate_up
        assert 0 < float((back - b.gate_up).norm() / b.gate_up.norm()) < 0.04


@pytest.mark.parametrize("layout", ["awq", "w4a16", "gptq"])
def test_int4_stays_packed_and_is_what_dequantizing_gives(layout: str, tmp_path: Path) -> None:
    small, _ = make_quantized_checkpoint(layout, "qwen3_moe", tmp_path)
    if layout == "gptq":
        side_by_side(small)
    packed = experts(small, experts="int4")
    for a, b in zip(packed, experts(small), strict=True):
        assert a.shape.format is int4_of(GROUP)
        assert torch.equal(a.dequantized().gate_up, b.gate_up)
        assert torch.equal(a.dequantized().down, b.down)
    assert packed[0].nbytes < 0.2 * experts(small)[0].nbytes
    prompt = prompt_of(12, 3)
    for dtype in ("float32", "bfloat16"):
        logits = [
            single_runner(small, experts=how, dtype=dtype, deterministic=True).step({"a": prompt})
            for how in ("int4", "unquantized")
        ]
        if dtype == "float32" or ops.instruction_set() != "amx":  # tiles have an order of their own
            assert torch.equal(logits[0]["a"], logits[1]["a"])


def side_by_side(path: Path) -> None:
    """The columns of each group of a GPTQ checkpoint, as without desc_act."""
    state = load_file(path / "model.safetensors")
    for key in state:
        if key.endswith("g_idx"):
            state[key] = (torch.arange(len(state[key])) // GROUP).int()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("layout", "wrong", "why"),
    [
        ("gptq", None, r"cannot stay packed: .*\(g_idx\); leave --quantization int4 out"),
        ("w4a16", math.nan, "cannot stay packed: a scale is infinite or no number"),
    ],
)
def test_int4_that_cannot_stay_packed_is_refused(
    layout: str, wrong: float | None, why: str, tmp_path: Path
) -> None:
    small, _ = make_quantized_checkpoint(layout, "qwen3_moe", tmp_path)
    if wrong is not None:
        state = load_file(small / "model.safetensors")
        for key in state:
            if "experts" in key and key.endswith("weight_scale"):
                state[key][3, 1] = wrong
        save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=why):
        experts(small, experts="int4")


@pytest.mark.parametrize("layout", ["gptq", "modelopt_fp8"])
def test_a_weight_of_one_expert_has_no_rows_of_experts(layout: str, tmp_path: Path) -> None:
    small, _ = make_quantized_checkpoint(layout, "mixtral", tmp_path)
    files = ModelSource.open(str(small)).checkpoint.files
    assert isinstance(files, QuantizedFiles)
    with pytest.raises(ModelError, match="one matrix"):
        files.read_row(next(iter(files.weights)), 0)


# ---- what is refused ----------------------------------------------------------------------------


def told(checkpoint: Path, **settings: Any) -> None:
    """Write other settings of its quantization into a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"].update(settings)
    (checkpoint / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("layout", "settings", "complaint"),
    [
        ("gptq", {"quant_method": "hqq"}, r"\(hqq.*served are fp8, .*mxfp4.*gptq, awq"),
        ("gptq", {"bits": 5}, "bits 5; 2, 3, 4 and 8 are served"),
        ("gptq", {"bits": None}, "bits None"),
        ("gptq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype int16"),
        ("gptq", {"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ("awq", {"version": "gemv"}, "version gemv; gemm is served"),
        ("awq", {"bits": 3}, "bits 3; 4 is served"),
        ("mixed", {"config_groups": {}}, "no config_groups"),
        ("mixed", {"config_groups": {"W4A16": ["Linear"]}}, "W4A16 is a preset"),
        ("mixed", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "are sparse"),
        ("mixed", {"transform_config": {"config_groups": {}}}, "transform_config"),
        ("modelopt_fp8", {"quant_algo": "W4A16_AWQ"}, "quant_algo W4A16_AWQ; FP8, "),
        ("modelopt_fp8", {"quant_algo": "MIXED_PRECISION"}, "quantized_layers"),
        ("fp8_powers", {"expert_dtype": "fp4"}, "expert_dtype fp4"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(
    layout: str, settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": LAYOUTS[layout][0]}))
    told(tmp_path, **settings)
    with pytest.raises(UnsupportedModel, match=complaint):
        read_quantization(tmp_path)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("gptq", {"quant_method": "awq"}),  # its zero points have another shape or none fits
        ("gptq", {"bits": 8}),
        ("awq", {"group_size": 16}),
        ("mixed", {"config_groups": {"all": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}),
        ("fp8_powers", {"weight_block_size": [64, 64]}),
    ],
)
def test_a_configuration_that_fits_no_tensor_names_one(
    layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    small, _ = make_quantized_checkpoint(layout, "qwen3_moe", tmp_path)
    told(small, **settings)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.\S+"):
        ModelSource.open(str(small))


def test_quantized_tensors_that_nothing_explains_are_named(tmp_path: Path) -> None:
    small, _ = make_quantized_checkpoint("awq", "qwen3_moe", tmp_path)
    state = load_file(small / "model.safetensors")
    state["model.layers.0.mlp.experts.0.up_proj.weight_scale"] = torch.ones(1)
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale belongs to a quantized weight"):
        ModelSource.open(str(small))


def test_codes_of_another_dtype_are_named_before_their_scales(tmp_path: Path) -> None:
    small, _ = make_quantized_checkpoint("fp8_powers", "qwen3_moe", tmp_path)
    state = load_file(small / "model.safetensors")
    key = "model.layers.1.self_attn.q_proj.weight"
    state[key] = state[key].view(torch.float8_e5m2)
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj\.weight is F8_E5M2"):
        ModelSource.open(str(small))


def test_groups_beyond_the_scales_are_told_when_the_weight_is_read(tmp_path: Path) -> None:
    small, _ = make_quantized_checkpoint("gptq", "mixtral", tmp_path)
    state = load_file(small / "model.safetensors")
    for key in state:
        if key.endswith("experts.1.w1.g_idx"):
            state[key] += 1
    save_file(state, small / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"experts\.1\.w1\.weight cannot be dequantized: g_idx"):
        ModelSource.open(str(small)).load_experts(0, [1])
