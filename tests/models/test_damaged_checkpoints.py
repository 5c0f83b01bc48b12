"""A checkpoint that is not what it says is refused by name before ranks start, or served right."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    FAMILIES,
    make_checkpoint,
    prompt_of,
    random_model,
    reference_logits,
    single_runner,
)
from support.fp8_checkpoints import SETTINGS, make_fp8_checkpoint
from torch import Tensor

from flexpert.errors import ModelError
from flexpert.kernels import block_fp8 as fp8
from flexpert.kernels.device_stream import HostStream
from flexpert.models import registrations
from flexpert.models.dense_weights import load_dense
from flexpert.models.finite import find_not_finite
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]
State = dict[str, Tensor]
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT = "model.layers.0.mlp.experts.5.up_proj.weight"
MATRIX = "model.layers.1.self_attn.q_proj.weight"


def rewrite(path: Path, change: Callable[[State], None]) -> None:
    state = load_file(path / FILE)
    change(state)
    save_file({k: v.contiguous() for k, v in state.items()}, path / FILE, {"format": "pt"})


def configure(path: Path, **settings: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **settings}))


# ---- what can be wrong with tensors -------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """said: in the refusal, a pattern; None: it is served, with the answers of the undamaged."""

    name: str
    change: Callable[[State], object]
    said: str | None
    config: dict[str, object] | None = None


def scaled(dtype: torch.dtype, suffix: str) -> Callable[[State], None]:
    """Every projection quantized, with one scale a matrix beside it."""

    def change(state: State) -> None:
        most = torch.finfo(dtype).max if dtype.is_floating_point else 127
        for key in [key for key in state if "proj.weight" in key]:
            scale = state[key].abs().max() / most
            state[key] = (state[key] / scale).to(dtype)
            state[key.removesuffix(".weight") + suffix] = scale.reshape(1)

    return change


def cast(key: str, dtype: torch.dtype) -> Callable[[State], None]:
    return lambda state: state.update({key: state[key].to(dtype)})


def cast_all(dtype: torch.dtype) -> Callable[[State], None]:
    return lambda state: state.update({key: tensor.to(dtype) for key, tensor in state.items()})


def blocks(state: State) -> None:
    """fp8 with blocks of 128 x 128."""
    for key in [key for key in state if "proj.weight" in key]:
        state[key], state[f"{key}_scale_inv"] = fp8.quantize(state[key])


def then(*changes: Callable[[State], object]) -> Callable[[State], None]:
    def change(state: State) -> None:
        for one in changes:
            one(state)

    return change


def drop(pattern: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        gone = [key for key in state if re.search(pattern, key)]
        assert gone
        for key in gone:
            del state[key]

    return change


def add(key: str, *shape: int) -> Callable[[State], None]:
    return lambda state: state.update({key: torch.ones(shape)})


def shifted(state: State) -> None:
    """Experts 1 to 8 in place of 0 to 7, in one layer."""
    for number in range(7, -1, -1):
        for key in [key for key in state if f"layers.1.mlp.experts.{number}." in key]:
            state[key.replace(f".{number}.", f".{number + 1}.")] = state.pop(key)


def another_expert(state: State) -> None:
    for key in [key for key in state if ".experts.7." in key]:
        state[key.replace(".7.", ".8.")] = state[key].clone()


def another_layer(*further: str) -> Callable[[State], None]:
    """One more than config.json has, with these tensors besides."""

    def change(state: State) -> None:
        for key in [key for key in state if ".layers.2." in key]:
            state[key.replace(".2.", ".3.", 1)] = state[key].clone()
        state.update({f"model.layers.3.{name}": torch.ones(72) for name in further})

    return change


def fused_beside(state: State) -> None:
    state["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(8, 80, 72)


FP8: dict[str, object] = {"quantization_config": SETTINGS}
NO_CONFIG = r"has no quantization_config"
DAMAGES = [
    # quantized, and nothing says how
    Damage("fp8-scales", scaled(torch.float8_e4m3fn, ".weight_scale"), NO_CONFIG),
    Damage("fp8-scale-inv", scaled(torch.float8_e4m3fn, ".weight_scale_inv"), NO_CONFIG),
    Damage("int8-scales", scaled(torch.int8, ".weight_scale"), NO_CONFIG),
    Damage("int8-SCB", scaled(torch.int8, ".SCB"), NO_CONFIG),
    Damage("input-scales", add("model.layers.0.self_attn.q_proj.input_scale"), NO_CONFIG),
    Damage("packed", add(EXPERT + "_packed", 40, 9), NO_CONFIG),
    Damage("gptq", add("model.layers.0.self_attn.q_proj.qweight", 9, 96), NO_CONFIG),
    Damage("mxfp4", add("model.layers.0.mlp.experts.down_proj_blocks", 8, 72, 2), NO_CONFIG),
    Damage("fp8-alone", cast(EXPERT, torch.float8_e4m3fn), rf"{EXPERT} is stored as F8_E4M3"),
    Damage("e5m2-alone", cast(MATRIX, torch.float8_e5m2), rf"{MATRIX} is stored as F8_E5M2"),
    Damage("int8-alone", cast(MATRIX, torch.int8), rf"{MATRIX} is stored as I8"),
    Damage("int32-norm", cast("model.norm.weight", torch.int32), r"norm\.weight is stored as I32"),
    # quantized otherwise than is said
    Damage(
        "e5m2-for-e4m3",
        then(blocks, cast(MATRIX, torch.float8_e5m2)),
        rf"{MATRIX} is F8_E5M2",
        FP8,
    ),
    Damage(
        "no-scales",
        then(blocks, drop(rf"{MATRIX}_scale_inv")),
        rf"{MATRIX} in F8_E4M3 without",
        FP8,
    ),
    Damage(
        "scales-of-another-shape",
        then(blocks, lambda s: s.update({f"{MATRIX}_scale_inv": torch.ones(2, 1)})),
        rf"{MATRIX}.*the scales have shape \(2, 1\)",
        FP8,
    ),
    Damage(
        "scales-of-a-plain-matrix",
        then(blocks, cast(MATRIX, torch.bfloat16)),
        rf"{MATRIX}_scale_inv",
        FP8,
    ),
    # experts
    Damage("no-expert", drop(r"\.experts\.5\."), r"has 7 experts.*without number 5"),
    Damage("no-part-of-an-expert", drop(EXPERT), r"has 7 experts.*without number 5"),
    Damage("no-gates", drop(r"layers\.1\.mlp\.experts\.\d\.gate"), r"nothing like.*gate_proj"),
    Damage("shifted-experts", shifted, r"layers\.1\.mlp.*without number 0"),
    Damage("one-expert-more", another_expert, r"has 9 experts"),
    Damage("an-odd-expert", add(EXPERT, 41, 72), rf"{EXPERT} has shape \(41, 72\)"),
    Damage("experts-of-two-layouts", fused_beside, r"gate_up_proj in two layouts"),
    Damage("wide-experts", lambda _: None, r"has shape", {"moe_intermediate_size": 48}),
    # names and shapes
    Damage("transposed", lambda s: s.update({MATRIX: s[MATRIX].T}), rf"{MATRIX} has shape"),
    Damage("a-row-more", add("model.norm.weight", 73), r"norm\.weight has shape \(73,\)"),
    Damage("no-norm", drop(r"^model\.norm"), r"lacks 1 tensors.*model\.norm\.weight"),
    Damage("no-layer", drop(r"\.layers\.2\."), r"lacks \d+ tensors.*model\.layers\.2\."),
    Damage("misspelt", then(drop(MATRIX), add("model.q_proj.weight", 96, 72)), rf"lacks.*{MATRIX}"),
    Damage("biases", add("model.layers.0.self_attn.q_proj.bias", 96), r"no place.*q_proj\.bias"),
    Damage("unheard-of", add("model.layers.0.mlp.memory", 8), r"no place.*mlp\.memory"),
    Damage("a-layer-more", another_layer(), r"has \d+ tensors.*no place.*layers\.3\."),
    Damage("twice", add("norm.weight", 72), r"model\.norm\.weight twice.*norm\.weight"),
    # served
    Damage("multi-token-prediction", another_layer("eh_proj.weight", "enorm.weight"), None),
    Damage("named-mtp", add("mtp.layers.0.self_attn.q_proj.weight", 4, 4), None),
    Damage("rotary", add("model.layers.0.self_attn.rotary_emb.inv_freq", 12), None),
    Damage("vision", add("model.visual.blocks.0.attn.qkv.weight", 4, 4), None),
    Damage("float64", cast_all(torch.float64), None),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damaged_tensors_are_refused_by_name_or_served_right(
    damage: Damage, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    good = checkpoint("qwen3_moe")
    path = Path(shutil.copytree(good, tmp_path / "model"))
    rewrite(path, damage.change)
    configure(path, **(damage.config or {}))
    if damage.said is not None:
        with pytest.raises(ModelError, match=damage.said) as refused:
            ModelSource.open(str(path))
        assert str(path) in str(refused.value)
        return
    tokens = prompt_of(20, seed=1)
    logits = single_runner(path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(good, tokens), atol=2e-4, rtol=2e-4)


def test_what_is_skipped_is_told_with_its_reason(checkpoint: Checkpoints, tmp_path: Path) -> None:
    path = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    rewrite(
        path,
        then(add("mtp.fc.weight", 4, 4), add("model.visual.patch_embed.proj.weight", 2, 2)),
    )
    skipped = {kind.kind: kind for kind in ModelSource.open(str(path)).accounting.skipped}
    assert skipped["vision"].keys == ("model.visual.patch_embed.proj.weight",)
    assert skipped["vision"].nbytes == 16
    assert "text" in skipped["vision"].reason
    assert skipped["multi-token prediction"].keys == ("mtp.fc.weight",)


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("qwen3_moe", "gpt_oss") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_no_tensor_of_any_family_may_be_missing_misspelt_or_of_another_shape(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """Each kind of tensor in turn; whatever is done to it, the refusal names a part of it."""
    path = Path(shutil.copytree(checkpoint(family), tmp_path / "model"))
    whole = load_file(path / FILE)
    kinds = {re.sub(r"\d+", "N", key): key for key in whole}
    assert len(kinds) > 8

    def gone(state: State, key: str) -> None:
        del state[key]

    def misspelt(state: State, key: str) -> None:
        state[f"{key}_"] = state.pop(key)

    def longer(state: State, key: str) -> None:
        state[key] = torch.cat([state[key], state[key][:1]])

    def packed(state: State, key: str) -> None:
        state[key] = torch.zeros(state[key].shape, dtype=torch.uint8)

    ways = [gone, misspelt, longer, packed]
    for number, key in enumerate(kinds.values()):
        way = ways[number % len(ways)]
        state = dict(whole)
        way(state, key)
        save_file({k: v.clone() for k, v in state.items()}, path / FILE, {"format": "pt"})
        with pytest.raises(ModelError) as refused:
            ModelSource.open(str(path))
        assert key.split(".")[-2 if "." in key else -1] in str(refused.value), (way, key)


# ---- which files are read -----------------------------------------------------------------------


def sharded(directory: Path, seed: int = 0) -> Path:
    random_model("qwen3_moe", seed).save_pretrained(directory, max_shard_size="100KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 3
    return directory


def change_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    told = json.loads((path / INDEX).read_text())
    change(told["weight_map"])
    (path / INDEX).write_text(json.dumps(told))


def test_a_single_file_beside_an_older_index_is_what_counts_as_in_transformers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sharded(tmp_path, seed=1)
    rest = tmp_path / "rest"
    make_checkpoint("qwen3_moe", rest, seed=2)
    shutil.copy(rest / FILE, path / FILE)
    tokens = prompt_of(20, seed=1)
    with caplog.at_level(logging.WARNING):
        logits = single_runner(path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(path, tokens), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(logits, reference_logits(rest, tokens), atol=2e-4, rtol=2e-4)
    assert "model-00001" in caplog.text


def test_the_files_that_the_configuration_names_are_read_as_in_transformers(
    tmp_path: Path,
) -> None:
    path = make_checkpoint("qwen3_moe", tmp_path, seed=1)
    other = make_checkpoint("qwen3_moe", tmp_path / "other", seed=2)
    shutil.copy(other / FILE, path / "weights.safetensors")
    configure(path, transformers_weights="weights.safetensors")
    tokens = prompt_of(20, seed=1)
    logits = single_runner(path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(path, tokens), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(logits, reference_logits(other, tokens), atol=2e-4, rtol=2e-4)
    for odd in ("../weights.safetensors", "weights.bin", "gone.safetensors", 7):
        configure(path, transformers_weights=odd)
        with pytest.raises(ModelError, match=r"weight"):
            ModelSource.open(str(path))


def test_a_tensor_that_the_index_promises_in_vain_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    first = sorted(path.glob("model-*.safetensors"))[0].name
    change_index(path, lambda files: files.update({"model.layers.9.extra": first}))
    with pytest.raises(ModelError, match=rf"{first} lacks model\.layers\.9\.extra.*index"):
        ModelSource.open(str(path))


def test_a_file_of_another_checkpoint_among_those_of_the_index_is_named(tmp_path: Path) -> None:
    path = sharded(tmp_path)
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"in two files.*model-00001.*model-00002"):
        ModelSource.open(str(path))


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3_moe", EXPERT, "inf"),
        ("qwen3_moe", MATRIX, "nan"),
        ("qwen3_moe", "model.embed_tokens.weight", "-inf"),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", "inf"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", "nan"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", "-inf"),
    ],
)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_number_that_is_not_finite_is_named_at_load(
    family: str, key: str, value: str, dtype: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = spoilt(checkpoint(family), tmp_path, key, float(value))
    with pytest.raises(ModelError, match=rf" {value}; no answer") as refused:
        single_runner(path, dtype=dtype)
    assert ".".join(key.split(".")[:3]) in str(refused.value)
    if key.startswith("model.layers.") and "experts" in key:
        return
    source = ModelSource.open(str(path), dtype=dtype)
    model = source.build(attention=registrations.IMPLEMENTATION)
    for name in source.experts_names:
        model.get_submodule(name)._parameters.clear()
    with torch.no_grad(), pytest.raises(ModelError, match="not finite"):
        load_dense(model, source, HostStream())  # as to a GPU


def spoilt(good: Path, directory: Path, key: str, value: float) -> Path:
    """A copy of a checkpoint with one other number."""
    path = Path(shutil.copytree(good, directory / "model"))
    rewrite(path, lambda state: state[key].view(-1)[3:4].fill_(value))
    return path


def test_a_number_that_the_dtype_of_the_service_cannot_hold_is_named(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = spoilt(checkpoint("qwen3_moe"), tmp_path, EXPERT, 3.4e38)
    single_runner(path)
    with pytest.raises(ModelError, match=r"expert 5 of model\.layers\.0.*inf; no answer"):
        single_runner(path, dtype="bfloat16")


def test_experts_with_an_infinity_are_not_quantized_in_silence(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """One would make a block of zeros, with a scale of infinity."""
    path = spoilt(checkpoint("qwen3_moe"), tmp_path, EXPERT, float("inf"))
    source = ModelSource.open(str(path), experts="fp8")
    source.load_experts(0, [0, 1, 2, 3, 4, 6, 7])
    with pytest.raises(ModelError, match=r"expert 5 of model\.layers\.0.*inf; no answer"):
        source.load_experts(0, [5])


@pytest.mark.parametrize("experts", ["stored", "unquantized"])
@pytest.mark.parametrize("suffix", ["", "_scale_inv"])
def test_a_nan_among_fp8_weights_or_their_scales_is_named(
    experts: Any, suffix: str, tmp_path: Path
) -> None:
    key = "model.layers.1.mlp.experts.2.down_proj.weight" + suffix
    path, _ = make_fp8_checkpoint("qwen3_moe", tmp_path)
    path = spoilt(path, tmp_path, key, 1.0)

    def nan(state: State) -> None:
        flat = state[key].view(-1)
        flat[-1:] = torch.full((1,), float("nan")).to(flat.dtype)

    rewrite(path, nan)
    source = ModelSource.open(str(path), experts=experts)
    source.load_experts(1, [0, 1, 3])
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp.*nan; no answer"):
        source.load_experts(1, [2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_numbers_whose_sum_overflows_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    assert find_not_finite(torch.full((4000,), largest, dtype=dtype)) is None
    tensor = torch.full((500, 900), largest, dtype=dtype)
    tensor[321, 7], tensor[499, 0] = float("-inf"), float("nan")
    assert find_not_finite(tensor) == 321 * 900 + 7


@settings(max_examples=50, deadline=None)
@given(
    at=st.integers(0, 299_999),
    byte=st.integers(0, 255),
    dtype=st.sampled_from(
        [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.uint8, torch.int8]
    ),
)
def test_any_byte_is_finite_or_found(at: int, byte: int, dtype: torch.dtype) -> None:
    numbers = torch.full((300_000,), 0x38, dtype=torch.uint8)
    numbers[at] = byte
    tensor = numbers.view(dtype)
    finite = bool(tensor[at].float().isfinite())
    assert find_not_finite(tensor) == (None if finite else at)
