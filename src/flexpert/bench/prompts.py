"""What the requests of a measurement ask: random token ids, or a file of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from flexpert.bench.load import LoadError, Target, call, error_message
from flexpert.errors import ConfigError
from flexpert.reading import read_text

Prompt = str | list[int]

_MOST_BYTES = 1 << 28
_FEWEST = 32  # tokens of a pool: prompts of fewer would be much alike

# Its token ids are what random prompts are drawn from: they are ordinary tokens of whatever
# model is served, and no tokenizer is needed here.
POOL_TEXT = """In the beginning God created the heaven and the earth. It was the best of times,
it was the worst of times; whereas every machine, however quickly it counts, waits for memory.
"Why," asked the traveller, "would 3 ranks share 128 experts?" Nobody knew: perhaps from thrift,
perhaps out of habit. Fishermen mended nets, bakers kneaded dough, children laughed and played
among apple trees, old men talked of kings, wars, winters, ships (and of the 24 ducats)."""


class _Line(msgspec.Struct):
    prompt: Prompt


def read_prompts(file: Path, count: int) -> list[Prompt]:
    """The first `count` prompts of a file, over again if it has fewer.

    Lines of text, or JSON lines, each a text or an object with "prompt": a text or token ids.

    Raises:
        ConfigError: unreadable, empty, or a line that is no prompt.
    """
    text = read_text(file, "the file of prompts", most=_MOST_BYTES)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"there is no prompt in {file}")
    as_json = file.suffix in (".jsonl", ".json") or all(line.startswith("{") for line in lines)
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not as_json:
            prompts.append(line)
            continue
        try:
            found = msgspec.json.decode(line, type=_Line | str)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ConfigError(f"{file} line {number} is no prompt: {error}") from None
        prompts.append(found.prompt if isinstance(found, _Line) else found)
    return [prompts[number % len(prompts)] for number in range(count)]


def random_prompts(pool: Sequence[int], length: int, count: int, seed: int) -> list[Prompt]:
    """Prompts of `length` token ids drawn from the pool."""
    source = random.Random(seed)
    return [source.choices(pool, k=length) for _ in range(count)]


async def token_pool(target: Target) -> list[int]:
    """Ordinary token ids of the served model.

    Raises:
        LoadError: its tokenizer makes nearly nothing of English, so that all prompts would be one.
    """
    pool = sorted(set(await tokenize(target, POOL_TEXT)))
    if len(pool) < _FEWEST:
        raise LoadError(
            f"the model's tokenizer knows {len(pool)} tokens of a text of English, of which "
            "random prompts would all be much alike; give prompts with --prompts"
        )
    return pool


async def tokenize(target: Target, text: str) -> list[int]:
    """Token ids of a text, as the service sees it.

    Raises:
        LoadError
    """
    status, answer = await call(target, "POST", "/tokenize", {"prompt": text})
    if status != 200 or not isinstance(answer, dict):
        message = error_message(msgspec.json.encode(answer))
        raise LoadError(f"/tokenize answered {status}: {message}")
    tokens: list[int] = answer["tokens"]
    return tokens
