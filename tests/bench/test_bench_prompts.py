"""Prompts from files and from chance."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flexpert.bench import prompts
from flexpert.bench.load import LoadError, Target
from flexpert.bench.prompts import random_prompts, read_prompts, token_pool
from flexpert.errors import ConfigError


def test_lines_of_text_are_repeated_as_often_as_needed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    assert read_prompts(file, 3) == ["one", "two", "one"]


def test_json_lines_hold_texts_or_token_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one", "other": 1}\n{"prompt": [1, 2]}\n"three"\n')
    assert read_prompts(file, 3) == ["one", [1, 2], "three"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "no prompt in"), ('{"prompt": 3}', "line 1"), ('{"text": "x"}', "line 1")],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_prompts(file, 1)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_prompts(tmp_path / "none", 1)


def test_random_prompts_repeat_with_their_seed() -> None:
    prompts = random_prompts([5, 6, 7], length=4, count=2, seed=1)
    assert prompts == random_prompts([5, 6, 7], length=4, count=2, seed=1)
    assert prompts != random_prompts([5, 6, 7], length=4, count=2, seed=2)
    assert all(len(p) == 4 and set(p) <= {5, 6, 7} for p in prompts)


def test_a_tokenizer_that_knows_no_english_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tokenized(target: Target, text: str) -> list[int]:
        return [0] * 90 + [*range(count)]

    monkeypatch.setattr(prompts, "tokenize", tokenized)
    target = Target("127.0.0.1", 1)
    count = 60
    assert asyncio.run(token_pool(target)) == [*range(60)]
    count = 3
    with pytest.raises(LoadError, match=r"knows 3 tokens.*--prompts"):
        asyncio.run(token_pool(target))
