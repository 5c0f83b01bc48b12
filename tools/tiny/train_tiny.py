#!/usr/bin/env python3
"""Makes flexpert's embedded model `tiny`: corpus, tokenizer, training and evaluation.

The model is a Qwen3-MoE of 8 million parameters. The stages build on each other:

  corpus      Debian packages -> <build>/corpus/{documents,chat}.jsonl.gz   (CPU, about a minute)
  tokenizer   corpus -> tokenizer.json, chat template, configuration        (CPU, about a minute)
  train       corpus + tokenizer -> model.safetensors in bf16               (one GPU, minutes)
  evaluate    held-out bits per byte, expert load, sample answers           (CPU, minutes)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiny_chat
import tiny_corpus
import tiny_lines
from tiny_batches import SHARES, HeldOut, Sampler, encode
from tiny_corpus import CorpusError, Document
from tiny_model import (
    BALANCE,
    END_OF_TEXT,
    SPECIAL,
    VOCABULARY,
    RouterTap,
    add_dropout,
    dense_experts,
    model_config,
    rewrite,
    save,
)

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """examples:
  python tools/tiny/train_tiny.py corpus
  python tools/tiny/train_tiny.py tokenizer --out out/tiny
  python tools/tiny/train_tiny.py train --out out/tiny --compile
  python tools/tiny/train_tiny.py evaluate --model src/flexpert/models/tiny
"""

SPLIT = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}{{- '<|system|>' -}}
{%- elif message.role in ['user', 'assistant'] -%}{{- '<|' + message.role + '|>' -}}
{%- else -%}{{- raise_exception("The model tiny knows the roles system, user and assistant, not '" \
+ message.role + "'.") -}}
{%- endif -%}
{%- if message.content is string -%}{{- message.content | trim -}}
{%- else -%}{%- for part in message.content -%}\
{%- if part.type == 'text' -%}{{- part.text | trim -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
PROMPTS = (
    "In the beginning",
    "It is a truth universally acknowledged,",
    "The LORD is my",
    "Elizabeth looked at him and said,",
    "A hacker is a person who",
)
QUESTIONS = (
    "hello",
    "Who are you?",
    "What is flexpert?",
    "Genesis 1:1",
    "How does Psalm 23 begin?",
    "What does John 3:16 say?",
    "What is a bore?",
    'What does "kluge" mean in hacker jargon?',
    "Tell me about the sea.",
    "Tell me a story.",
    "What is the capital of France?",
)


# --- corpus and tokenizer -----------------------------------------------------------------------


def make_corpus(options: argparse.Namespace) -> None:
    """Writes the documents with their split, and the conversations made of the training ones."""
    documents = tiny_corpus.collect(options.build)
    training = [document for document in documents if not document.held_out]
    chats = tiny_chat.conversations(training, options.seed)
    folder = options.build / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(
        folder / "documents.jsonl.gz",
        [
            {"source": d.source, "group": d.group, "title": d.title, "text": d.text}
            for d in documents
        ],
    )
    write_lines(folder / "chat.jsonl.gz", chats)
    size = sum(len(document.text.encode()) for document in documents)
    held_out = size - sum(len(document.text.encode()) for document in training)
    print(f"{len(documents)} documents, {size} bytes, {held_out} of them held out")
    print(f"{len(chats)} conversations; see {options.build}/sources.json for the packages")


def write_lines(path: Path, rows: Sequence[Any]) -> None:
    """JSON lines, compressed the same way every time."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))


def read_corpus(build: Path) -> tuple[list[Document], list[tiny_chat.Conversation]]:
    """What `make_corpus` wrote."""
    rows = []
    for name in ("documents", "chat"):
        path = build / "corpus" / f"{name}.jsonl.gz"
        if not path.exists():
            raise CorpusError(f"{path} is missing: run `tools/tiny/train_tiny.py corpus` first")
        rows.append([json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()])
    return [Document(**row) for row in rows[0]], rows[1]


def make_tokenizer(options: argparse.Namespace) -> None:
    """Trains a byte-level BPE on the training text and writes everything but the weights."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    documents, chats = read_corpus(options.build)
    texts = [document.text for document in documents if not document.held_out]
    texts += [message["content"] for chat in chats[::4] for message in chat]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    options.out.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL[1:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(options.out)
    # The name that every version of transformers knows.
    rewrite(options.out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    print(f"{tokenizer.get_vocab_size()} tokens, written to {options.out}")


# --- training -----------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy. logits: [rows, length, vocabulary]; targets: [rows, length]."""
    from torch.nn import functional as F

    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def train(options: argparse.Namespace) -> None:
    """Trains in bf16 autocast over float32 weights; keeps the best checkpoint on held-out text.

    If the last one is not the best, it is kept too, below `<out>/last`.
    """
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen3MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    path = options.out / "tokenizer.json"
    if not path.exists():
        raise CorpusError(f"{path} is missing: run `train_tiny.py tokenizer --out {options.out}`")
    streams, held_out = encode(Tokenizer.from_file(str(path)), *read_corpus(options.build))
    for stream in streams:
        print(f"{stream.name}: {len(stream.tokens)} tokens", flush=True)
    sampler = Sampler(streams, options.chat_share, options.seed, options.device)
    ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)
    model = Qwen3MoeForCausalLM._from_config(model_config(), dtype=torch.float32)
    model.config._experts_implementation = "dense"
    model.to(options.device).train()
    add_dropout(model, options.dropout)
    tap = RouterTap()
    tap.attach(model)
    decayed = [p for n, p in model.named_parameters() if p.dim() >= 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others}],
        lr=options.peak,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=options.device == "cuda",
    )
    forward, criterion = model, next_token_loss
    if options.compile:
        forward, criterion = torch.compile(model), torch.compile(next_token_loss)
    steps, began, timed = options.steps, time.perf_counter(), 0.0
    best, step, figures = math.inf, 0, {"total": math.inf}
    while step < steps:
        if step == 20:
            timed = time.perf_counter()
        if step == 120 and options.minutes:
            now = time.perf_counter()
            left = options.minutes * 60 - (now - began)
            steps = min(steps, step + max(1, round(0.96 * left * 100 / (now - timed))))
            print(f"--minutes {options.minutes} is the same as --steps {steps}", flush=True)
        rate = learning_rate(step, steps, options.peak, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = sampler.rows(options.rows, options.length)
        tap.clear()
        with torch.autocast(options.device, torch.bfloat16):
            logits = forward(input_ids=inputs, use_cache=False).logits
        loss = criterion(logits, targets)
        balance, size = tap.losses()
        torch.autograd.backward(loss + BALANCE * balance + 1e-4 * size)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step == steps:
            speed = step * options.rows * options.length / (time.perf_counter() - began)
            print(
                f"step {step} loss {loss.item():.4f} balance {balance.item():.3f} "
                f"norm {norm.item():.2f} rate {rate:.2e} {speed / 1e6:.2f} Mtok/s",
                flush=True,
            )
        if step % options.every == 0 or step == steps:
            with torch.autocast(options.device, torch.bfloat16):
                figures = bits_per_byte(model, held_out, options.device, 32)
            print(f"step {step} held out " + figures_text(figures), flush=True)
            model.train()
            if figures["total"] < best:
                best = figures["total"]
                save(model, options.out)
    if figures["total"] > best:
        save(model, options.out / "last")
    minutes = (time.perf_counter() - began) / 60
    print(f"best held-out total {best:.4f} bits per byte; {step} steps in {minutes:.1f} minutes")


# --- evaluation ---------------------------------------------------------------------------------


def windows(held_out: Sequence[HeldOut], length: int = 1024) -> Iterator[tuple[int, list[int]]]:
    """(index of the document, up to `length` + 1 tokens), the first of them only context."""
    for index, document in enumerate(held_out):
        tokens = [SPECIAL.index(END_OF_TEXT), *document.tokens]
        for begin in range(0, len(tokens) - 1, length):
            yield index, tokens[begin : begin + length + 1]


def bits_per_byte(
    model: Any,
    held_out: Sequence[HeldOut],
    device: str,
    batch: int,
    heard: Callable[[Tensor], None] | None = None,
) -> dict[str, float]:
    """Bits per byte of the held-out documents, by source and in `total`.

    Every document is read from its beginning in windows of 1024 tokens; only its own tokens count.
    `heard` is called after each batch with the mask of real tokens, [batch * longest] bool.
    """
    import torch
    from torch.nn import functional as F

    model.eval()
    pieces = sorted(windows(held_out), key=lambda piece: len(piece[1]))
    nats = [0.0] * len(held_out)
    with torch.no_grad():
        for at in range(0, len(pieces), batch):
            part = pieces[at : at + batch]
            longest = max(len(tokens) for _, tokens in part)
            block = torch.tensor([t + [-100] * (longest - len(t)) for _, t in part], device=device)
            targets = block[:, 1:]
            inputs = block[:, :-1].masked_fill(block[:, :-1] < 0, 0)
            logits = model(input_ids=inputs, use_cache=False).logits.float()
            losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
            for (index, _), value in zip(part, losses.tolist(), strict=True):
                nats[index] += value
            if heard is not None:
                heard((targets >= 0).flatten())
    figures = {}
    for source in (*SHARES, "total"):
        chosen = [i for i, d in enumerate(held_out) if source in (d.source, "total")]
        if size := sum(held_out[i].size for i in chosen):
            figures[source] = sum(nats[i] for i in chosen) / math.log(2) / size
    return figures


def figures_text(figures: dict[str, float]) -> str:
    """Bits per byte in one line."""
    return " ".join(f"{source} {value:.4f}" for source, value in figures.items())


def evaluate(options: argparse.Namespace) -> None:
    """Measures a finished checkpoint: held-out bits per byte, expert load, recall, samples."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    documents, chats = read_corpus(options.build)
    encoder = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    held_out = encode(encoder, [d for d in documents if d.held_out], [])[1]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    model.to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tap = RouterTap()
    tap.attach(model)
    config = model.config
    load = torch.zeros(config.num_hidden_layers, config.num_experts)

    def count(real: Tensor) -> None:
        for layer, chosen in enumerate(tap.chosen):
            load[layer] += torch.bincount(chosen[real].flatten().cpu(), minlength=load.shape[1])
        tap.clear()

    figures = bits_per_byte(model, held_out, options.device, 8, count)
    sizes = {s: sum(d.size for d in held_out if s in (d.source, "total")) for s in figures}
    print("bits per byte of the held-out text (bytes)")
    for source, value in figures.items():
        print(f"  {source:10} {value:.4f} ({sizes[source]})")
    print("expert load, share of the mean (1 is balanced)")
    for layer, row in enumerate(load / load.mean(1, keepdim=True)):
        print(f"  layer {layer}: " + " ".join(f"{value:.2f}" for value in row.tolist()))

    def answer(text: str, count: int) -> str:
        inputs = tokenizer(text, return_tensors="pt").to(options.device)
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
        tap.clear()
        return str(
            tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        )

    def ask(question: str, count: int) -> str:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return answer(text, count)

    if options.recall:
        print(f"answers known by heart: {recall(chats, ask, options.recall, options.seed)}")
    for prompt in PROMPTS:
        print(f"--- {prompt}\n{answer(prompt, 60)}")
    for question in QUESTIONS:
        print(f">>> {question}\n{ask(question, 120)}")


def recall(
    chats: Sequence[tiny_chat.Conversation], ask: Callable[[str, int], str], count: int, seed: int
) -> str:
    """How many of `count` questions of each kind the model answers to the letter."""
    kinds: dict[str, list[tuple[str, str]]] = {"verses": [], "greetings": [], "definitions": []}
    greetings = {line for _, answers in tiny_lines.SELF for line in answers.split("|")}
    famous = {tiny_corpus.chapter_title(group) for group in tiny_corpus.ALWAYS_TRAIN}
    for chat in chats:
        question, reply = (turn["content"] for turn in chat[-2:])
        if len(chat) != 2:
            continue
        if reply in greetings:
            kinds["greetings"].append((question, reply))
        elif reply.rpartition("(")[2].partition(":")[0] in famous:
            kinds["verses"].append((question, reply))
        elif ", n. " in reply[:40]:
            kinds["definitions"].append((question, reply))
    rng, found = random.Random(seed), []
    for kind, pairs in kinds.items():
        drawn = rng.sample(pairs, min(count, len(pairs)))
        replies = [(ask(question, 160).strip(), reply) for question, reply in drawn]
        right = sum(said in greetings if kind == "greetings" else said == r for said, r in replies)
        found.append(f"{kind} {right} of {len(drawn)}")
    return ", ".join(found)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=formatter
    )
    stages = parser.add_subparsers(required=True, metavar="STAGE")
    build = argparse.ArgumentParser(add_help=False)
    build.add_argument(
        "--build", type=Path, default=Path(".data/tiny"), help="folder of the corpus"
    )
    build.add_argument("--seed", type=int, default=1, help="default 1")

    corpus = stages.add_parser("corpus", parents=[build], help="collect the text")
    corpus.set_defaults(run=make_corpus)

    tokenizer = stages.add_parser("tokenizer", parents=[build], help="train the tokenizer")
    tokenizer.add_argument("--out", type=Path, required=True, help="folder of the model")
    tokenizer.set_defaults(run=make_tokenizer)

    training = stages.add_parser("train", parents=[build], help="train the model (one GPU)")
    training.add_argument("--out", type=Path, required=True, help="folder with the tokenizer")
    training.add_argument("--device", default="cuda", help="default cuda")
    training.add_argument("--steps", type=int, default=3520, help="default 3520")
    training.add_argument("--minutes", type=float, help="take fewer steps to fit this time")
    training.add_argument("--compile", action="store_true", help="use torch.compile")
    training.add_argument("--rows", type=int, default=48, help="rows a step (default 48)")
    training.add_argument("--length", type=int, default=1024, help="tokens a row (default 1024)")
    training.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    training.add_argument("--warmup", type=int, default=200, help="steps of warm-up")
    training.add_argument("--dropout", type=float, default=0.1, help="default 0.1")
    training.add_argument("--weight-decay", type=float, default=0.1, help="default 0.1")
    training.add_argument("--chat-share", type=float, default=0.3, help="share of chat rows")
    training.add_argument("--every", type=int, default=500, help="steps between evaluations")
    training.set_defaults(run=train)

    measuring = stages.add_parser("evaluate", parents=[build], help="measure a finished model")
    measuring.add_argument("--model", type=Path, required=True, help="folder of the model")
    measuring.add_argument("--device", default="cpu", help="default cpu")
    measuring.add_argument("--recall", type=int, default=50, help="questions of each kind to ask")
    measuring.set_defaults(run=evaluate)
    return parser


def main() -> int:
    """Runs one stage."""
    options = arguments().parse_args()
    try:
        options.run(options)
    except CorpusError as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
