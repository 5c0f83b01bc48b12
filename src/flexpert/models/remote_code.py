"""Code that a checkpoint brings along: never run unless asked for, then as transformers runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from flexpert.errors import UnsupportedModel
from flexpert.reading import shown

CODE_FILES: Final = ["*.py"]
"""What is downloaded besides, if a checkpoint's code may be run."""

SAME_AS: Final = {"kimi_k2": "deepseek_v3"}
"""Model types that transformers has under another name, with the same settings and weights.

kimi_k2: https://huggingface.co/moonshotai/Kimi-K2-Instruct calls its architecture
DeepseekV3ForCausalLM, and its config.json has DeepSeek-V3's settings.
"""


def read_config(path: Path, *, trusted: bool) -> PreTrainedConfig:
    """A checkpoint's configuration.

    Args:
        path: its directory, whose config.json is a JSON object.
        trusted: its own code may be run.

    Raises:
        UnsupportedModel: transformers does not know the model.
        Exception: whatever transformers raises on odd settings.
    """
    told: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    family, brought = told.get("model_type"), told.get("auto_map")
    known = SAME_AS.get(family) if isinstance(family, str) else None
    if known is not None and not trusted:
        told = {name: one for name, one in told.items() if name not in ("auto_map", "model_type")}
        config: PreTrainedConfig = AutoConfig.for_model(known, **told)
        return config
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    except ValueError as error:
        if isinstance(brought, dict) and "trust_remote_code" in str(error):
            raise UnsupportedModel(
                f"{path}: the installed transformers does not know the model type {shown(family)}; "
                f"the checkpoint brings code for it ({shown(brought.get('AutoConfig'))}), which is "
                "run only if you say so: read it, then give --trust-remote-code"
            ) from None
        if "does not recognize this architecture" in str(error):
            raise UnsupportedModel(
                f"{path}: the installed transformers does not know this model ({error})"
            ) from error
        raise


def brought_class(path: Path, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The causal language model of a checkpoint's own code; None: it brings none. Runs the code.

    Raises:
        Exception: whatever the code raises.
    """
    name = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if name is None:
        return None
    found: type[PreTrainedModel] = get_class_from_dynamic_module(name, str(path))
    return found
