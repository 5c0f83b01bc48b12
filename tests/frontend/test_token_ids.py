"""Promises of a service without a tokenizer: token ids come and go, texts are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.fake_head import FakeHead

from flexpert import LLM, SamplingParams
from flexpert.errors import RequestError
from flexpert.frontend.request_limits import RequestLimits
from flexpert.frontend.token_ids import TokenIdsOnly
from flexpert.server.preprocessing import (
    Generate,
    Kind,
    PreprocessTask,
    RefusedBody,
    Rendered,
    preprocess,
)

LIMITS = RequestLimits("fake", 300, 128, 1024, 2**20, skip_tokenizer=True)
TALK = [{"role": "user", "content": "hi"}]


class Textless(FakeHead):
    async def start(self, report: object = None) -> None:
        self.tokenizer = None
        self.behaviour.answer = [5, 6, 7]


def outcome(kind: Kind, body: dict[str, Any]) -> Generate | Rendered | RefusedBody:
    return preprocess(PreprocessTask(kind, (json.dumps(body).encode(),)), TokenIdsOnly(), LIMITS)


def test_token_ids_in_and_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexpert.cluster.head.Head", Textless)
    with LLM() as llm:
        params = SamplingParams(max_tokens=3, logprobs=1, stop_token_ids=[6])
        (completion,) = llm.generate([[1, 2]], params)
        assert completion.prompt_token_ids == [1, 2]
        assert (completion.text, completion.token_ids) == ("", [5, 6])
        assert completion.outputs[0].finish_reason == "stop"
        assert len(completion.outputs[0].logprobs or []) == 1
        for refused in (
            lambda: llm.generate("a"),
            lambda: llm.chat(TALK),
            lambda: llm.generate([[1]], SamplingParams(stop="x")),
            lambda: llm.generate([[1]], SamplingParams(bad_words=["x"])),
        ):
            with pytest.raises(RequestError, match=r"no tokenizer \(--skip-tokenizer-init\)"):
                refused()


def test_token_ids_are_taken_over_http() -> None:
    found = outcome("completions", {"prompt": [1, 2], "return_token_ids": True})
    assert isinstance(found, Generate)
    assert found.prompt_ids == [[1, 2]]


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        ("completions", {"prompt": "a"}, "prompt"),
        ("completions", {"prompt": [1], "bad_words": ["a"]}, "bad_words"),
        ("completions", {"prompt": [1], "stop": "a"}, "stop"),
        ("completions", {"prompt": [1], "echo": True}, None),
        ("chat", {"messages": TALK}, "messages"),
        ("tokenize", {"prompt": "a"}, "prompt"),
        ("tokenize", {"messages": TALK}, "messages"),
        ("detokenize", {"tokens": [1]}, None),
    ],
)
def test_texts_are_refused_over_http(kind: Kind, body: dict[str, Any], param: str | None) -> None:
    found = outcome(kind, body)
    assert isinstance(found, RefusedBody)
    assert (found.status, found.param) == (400, param)
    assert "no tokenizer (--skip-tokenizer-init)" in found.message


@pytest.mark.slow
def test_a_model_is_served_whose_tokenizer_is_not_read() -> None:
    with LLM("tiny", model__skip_tokenizer_init=True, deterministic=True) as llm:
        params = SamplingParams(max_tokens=8, temperature=0)
        (without,) = llm.generate([[5, 6, 7]], params)
    with LLM("tiny", deterministic=True) as llm:
        (one,) = llm.generate([[5, 6, 7]], params)
    assert (without.token_ids, without.text) == (one.token_ids, "")
    assert one.text
