#!/usr/bin/env python3
"""Gives the embedded model `tiny` a layer for multi-token prediction, for `serve --speculate mtp`.

The model stays as it is. The layer learns to say what the model itself will say of the token after
the next, on the text that the model learned from (`train_tiny.py corpus`). One core does for it:

  python tools/tiny/train_tiny.py corpus
  python tools/tiny/train_mtp.py --out out/tiny-mtp --minutes 20
  flexpert bench speculate --speculate mtp -- --model out/tiny-mtp

or a minute of a GPU, which has the model say the text as well and needs no corpus:

  python tools/tiny/train_mtp.py --out out/tiny-mtp --minutes 1 --device cuda --own-text --rows 64
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_batches import Sampler, encode
from tiny_corpus import CorpusError
from tiny_model import END_OF_TEXT, SPECIAL, dense_experts
from train_tiny import learning_rate, read_corpus

if TYPE_CHECKING:
    from torch import Tensor

_IN_FILES = {
    "eh_proj.": "mtp.fc.",
    "enorm.": "mtp.pre_fc_norm_embedding.",
    "hnorm.": "mtp.pre_fc_norm_hidden.",
    "norm.": "mtp.norm.",
    "layer.": "mtp.layers.0.",
}
"""Names of the layer's parameters → as Qwen3-Next has them in its files."""


def open_model(folder: Path) -> Any:
    """The model in float32, frozen, with a layer that begins as its last one."""
    import torch
    from transformers import Qwen3MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from flexpert.models.draft_layer import graft

    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config._experts_implementation = "dense"
    model.requires_grad_(requires_grad=False)
    graft(model, torch.float32)
    layer: Any = model.mtp
    layer.layer.load_state_dict(model.model.layers[-1].state_dict())
    with torch.no_grad():
        width = model.config.hidden_size
        torch.nn.init.normal_(layer.eh_proj.weight, std=0.02)
        layer.eh_proj.weight[:, width:] += torch.eye(width)
    return model.train()


def losses(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: [rows, length]. Cross entropy to what the model says, and how often both say the same
    is likeliest."""
    import torch

    decoder, head = model.model, model.lm_head
    with torch.no_grad():
        states = decoder(tokens, use_cache=False).last_hidden_state
        told = head(states[:, 1:]).float()
    embedded = decoder.embed_tokens(tokens[:, 1:])
    at = torch.arange(embedded.shape[1], device=embedded.device)[None]
    found = model.mtp(
        embedded,
        states[:, :-1],
        attention_mask=None,
        position_ids=at,
        position_embeddings=decoder.rotary_emb(embedded, at),
        use_cache=False,
    )
    said = head(found).float()
    loss = torch.nn.functional.cross_entropy(said.flatten(0, 1), told.flatten(0, 1).softmax(-1))
    return loss, (said.argmax(-1) == told.argmax(-1)).float().mean()


def own_text(model: Any, length: int, batches: int = 9, rows: int = 256) -> Tensor:
    """[rows * batches, length]: what the model says after the end of a text, drawn at temperature
    0.3, 0.7 and 1."""
    import torch

    device = model.device
    model.generation_config.eos_token_id = None  # behind an end it goes on with another text
    begin = torch.full((rows, 1), SPECIAL.index(END_OF_TEXT), device=device)
    said = [
        model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            max_length=length,
            do_sample=True,
            temperature=(0.3, 0.7, 1.0)[batch % 3],
            top_k=0,
        )
        for batch in range(batches)
    ]
    return torch.cat(said)


def save(model: Any, source: Path, out: Path) -> None:
    """The model's files as they are, and the layer in bf16 beside its tensors."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    tensors = load_file(source / "model.safetensors")
    for name, value in model.mtp.state_dict().items():
        begin = next(one for one in _IN_FILES if name.startswith(one))
        tensors[_IN_FILES[begin] + name.removeprefix(begin)] = value.to("cpu", torch.bfloat16)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def train(options: argparse.Namespace) -> None:
    """Trains for so many minutes; the last state is kept."""
    import torch
    from tokenizers import Tokenizer

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    model = open_model(options.model).to(options.device)
    if options.own_text:
        text = own_text(model, options.length)
        print(f"the model has said {text.numel()} tokens", flush=True)
    else:
        tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
        streams = encode(tokenizer, *read_corpus(options.build))[0]
        sampler = Sampler(streams, 0.3, options.seed, options.device)
    parameters = list(model.mtp.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=options.peak, betas=(0.9, 0.95), weight_decay=0.01)
    began, step, steps = time.perf_counter(), 0, 1_000_000
    recent: list[tuple[float, float]] = []
    while step < steps:
        if step == 10:
            each = (time.perf_counter() - began) / step
            steps = max(step + 1, int(60 * options.minutes / each))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options.peak, 30)
        if options.own_text:
            rows = text[torch.randint(len(text), (options.rows,))]
        else:
            rows = sampler.rows(options.rows, options.length)[0]
        with torch.autocast(options.device, torch.bfloat16, enabled=not options.float32):
            loss, same = losses(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        recent.append((loss.item(), same.item()))
        if step % 50 == 0 or step == steps:
            mean = [sum(each) / len(recent) for each in zip(*recent, strict=True)]
            recent.clear()
            minutes = (time.perf_counter() - began) / 60
            print(
                f"step {step} of {steps}, {minutes:.1f} min: cross entropy {mean[0]:.3f}, "
                f"the same token {mean[1]:.3f}",
                flush=True,
            )
        if step % 400 == 0 or step == steps:
            save(model, options.model, options.out)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=Path(".data/tiny"), help="of the corpus")
    parser.add_argument("--model", type=Path, default=Path("src/flexpert/models/tiny"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--minutes", type=float, default=20, help="default 20")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--seed", type=int, default=1, help="default 1")
    parser.add_argument("--rows", type=int, default=4, help="rows a step (default 4)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--own-text", action="store_true", help="learn on what the model says, not on the corpus"
    )
    parser.add_argument("--float32", action="store_true", help="no bf16")
    return parser


def main() -> int:
    """Trains the layer."""
    try:
        train(arguments().parse_args())
    except CorpusError as error:
        print(f"train_mtp: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
