"""Answers end where any of the checkpoint's files says that they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoTokenizer

from flexpert import LLM, SamplingParams
from flexpert.cluster.end_tokens import turn_end, with_end_tokens
from flexpert.models.source import ModelSource

TURN = "{% for m in messages %}<|user|>{{ m.content }}"


@pytest.fixture(scope="module")
def tiny() -> ModelSource:
    return ModelSource.open("tiny")


@pytest.fixture
def tokenizer(tiny: ModelSource) -> Iterator[Any]:
    return AutoTokenizer.from_pretrained(tiny.path)


def test_the_tokenizers_end_is_one_of_the_vocabulary(tiny: ModelSource) -> None:
    info = replace(tiny.info, eos_token_ids=(5,), vocab=100)
    for own, ends in ((7, (5, 7)), (5, (5,)), (None, (5,)), (100, (5,))):
        tokenizer = cast(Any, SimpleNamespace(eos_token_id=own))
        assert with_end_tokens(info, tokenizer).eos_token_ids == ends
    assert with_end_tokens(info, None) == info


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TURN + "<|end|>\n{% endfor %}", "<|end|>"),
        (TURN + "\n  <|end|>{% endfor %}", "<|end|>"),
        # another one behind the last turn than between turns, as GPT-OSS has it
        (TURN + "{{ '<|endoftext|>' if loop.last else '<|end|>' }}{% endfor %}", "<|endoftext|>"),
        # nothing behind the last turn, as GLM-4 has it: the next one's beginning is no end
        (TURN + "{% endfor %}", None),
        (TURN + " and so on{% endfor %}", None),  # words, and no token of its own
        ("{{ raise_exception('no') }}", None),
        ("{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", None),
        ("{{ messages[0].content }}<|end|>", None),  # does not say what the assistant said
        (None, None),
    ],
)
def test_a_turns_end_is_the_special_token_behind_the_assistants_last_word(
    tokenizer: Any, template: str | None, end: str | None
) -> None:
    tokenizer.chat_template = template
    expected = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert turn_end(tokenizer) == expected


PLACES = ("config", "generation_config", "tokenizer", "template")


@pytest.mark.parametrize("place", PLACES)
def test_an_end_that_is_in_one_place_only_is_found(
    tiny: ModelSource, tmp_path: Path, place: str
) -> None:
    path = copy_without_ends(tiny, tmp_path)
    config, settings = path / "config.json", path / "tokenizer_config.json"
    if place == "config":
        change(config, eos_token_id=4)
    elif place == "generation_config":
        (path / "generation_config.json").write_text('{"eos_token_id": [4]}')
    elif place == "tokenizer":
        change(settings, eos_token="<|end|>")
    else:
        shutil.copy(tiny.path / "chat_template.jinja", path)
    source = ModelSource.open(str(path))
    assert 4 in with_end_tokens(source.info, source.tokenizer()).eos_token_ids


@pytest.mark.slow  # starts a service
def test_answers_stop_at_the_end_of_the_turn_that_only_the_template_names(
    tiny: ModelSource, tmp_path: Path
) -> None:
    path = copy_without_ends(tiny, tmp_path)
    shutil.copy(tiny.path / "chat_template.jinja", path)
    asked = [{"role": "user", "content": "How does Psalm 23 begin?"}]
    params = SamplingParams(temperature=0, max_tokens=200)
    answers = []
    for model in ("tiny", str(path)):
        with LLM(model, ranks=1) as llm:
            answers.append(llm.chat(asked, params)[0].outputs[0])
    whole, found = answers
    assert whole.finish_reason == found.finish_reason == "stop"
    assert found.text == whole.text


def copy_without_ends(tiny: ModelSource, folder: Path) -> Path:
    """The embedded model, of whose files none names <|end|>."""
    path = folder / "model"
    shutil.copytree(tiny.path, path)
    (path / "generation_config.json").unlink()
    (path / "chat_template.jinja").unlink()
    change(path / "config.json", eos_token_id=None)
    return path


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
