"""Write a random Qwen3-MoE as wide as Qwen3-30B-A3B, or one of 1 B parameters, with a tokenizer
whose tokens are words: those of the text that `flexpert bench` draws random prompts from, and w0,
w1, ….

    PYTHONPATH=src python tools/gpu/random_model.py FOLDER [--layers 12] [--device cuda]
    PYTHONPATH=src python tools/gpu/random_model.py FOLDER --small --device cpu
    PYTHONPATH=src python tools/gpu/random_model.py FOLDER --mtp [--say 0.5]

With `--mtp` it has a layer for multi-token prediction, and says mostly what follows from the last
token, as that layer does: the less the other layers have to say, the more often they agree.
12 layers are 15 GB in bfloat16, made in some 15 s on a GPU; the small one is 2 GB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from flexpert.bench.model_shapes import qwen3_30b_a3b, qwen3_moe_1b
from flexpert.bench.prompts import POOL_TEXT


def agree(model: Qwen3MoeForCausalLM, say: float) -> None:
    """say: what attention and experts of each layer add counts so much."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                weight.normal_()
            elif name.endswith(("o_proj.weight", "down_proj")):
                weight.mul_(say)


def add_draft_layer(folder: Path, layers: int, width: int) -> None:
    """A layer like the last one, told the last token alone, in a file of its own."""
    before, tensors = f"model.layers.{layers - 1}.", {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping
                if name.startswith(before):
                    tensors[f"mtp.layers.0.{name.removeprefix(before)}"] = stored.get_tensor(name)
    one = torch.ones(width, dtype=torch.bfloat16)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        tensors[f"mtp.{name}.weight"] = one.clone()
    same = torch.eye(width, dtype=torch.bfloat16)
    tensors["mtp.fc.weight"] = torch.cat([same, 0 * same], 1)
    save_file(tensors, folder / "mtp.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"] |= dict.fromkeys(tensors, "mtp.safetensors")
    index.write_text(json.dumps(known))


def make_model(
    folder: Path, config: PreTrainedConfig, device: str, mtp: float | None = None
) -> None:
    """mtp: with a layer for multi-token prediction; see `agree`."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if mtp is not None:
        agree(model, mtp)
    model.save_pretrained(folder, max_shard_size="1GB" if mtp is not None else "4GB")
    if mtp is not None:
        add_draft_layer(folder, config.num_hidden_layers, config.hidden_size)
    numbered = (f"w{number}" for number in range(config.vocab_size))
    words = dict.fromkeys(["w0", "w1", *POOL_TEXT.split(), *numbered])
    known = dict(zip(words, range(config.vocab_size), strict=False))
    tokenizer = Tokenizer(WordLevel(known, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e9:.1f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--small", action="store_true", help="1 B parameters in 16 layers")
    parser.add_argument("--mtp", action="store_true", help="with a layer that proposes tokens")
    parser.add_argument("--say", type=float, default=0.5, help="of layers, with --mtp")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_moe_1b() if args.small else qwen3_30b_a3b(args.layers)
    make_model(args.folder, config, args.device, args.say if args.mtp else None)


if __name__ == "__main__":
    main()
