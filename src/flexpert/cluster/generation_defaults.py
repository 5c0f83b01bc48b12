"""Sampling settings that a model's authors recommend, in its generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexpert.engine.request import SamplingParams
from flexpert.errors import ConfigError, ModelError, RequestError

FILE = "generation_config.json"
_NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Ours by theirs: those that vLLM takes over, too."""


def sampling_defaults(model: Path, setting: str) -> dict[str, Any]:
    """By our names, only what the file says.

    Args:
        setting: "auto": the model's own; "vllm", "none": nothing; else a folder.

    Raises:
        ModelError, ConfigError: the file, or the folder that was named, is no such thing.
    """
    if setting in ("vllm", "none"):
        return {}
    path = (model if setting == "auto" else Path(setting).expanduser()) / FILE
    if not path.is_file():
        if setting == "auto":
            return {}
        raise ConfigError(f"model.generation_config: there is no {path}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = {
            ours: told[theirs] for theirs, ours in _NAMES.items() if told.get(theirs) is not None
        }
        SamplingParams(**found).check()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, RequestError) as error:
        raise ModelError(
            f"{path} cannot be used: {error}; --generation-config none leaves it out"
        ) from None
    return found
