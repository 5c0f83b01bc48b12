"""Attention that compresses keys and values keeps what they are compressed to, and nothing else
changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import MLA, Sequences, greedy, prompt_of, reference_logits, single_runner
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from flexpert.cluster.processes.model_opening import open_source
from flexpert.config import load_config
from flexpert.models import latent_attention
from flexpert.models.latent_attention import keep_latents, kept_latent
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]
FAMILIES = ("deepseek_v3", "deepseek_v2", "glm4_moe_lite", "axk1")
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}
KEPT = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]


def latents(path: Path, **how: Any) -> Sequences:
    return single_runner(path, latent_cache=True, **how)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [50, 5, 1])
def test_pieces_of_any_length_give_the_logits_of_transformers(
    family: str, size: int, checkpoint: Checkpoints
) -> None:
    path, tokens = checkpoint(family), prompt_of(50, seed=1)
    sequences = latents(path)
    assert {shape.pieces for shape in sequences.runner.info.attention} == {((1, KEPT),)}
    logits = [sequences.step({"a": tokens[at : at + size]})["a"] for at in range(0, 50, size)]
    torch.testing.assert_close(torch.cat(logits), reference_logits(path, tokens), **CLOSE)


def test_long_pieces_short_ones_and_decodes_share_a_step(checkpoint: Checkpoints) -> None:
    """In an order in which those that are expanded are neither the first nor the last."""
    path = checkpoint("deepseek_v3")
    sequences = latents(path)
    prompts = {name: prompt_of(90, seed=seed) for seed, name in enumerate("abcd")}
    sequences.step({"a": prompts["a"][:20], "d": prompts["d"][:41]})
    done = sequences.step(
        {
            "a": prompts["a"][20:21],
            "b": prompts["b"][:40],
            "c": prompts["c"][:7],
            "d": prompts["d"][41:90],
        }
    )
    again = sequences.step({"b": prompts["b"][40:41], "d": [5], "c": prompts["c"][7:9]})
    for name, upto in {"a": 21, "b": 40, "c": 7, "d": 90}.items():
        expected = reference_logits(path, prompts[name][:upto])[-len(done[name]) :]
        torch.testing.assert_close(done[name], expected, **CLOSE)
    torch.testing.assert_close(
        again["b"][0], reference_logits(path, prompts["b"][:41])[-1], **CLOSE
    )
    torch.testing.assert_close(again["c"], reference_logits(path, prompts["c"][:9])[-2:], **CLOSE)


def test_some_heads_at_a_time_give_the_same(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tokens = checkpoint("deepseek_v3"), prompt_of(40, seed=2)
    whole = latents(path).step({"a": tokens})["a"]
    for heads in (1, 3):
        most = heads * 40 * (MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"] + MLA["v_head_dim"])
        monkeypatch.setattr(latent_attention, "_EXPANDED", most)
        torch.testing.assert_close(latents(path).step({"a": tokens})["a"], whole, **CLOSE)


def test_in_16_bits_it_is_as_near_to_transformers_as_with_expanded_keys(
    checkpoint: Checkpoints,
) -> None:
    path, tokens = checkpoint("deepseek_v3"), prompt_of(100, seed=3)
    exact = reference_logits(path, tokens)

    def far(sequences: Sequences, size: int) -> float:
        pieces = [sequences.step({"a": tokens[at : at + size]})["a"] for at in range(0, 100, size)]
        return float((torch.cat(pieces) - exact).abs().mean())

    usual = far(single_runner(path, dtype="bfloat16"), 100)
    for size in (100, 1):
        assert far(latents(path, dtype="bfloat16"), size) < 1.3 * usual


def test_blocks_that_move_take_the_latents_along(checkpoint: Checkpoints) -> None:
    path, tokens = checkpoint("deepseek_v3"), prompt_of(33, seed=4)
    here, there = latents(path), latents(path)
    assert here.runner.kv_nbytes == 64 * 8 * here.runner.info.kv_bytes_per_token()
    there.step({"a": tokens})
    here.step({"a": prompt_of(33, seed=5)})
    moved = list(zip(there._tables["a"], here._tables["a"], strict=True))
    copied = here.runner.kv.copy_from(there.runner.kv, moved)
    assert copied == len(moved) * 8 * here.runner.info.kv_bytes_per_token()
    token = greedy(path, tokens, 1)
    assert torch.equal(here.step({"a": token})["a"], there.step({"a": token})["a"])


class ScaledExpansion(DeepseekV3Attention):
    """As one that does something else with its latents."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().expand_kv(kv_nope, k_rot)
        return keys, 2 * values


def test_what_expands_otherwise_is_left_as_it_is(checkpoint: Checkpoints) -> None:
    source = ModelSource.open(str(checkpoint("deepseek_v3")))
    usual: nn.Module = DeepseekV3Attention(source.config, 0)
    other: nn.Module = ScaledExpansion(source.config, 0)
    assert not keep_latents(other)
    assert keep_latents(nn.ModuleList([other, usual]))
    assert kept_latent(usual) is not None
    assert kept_latent(other) is None


def test_a_service_keeps_latents_unless_its_bits_are_promised(
    checkpoint: Checkpoints,
) -> None:
    model = str(checkpoint("deepseek_v3"))

    def kept(**settings: Any) -> int:
        overrides = {"model.model": model, **{f"engine.{k}": v for k, v in settings.items()}}
        source = open_source(load_config(environment={}, overrides=overrides))
        return source.info.kv_bytes_per_token()

    assert kept() == kept(device="cuda") == 3 * KEPT * 4
    assert kept(deterministic=True) > 5 * kept()
