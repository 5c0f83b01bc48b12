"""Attention to the keys that an indexer picks is transformers' own, however a prompt is cut.

Of 12 keys here, which a prompt of 40 tokens exceeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    Sequences,
    make_checkpoint,
    prompt_of,
    reference_logits,
    single_runner,
)
from support.small_configs import small_config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from flexpert.config import load_config
from flexpert.engine.memory_plan import kv_blocks
from flexpert.errors import FlexpertError, UnsupportedModel
from flexpert.models.source import ModelSource

FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v32": {},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full", "shared"]},
}
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}
PROMPTS = {"a": prompt_of(40, 1), "b": prompt_of(9, 2), "c": prompt_of(30, 3)}
STEPS = (
    {"a": 20, "b": 5},
    {"b": 1, "c": 11},  # it has seen fewer than are picked, and then
    {"a": 1, "c": 3},  # more
    {"c": 16, "a": 10, "b": 2},
    {"a": 1, "b": 1},
    {"a": 8},
)


@pytest.fixture(scope="module", params=list(FAMILIES))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = request.param
    return make_checkpoint(family, tmp_path_factory.mktemp(family), **FAMILIES[family])


@pytest.mark.parametrize("latents", [False, True], ids=["expanded", "latents"])
@pytest.mark.parametrize("recorded", [False, True], ids=["modules", "recorded"])
def test_steps_of_any_sequences_give_the_logits_of_transformers(
    path: Path, latents: bool, recorded: bool
) -> None:
    sequences = single_runner(path, latent_cache=latents)
    assert sequences.runner.steps.startswith("recorded")
    if not recorded:
        sequences.runner.recorded = None
    expected = {name: reference_logits(path, prompt) for name, prompt in PROMPTS.items()}
    ends = dict.fromkeys(PROMPTS, 0)
    for work in STEPS:
        step = {name: PROMPTS[name][ends[name] : ends[name] + n] for name, n in work.items()}
        for name, logits in sequences.step(step).items():
            rows = slice(ends[name], ends[name] + work[name])
            torch.testing.assert_close(logits, expected[name][rows], **CLOSE)
            ends[name] = rows.stop


def test_deterministic_bits_do_not_depend_on_how_a_prompt_is_cut(path: Path) -> None:
    whole = deterministic(path).step({"a": PROMPTS["a"]})["a"]
    sequences = deterministic(path)
    pieces = []
    for begin, end in ((0, 9), (9, 25), (25, 26), (26, 40)):
        other = {"b": PROMPTS["b"]} if begin == 9 else {}
        pieces.append(sequences.step({**other, "a": PROMPTS["a"][begin:end]})["a"])
    assert torch.equal(torch.cat(pieces), whole)
    torch.testing.assert_close(whole, reference_logits(path, PROMPTS["a"]), **CLOSE)


def deterministic(path: Path) -> Sequences:
    return single_runner(path, deterministic=True)


def test_blocks_that_move_take_the_indexers_keys_along(path: Path) -> None:
    here, there = (single_runner(path, latent_cache=True) for _ in range(2))
    info = here.runner.info
    own = sum(keys is not None for keys in here.runner.kv.index_keys)
    assert own == (2 if info.model_type == "glm_moe_dsa" else 4)
    assert info.kv_bytes_per_token() == (4 * (24 + 8) + own * 16) * 4
    there.step({"a": PROMPTS["a"][:39]})
    here.step({"a": prompt_of(39, seed=5)})
    moved = list(zip(there._tables["a"], here._tables["a"], strict=True))
    assert here.runner.kv.copy_from(there.runner.kv, moved) == 5 * 8 * info.kv_bytes_per_token()
    last = {"a": PROMPTS["a"][39:]}
    assert torch.equal(here.step(last)["a"], there.step(last)["a"])


def test_a_gpu_refuses_it_by_name_where_bits_must_not_depend_on_the_batch(path: Path) -> None:
    info = ModelSource.open(str(path)).info
    settings = {"engine.device": "cuda", "engine.deterministic": True}
    config = load_config(environment={}, overrides=settings)
    with pytest.raises(FlexpertError, match=f"{info.model_type} .* on CPUs only"):
        kv_blocks(info, config.engine)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda forward, *given, **named: forward(*given, **named).float(),
            "than the keys it picks",
        ),
        (
            lambda forward, *given, **named: forward(*given, **{**named, "cache": None}),
            "it is not seen what picks them",
        ),
    ],
    ids=["gives scores", "keeps nothing"],
)
def test_an_indexer_of_another_kind_is_refused(
    change: Callable[..., Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_config("deepseek_v32").save_pretrained(tmp_path)
    original = DeepseekV32Indexer.forward

    @functools.wraps(original)
    def other(*given: Any, **named: Any) -> Any:
        return change(original, *given, **named)

    monkeypatch.setattr(DeepseekV32Indexer, "forward", other)
    with pytest.raises(UnsupportedModel, match=says):
        ModelSource.open(str(tmp_path))
