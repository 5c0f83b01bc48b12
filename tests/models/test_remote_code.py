"""A checkpoint's own code runs if that is asked for, and in no other case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import prompt_of, random_model, reference_logits, single_runner
from support.local_ranks import greedy_on
from transformers import AutoModelForCausalLM

from flexpert.errors import ModelError, UnsupportedModel
from flexpert.models.source import ModelSource

Checkpoints = Callable[..., Path]

CONFIGURATION = """
from pathlib import Path
from transformers import Qwen3MoeConfig
Path({ran!r}).touch()
class OurConfig(Qwen3MoeConfig):
    model_type = "ours"
"""
MODEL = """
from transformers import Qwen3MoeForCausalLM
from .configuration_ours import OurConfig
class OurModel(Qwen3MoeForCausalLM):
    config_class = OurConfig
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = -found.logits
        return found
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a checkpoint with code of its own, the file that the code makes when it runs)"""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model, path = random_model("qwen3_moe", tie_word_embeddings=False), tmp_path / "model"
    model.config.save_pretrained(path)
    # transformers converts no names of its own families for classes that are not its own
    save_file(model.state_dict(), path / "model.safetensors", {"format": "pt"})
    ran = tmp_path / "ran"
    (path / "configuration_ours.py").write_text(CONFIGURATION.format(ran=str(ran)))
    (path / "modeling_ours.py").write_text(MODEL)
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "ours"
    config["architectures"] = ["OurModel"]
    config["auto_map"] = {
        "AutoConfig": "configuration_ours.OurConfig",
        "AutoModelForCausalLM": "modeling_ours.OurModel",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path, ran


def test_it_is_named_and_not_run(own: tuple[Path, Path]) -> None:
    path, ran = own
    with pytest.raises(UnsupportedModel, match=r"ours.*configuration_ours.*--trust-remote-code"):
        ModelSource.open(str(path))
    assert not ran.exists()


def test_it_is_run_where_it_is_trusted(own: tuple[Path, Path]) -> None:
    path, ran = own
    source = ModelSource.open(str(path), trust_remote_code=True)
    assert ran.exists()
    assert source.info.architecture == "OurModel"
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    prompt = prompt_of(20, seed=1)
    (answer,) = greedy_on(source, 2, [prompt], 6)
    with torch.inference_mode():
        logits = theirs(torch.tensor([[*prompt, *answer]])).logits[0]
    assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_code_of_a_family_that_transformers_has_is_passed_over(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """As published checkpoints of DeepSeek-V3 bring some from before transformers knew it."""
    path = copy_with(checkpoint("deepseek_v3"), tmp_path, auto_map={"AutoConfig": "none.None"})
    assert ModelSource.open(str(path)).info.architecture == "DeepseekV3ForCausalLM"


def test_a_family_by_another_name_needs_no_code(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Kimi-K2 is DeepSeek-V3 to the last setting but its name."""
    path = copy_with(
        checkpoint("deepseek_v3"),
        tmp_path,
        model_type="kimi_k2",
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    )
    tokens = prompt_of(30, seed=3)
    logits = single_runner(path).step({"a": tokens})["a"]
    expected = reference_logits(checkpoint("deepseek_v3"), tokens)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_code_that_fails_is_the_checkpoints_fault(own: tuple[Path, Path]) -> None:
    path, _ = own
    (path / "modeling_ours.py").write_text("raise RuntimeError('not today')")
    with pytest.raises(ModelError, match="not today"):
        ModelSource.open(str(path), trust_remote_code=True)


def copy_with(path: Path, folder: Path, **settings: object) -> Path:
    """A checkpoint with other settings in its config.json."""
    copy = folder / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "config.json").unlink()
    told = json.loads((path / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(told | settings))
    return copy
