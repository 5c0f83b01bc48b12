"""Checkpoints of either layout load the same, in part or whole; what cannot be served says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import (
    COMMON,
    FAMILIES,
    make_checkpoint,
    prompt_of,
    random_model,
    reference,
    reference_logits,
    single_runner,
)
from transformers import AutoConfig, AutoModelForCausalLM

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.kernels.experts import ExpertWeights
from flexpert.models import registrations
from flexpert.models.dense_weights import load_dense, mapped_nbytes
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]


def same(a: ExpertWeights, b: ExpertWeights) -> bool:
    return torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down)


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_the_one_transformers_loads(family: str, checkpoint: Checkpoints) -> None:
    path = checkpoint(family)
    source = ModelSource.open(str(path))
    model = reference(path)
    assert source.info.moe_layers == len(source.experts_names)
    for layer, name in enumerate(source.experts_names):
        module: Any = model.get_submodule(name)
        held = source.load_experts(layer, [5, 0, 2])
        assert list(held) == [5, 0, 2]
        for expert, weights in held.items():
            up, down = module.gate_up_proj[expert], module.down_proj[expert]
            if module.is_transposed:
                up, down = up.t(), down.t()
            assert torch.equal(weights.gate_up, up)
            assert torch.equal(weights.down, down)
            assert weights.gate_up.is_contiguous()
            assert weights.down.is_contiguous()
            assert weights.nbytes == source.expert_nbytes()
            assert (weights.gate_up_bias is not None) == module.has_bias
            if weights.gate_up_bias is not None and weights.down_bias is not None:
                assert torch.equal(weights.gate_up_bias, module.gate_up_proj_bias[expert])
                assert torch.equal(weights.down_bias, module.down_proj_bias[expert])


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_fused_on_disk_load_like_those_in_single_tensors(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    apart = checkpoint(family)
    assert any(".experts.3." in key for key in load_file(apart / "model.safetensors"))
    model = random_model(family)
    model.config.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = ModelSource.open(str(tmp_path)), ModelSource.open(str(apart))
    for layer in range(ours.info.moe_layers):
        a, b = ours.load_experts(layer, range(6)), theirs.load_experts(layer, range(6))
        assert all(same(a[e], b[e]) for e in range(6))
    tokens = prompt_of(20, seed=1)
    logits = single_runner(tmp_path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(apart, tokens), atol=2e-4, rtol=2e-4)


def test_a_checkpoint_of_many_files_loads(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens = prompt_of(20, seed=1)
    logits = single_runner(tmp_path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(tmp_path, tokens), atol=2e-4, rtol=2e-4)


def test_an_expert_holds_no_memory_but_its_own(checkpoint: Checkpoints) -> None:
    source = ModelSource.open(str(checkpoint("gpt_oss")))
    weights = source.load_experts(0, [1])[1]
    for tensor in (weights.gate_up, weights.down, weights.gate_up_bias):
        assert tensor is not None
        assert tensor.untyped_storage().nbytes() == weights.nbytes


# ---- what is loaded -----------------------------------------------------------------------------


def test_the_embedded_model_opens_with_its_tokenizer() -> None:
    source = ModelSource.open("tiny")
    assert source.info.model_type == "qwen3_moe"
    tokenizer = source.tokenizer()
    assert len(tokenizer) <= source.info.vocab
    assert tokenizer.decode(tokenizer("some words")["input_ids"]) == "some words"
    assert source.info.eos_token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_real(family: str, checkpoint: Checkpoints) -> None:
    path = checkpoint(family, torch.bfloat16)
    sequences = single_runner(path, blocks=10, block_size=4)
    source, runner = ModelSource.open(str(path)), sequences.runner
    buffers = dict(runner._model.named_non_persistent_buffers()).values()
    assert runner.dense_nbytes == source.dense_nbytes() + sum(b.nbytes for b in buffers)
    assert runner.kv_nbytes == 10 * 4 * source.info.kv_bytes_per_token()
    on_disk = (path / "model.safetensors").stat().st_size
    experts = source.info.moe_layers * source.info.experts * source.expert_nbytes()
    assert abs(source.dense_nbytes() + experts - on_disk) < 0.2 * on_disk


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dense_weights_of_the_files_dtype_are_no_memory_of_their_own(
    dtype: str, checkpoint: Checkpoints
) -> None:
    path = checkpoint("qwen3_moe", torch.bfloat16)
    source = ModelSource.open(str(path), dtype=dtype)
    model = source.build(attention=registrations.IMPLEMENTATION)
    load_dense(model, source)
    file = str(path / "model.safetensors")
    places = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(file)
    ]
    inside = [
        tensor
        for tensor in {*model.parameters(), *model.buffers()}
        if not tensor.is_meta and any(low <= tensor.data_ptr() < high for low, high in places)
    ]
    assert sum(tensor.nbytes for tensor in inside) == mapped_nbytes(source)
    assert mapped_nbytes(source) == (source.dense_nbytes() if dtype == "bfloat16" else 0)


def test_what_a_family_keeps_in_float32_stays_so(checkpoint: Checkpoints) -> None:
    """Which these are differs from one release of transformers to another: ask it."""
    path = checkpoint("deepseek_v3", torch.bfloat16)
    model = single_runner(path).runner._model
    kept = {n: b.dtype for n, b in model.named_buffers() if b.dtype == torch.float32}
    assert any(name.endswith("e_score_correction_bias") for name in kept)
    assert any(name.endswith("inv_freq") for name in kept)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == theirs.get_parameter(name).dtype, name
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_tied_embeddings_are_one_tensor(checkpoint: Checkpoints) -> None:
    model: Any = single_runner(checkpoint("qwen3_moe")).runner._model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mla_has_values_narrower_than_keys(checkpoint: Checkpoints) -> None:
    shape = ModelSource.open(str(checkpoint("deepseek_v3"))).info.attention[0]
    assert (shape.kv_heads, shape.key_dim, shape.value_dim) == (4, 24, 20)


def test_dtype_can_be_chosen(checkpoint: Checkpoints) -> None:
    source = ModelSource.open(str(checkpoint("mixtral")), dtype="bfloat16")
    assert source.info.dtype == torch.bfloat16
    assert source.load_experts(0, [0])[0].down.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int3"):
        ModelSource.open("tiny", dtype="int3")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_dtype_that_config_json_leaves_out_is_that_of_most_weights(
    stored: torch.dtype, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("mixtral", stored), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (path / "config.json").write_text(json.dumps(config))
    assert AutoModelForCausalLM.from_pretrained(path).dtype == stored
    assert ModelSource.open(str(path)).info.dtype == stored
    # a few tensors in another dtype are not the model's
    weights = load_file(path / "model.safetensors")
    router = next(name for name in weights if name.endswith("gate.weight"))
    weights[router] = weights[router].float()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert ModelSource.open(str(path)).info.dtype == stored
    assert ModelSource.open(str(path), dtype="float32").info.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_no_less_exact_than_in_transformers(family: str, checkpoint: Checkpoints) -> None:
    path = checkpoint(family, torch.bfloat16)
    tokens = prompt_of(40, seed=2)
    exact = reference_logits(path, tokens)
    ours = single_runner(path).step({"a": tokens})["a"]
    theirs = reference_logits(path, tokens, torch.bfloat16)
    assert (ours - exact).abs().mean() < 1.5 * (theirs - exact).abs().mean()


def test_the_context_can_be_shortened_but_not_stretched(checkpoint: Checkpoints) -> None:
    path = str(checkpoint("mixtral"))
    assert ModelSource.open(path).info.max_model_len == 256
    assert ModelSource.open(path, max_model_len=64).info.max_model_len == 64
    with pytest.raises(ModelError, match="max_position_embeddings"):
        ModelSource.open(path, max_model_len=257)


def test_frequencies_that_would_follow_the_longest_request_limit_the_context(
    tmp_path: Path,
) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 9, "long_factor": [4.0] * 9}
    make_checkpoint("mixtral", tmp_path, head_dim=18, rope_parameters={**rope, **factors})
    assert ModelSource.open(str(tmp_path)).info.max_model_len == 64
    with pytest.raises(ModelError, match="change each other"):
        ModelSource.open(str(tmp_path), max_model_len=128)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_beyond_the_vocabulary_are_never_chosen(tmp_path: Path, tied: bool) -> None:
    whole = random_model("qwen3_moe", tie_word_embeddings=tied)
    with torch.no_grad():
        last = whole.get_output_embeddings().weight[100:]
        last.mul_(50)  # where they counted, they would be the highest and the lowest
    whole.save_pretrained(tmp_path)
    change(tmp_path / "config.json", vocab_size=100)
    source = ModelSource.open(str(tmp_path))
    assert source.info.vocab == 100
    tokens = prompt_of(30, seed=4, vocab=100)
    logits = single_runner(tmp_path).step({"a": tokens})["a"]
    with torch.inference_mode():
        expected = whole(torch.tensor([tokens])).logits[0, :, :100]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_embeddings_of_fewer_tokens_than_the_vocabulary_are_refused(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("mixtral"), tmp_path / "copy")
    change(tmp_path / "copy" / "config.json", vocab_size=400)
    with pytest.raises(ModelError, match="160"):
        single_runner(tmp_path / "copy")


# ---- what is refused ----------------------------------------------------------------------------


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def config_of(family: str, **settings: Any) -> Any:
    return AutoConfig.for_model(family, **{**COMMON, **settings})


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="dense"):
        ModelSource.open(str(tmp_path))


def test_a_model_without_any_attention_is_refused(tmp_path: Path) -> None:
    config_of("qwen3_next", layer_types=["linear_attention"] * 3).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="none of its layers is attention"):
        ModelSource.open(str(tmp_path))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        ModelSource.open(str(tmp_path))


def test_compressed_attention_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("deepseek_v4", num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="compressed_sparse_attention"):
        ModelSource.open(str(tmp_path))


def test_quantized_weights_are_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = json.loads((checkpoint("mixtral") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="bitsandbytes"):
        ModelSource.open(str(tmp_path))


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(UnsupportedModel, match="from_the_future"):
        ModelSource.open(str(tmp_path))


@pytest.fixture
def broken(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint to break."""
    path = tmp_path / "broken"
    shutil.copytree(checkpoint("mixtral"), path)
    return path


def test_a_missing_file_of_many_is_named(tmp_path: Path) -> None:
    random_model("mixtral").save_pretrained(tmp_path, max_shard_size="200KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        ModelSource.open(str(tmp_path))


def test_a_truncated_file_is_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or incomplete"):
        ModelSource.open(str(broken))


def test_missing_tensors_are_named(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, broken / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*model\.norm\.weight"):
        ModelSource.open(str(broken))


def test_missing_experts_are_named(broken: Path) -> None:
    state = load_file(broken / "model.safetensors")
    dropped = [key for key in state if ".experts.5." in key]
    assert dropped
    for key in dropped:
        del state[key]
    save_file(state, broken / "model.safetensors")
    with pytest.raises(ModelError, match=r"has 5 experts.*without number 5"):
        ModelSource.open(str(broken))


def test_a_config_that_does_not_match_the_weights_is_told(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["intermediate_size"] += 8
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has shape.*config\.json says"):
        ModelSource.open(str(broken))


def test_pickled_weights_are_refused_with_the_remedy(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError, match="save_pretrained"):
        ModelSource.open(str(broken))


def test_a_directory_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelSource.open(str(tmp_path))
    with pytest.raises(ModelError, match="not a directory"):
        ModelSource.open(str(tmp_path / "nowhere"))


def test_a_hub_model_without_a_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="'tiny'"):
        ModelSource.open("nobody/has-this-model")


def test_experts_and_layers_that_do_not_exist_are_refused(checkpoint: Checkpoints) -> None:
    source = ModelSource.open(str(checkpoint("mixtral")))
    with pytest.raises(ValueError, match="no expert 6"):
        source.load_experts(0, [6])
    with pytest.raises(ValueError, match="no MoE layer 3"):
        source.load_experts(3, [0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_without_a_tokenizer_is_told(family: str, checkpoint: Checkpoints) -> None:
    """Of some families transformers makes an empty one, in silence."""
    with pytest.raises(ModelError, match="tokenizer"):
        ModelSource.open(str(checkpoint(family))).tokenizer()
