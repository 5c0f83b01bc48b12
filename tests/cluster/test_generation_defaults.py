"""What a model's generation_config.json says about answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexpert.cluster.generation_defaults import FILE, sampling_defaults
from flexpert.errors import ConfigError, ModelError

SAID = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "repetition_penalty": 1.05,
    "max_new_tokens": 2048,
    "eos_token_id": [1, 2],
    "transformers_version": "5.0",
}


def write(folder: Path, told: object) -> None:
    (folder / FILE).write_text(told if isinstance(told, str) else json.dumps(told))


def test_settings_that_are_said_hold_by_our_names(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path, "auto") == {}
    write(tmp_path, SAID)
    expected = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }
    assert sampling_defaults(tmp_path, "auto") == expected
    assert sampling_defaults(Path("/nowhere"), str(tmp_path)) == expected
    for off in ("none", "vllm"):
        assert sampling_defaults(tmp_path, off) == {}
    with pytest.raises(ConfigError, match=f"there is no .*{FILE}"):
        sampling_defaults(tmp_path, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("told", ["{", "[]", {"top_p": 7}, {"temperature": "hot"}, {"top_k": 0.5}])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, told: object) -> None:
    write(tmp_path, told)
    with pytest.raises(ModelError, match=rf"{FILE} cannot be used: .*--generation-config none"):
        sampling_defaults(tmp_path, "auto")
