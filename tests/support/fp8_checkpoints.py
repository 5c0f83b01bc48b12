"""Checkpoints with fp8 weights as they come from the hub, and the same dequantized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flexpert.kernels import block_fp8 as fp8
from support.checkpoints import make_checkpoint

SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256}
SETTINGS: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def make_fp8_checkpoint(family: str, directory: Path, **changes: Any) -> tuple[Path, Path]:
    """(with fp8 projections, the same with dequantized ones) of one random model in float32."""
    plain = make_checkpoint(family, directory / "plain", **{**SIZES, **changes})
    quantized: dict[str, torch.Tensor] = {}
    dequantized: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(plain / "model.safetensors").items():
        quantized[key] = dequantized[key] = tensor
        if tensor.ndim == 2 and "proj" in key:
            weight, scales = fp8.quantize(tensor)
            quantized[key], quantized[f"{key}_scale_inv"] = weight, scales
            dequantized[key] = fp8.dequantize(weight, scales)
    small, large = directory / "fp8", directory / "dequantized"
    for path, state in ((small, quantized), (large, dequantized)):
        path.mkdir()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        if path is small:
            config["quantization_config"] = SETTINGS
        (path / "config.json").write_text(json.dumps(config))
    return small, large


def change_settings(checkpoint: Path, **settings: Any) -> None:
    """Write other settings of its quantization into a checkpoint."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"].update(settings)
    (checkpoint / "config.json").write_text(json.dumps(config))
