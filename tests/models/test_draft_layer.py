"""The layer for multi-token prediction: found in checkpoints, and computed as it is published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import prompt_of, reference, single_runner
from support.draft_checkpoints import Layout, with_draft_layer
from support.fp8_checkpoints import make_fp8_checkpoint
from torch import Tensor

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]
PUBLISHED: dict[Layout, tuple[str, ...]] = {
    "mtp": ("mtp.fc", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"),
    "layers": ("eh_proj", "enorm", "hnorm", "shared_head.norm"),
}
"""Projection; norms of the embedding, of the state, and of the result. Of `layers` they follow the
number of the layer."""


def published(plain: Path, drafting: Path, layout: Layout, tokens: list[int]) -> Tensor:
    """[tokens - 1, vocab] float32: logits of the token after the next one of each, by transformers'
    own layer over a whole sequence."""
    model: Any = reference(plain)
    tensors = load_file(drafting / "model.safetensors")
    before = f"model.layers.{model.config.num_hidden_layers}." if layout == "layers" else ""
    projection, *norms = (tensors[f"{before}{name}.weight"] for name in PUBLISHED[layout])

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        norm = type(model.model.norm)(len(weight), eps=model.config.rms_norm_eps)
        norm.weight.data = weight
        result: Tensor = norm(x)
        return result

    with torch.inference_mode():
        given = torch.tensor([tokens])
        states = model.model(given).last_hidden_state[:, :-1]
        embedded = model.model.embed_tokens(given[:, 1:])
        x = torch.cat([normed(embedded, norms[0]), normed(states, norms[1])], -1) @ projection.t()
        count = x.shape[1]
        at = torch.arange(count)[None]
        found = model.model.layers[-1](
            x,
            attention_mask=torch.full((1, 1, count, count), -torch.inf).triu(1),
            position_ids=at,
            position_embeddings=model.model.rotary_emb(x, at),
        )
        result: Tensor = model.lm_head(normed(found, norms[2]))[0]
    return result


@pytest.mark.parametrize(
    ("family", "layout", "how"),
    [
        ("qwen3_moe", "mtp", {}),
        ("qwen3_moe", "layers", {"deterministic": True}),
        ("deepseek_v3", "layers", {}),
        ("deepseek_v3", "layers", {"latent_cache": True}),
        ("glm4_moe", "layers", {}),
        ("glm4_moe_lite", "layers", {"latent_cache": True}),
        ("deepseek_v32", "layers", {}),
        ("qwen3_next", "mtp", {}),
        ("qwen3_5_moe_text", "mtp", {}),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_it_computes_what_is_published(
    checkpoint: Checkpoints,
    tmp_path: Path,
    family: str,
    layout: Layout,
    how: dict[str, bool],
    recorded: bool,
) -> None:
    plain = checkpoint(family)
    drafting = with_draft_layer(plain, tmp_path / "drafting", layout)
    tokens = prompt_of(21, seed=3)
    expected = published(plain, drafting, layout, tokens)
    sequences = single_runner(drafting, drafts=True, **how)
    assert sequences.runner.drafts is not None
    assert sequences.runner.drafts.recorded is not None
    if not recorded:
        sequences.runner.recorded = sequences.runner.drafts.recorded = None
    whole = single_runner(plain, **how).step({"a": tokens})["a"]
    found, logits = [], []
    for begin, end in ((0, 9), (9, 17), (17, 18), (18, 20)):  # chunks of a prompt, then decoding
        logits.append(sequences.step({"a": tokens[begin:end]})["a"].clone())
        after = torch.tensor(tokens[begin + 1 : end + 1])
        found.append(sequences.runner.draft(replace(sequences.batch, token_ids=after)))
    torch.testing.assert_close(torch.cat(found), expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(torch.cat(logits), whole[:20], rtol=1e-4, atol=1e-4)
    only = sequences.runner.draft(
        replace(sequences.batch, token_ids=after, sample_rows=torch.tensor([1]))
    )
    torch.testing.assert_close(only, expected[19:20], rtol=2e-4, atol=2e-4)


def test_it_is_dequantized_like_the_other_layers(tmp_path: Path) -> None:
    found = []
    for files in make_fp8_checkpoint("deepseek_v3", tmp_path):
        drafting = with_draft_layer(files, tmp_path / f"drafting-{files.name}", "layers")
        sequences = single_runner(drafting, drafts=True)
        tokens = prompt_of(12, seed=1)
        sequences.step({"a": tokens[:11]})
        after = torch.tensor(tokens[1:])
        found.append(sequences.runner.draft(replace(sequences.batch, token_ids=after)))
    assert torch.equal(*found)


def test_it_is_a_layer_more_and_not_read_unless_wanted(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    drafting = with_draft_layer(checkpoint("deepseek_v3"), tmp_path / "drafting", "layers")
    without, with_it = (ModelSource.open(str(drafting), drafts=drafts) for drafts in (False, True))
    assert with_it.info.moe_layers == without.info.moe_layers + 1
    assert len(with_it.info.attention) == len(without.info.attention) + 1
    assert with_it.info.kv_bytes_per_token() * 3 == without.info.kv_bytes_per_token() * 4
    (skipped,) = with_it.accounting.skipped
    assert sorted(key.partition("layers.3.")[2] for key in skipped.keys) == [
        "embed_tokens.weight",
        "shared_head.head.weight",
    ]


def test_a_checkpoint_without_one_is_refused_where_it_is_wanted(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="leave --speculate mtp out"):
        ModelSource.open(str(checkpoint("qwen3_moe")), drafts=True)
    drafting = with_draft_layer(checkpoint("qwen3_moe"), tmp_path / "drafting", "mtp")
    tensors = load_file(drafting / "model.safetensors")
    del tensors["mtp.norm.weight"]
    save_file(tensors, drafting / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*mtp\.norm\.weight"):
        ModelSource.open(str(drafting), drafts=True)


@pytest.mark.parametrize(
    ("family", "how"),
    [("qwen3_moe", {}), ("deepseek_v3", {"latent_cache": True}), ("deepseek_v32", {})],
)
def test_where_it_is_not_computed_its_keys_are_0_and_the_model_gives_the_same(
    checkpoint: Checkpoints, tmp_path: Path, family: str, how: dict[str, bool]
) -> None:
    drafting = with_draft_layer(checkpoint(family), tmp_path / "drafting", "layers")
    sequences = single_runner(drafting, drafts=True, **how)
    tokens, kv = prompt_of(20, seed=4), sequences.runner.kv
    whole = sequences.step({"whole": tokens})["whole"].clone()
    for part in kv.parts:
        part.fill_(torch.nan)
    slots = sequences.batch.slot_mapping
    sequences.runner.leave_out_drafts(slots)
    for layer in range(len(kv.layers)):
        here = [(~part.isnan().any(1)).nonzero()[:, 0] for part in kv.slots_of(layer)]
        expected = slots.sort().values if layer == len(kv.layers) - 1 else slots[:0]
        assert all(map(expected.equal, here))
    assert all((part[slots] == 0).all() for part in kv.slots_of(-1))
    sequences.step({"gap": tokens[:9]})
    sequences.runner.leave_out_drafts(sequences.batch.slot_mapping)
    rest = sequences.step({"gap": tokens[9:]})["gap"].clone()
    found = sequences.runner.draft(
        replace(sequences.batch, token_ids=torch.tensor([*tokens[10:], 1]))
    )
    assert found.isfinite().all()
    torch.testing.assert_close(rest, whole[9:], rtol=1e-4, atol=1e-4)
