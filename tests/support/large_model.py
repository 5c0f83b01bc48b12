"""A random Qwen3-MoE of many GB, made on a GPU."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import torch
from transformers import Qwen3MoeForCausalLM

from flexpert.bench.model_shapes import qwen3_30b_a3b


def make_model(folder: Path, layers: int) -> None:
    """A checkpoint of so many layers, 1.2 GB each, with the embedded model's tokenizer."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(qwen3_30b_a3b(layers))
    model.save_pretrained(folder, max_shard_size="4GB")
    torch.set_default_dtype(torch.float32)
    tiny = Path(str(resources.files("flexpert.models").joinpath("tiny")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny / name, folder / name)
    del model
    torch.cuda.empty_cache()
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"a model of {size / 1e9:.1f} GB", flush=True)
