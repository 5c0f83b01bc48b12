"""Write a random Qwen3-MoE as wide as Qwen3-30B-A3B, or one of 1 B parameters, with a tokenizer
whose tokens are words: those of the text that `flexpert bench` draws random prompts from, and w0,
w1, ….

    PYTHONPATH=src python tools/gpu/random_model.py FOLDER [--layers 12] [--device cuda]
    PYTHONPATH=src python tools/gpu/random_model.py FOLDER --small --device cpu

12 layers are 15 GB in bfloat16, made in some 15 s on a GPU; the small one is 2 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from flexpert.bench.model_shapes import qwen3_30b_a3b, qwen3_moe_1b
from flexpert.bench.prompts import POOL_TEXT


def make_model(folder: Path, config: PreTrainedConfig, device: str) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
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
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    config = qwen3_moe_1b() if args.small else qwen3_30b_a3b(args.layers)
    make_model(args.folder, config, args.device)


if __name__ == "__main__":
    main()
