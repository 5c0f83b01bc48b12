"""Checkpoints with a layer for multi-token prediction, in the layouts that are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Layout = Literal["mtp", "layers"]


def with_draft_layer(model: Path, to: Path, layout: Layout, *, seed: int = 0) -> Path:
    """The checkpoint, with a layer like its last one, behind a projection that is half random.

    layout: Qwen3-Next's (`mtp.…`), or DeepSeek-V3's (a layer more).
    """
    to.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, to)
    settings = json.loads((model / "config.json").read_text())
    layers, width = settings["num_hidden_layers"], settings["hidden_size"]
    tensors = load_file(model / "model.safetensors")
    embeddings = tensors["model.embed_tokens.weight"]
    generator = torch.Generator().manual_seed(seed)

    def like(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * width**-0.5).to(embeddings.dtype)

    if layout == "mtp":
        prefix, projection = "mtp.layers.0.", "mtp.fc"
        norms = ["mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm"]
    else:
        prefix = f"model.layers.{layers}."
        projection = f"{prefix}eh_proj"
        norms = [f"{prefix}{name}" for name in ("enorm", "hnorm", "shared_head.norm")]
        tensors[f"{prefix}embed_tokens.weight"] = embeddings.clone()
        tensors[f"{prefix}shared_head.head.weight"] = embeddings.clone()
    last = f"model.layers.{layers - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[prefix + name.removeprefix(last)] = tensors[name].clone()
    same = torch.eye(width, dtype=embeddings.dtype)
    tensors[f"{projection}.weight"] = (like(width, 2 * width) + torch.cat([same, same], 1)) / 2
    for name in norms:
        tensors[f"{name}.weight"] = 1 + like(width)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to
