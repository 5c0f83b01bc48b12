"""A model that proposes tokens answers on a GPU as without: the same bits, through everything."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support.agreeing import agreeing_model

from flexpert import LLM, SamplingParams
from flexpert.models.source import ModelSource

STARTS = ["In the beginning", "And it came to pass", "Blessed are", "The LORD said unto Moses"]
PROMPTS = [f"{start} {number}" for start in STARTS for number in range(8)]
WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.0, "min_tokens": 20},
    {"temperature": 0.6, "seed": 5, "repetition_penalty": 1.1},
    {"temperature": 0.0, "allowed_token_ids": (30, 31, 32)},
]
PARAMS = [SamplingParams(max_tokens=96, **WAYS[at % len(WAYS)]) for at in range(len(PROMPTS))]
SETTINGS: dict[str, Any] = {
    "model__dtype": "bfloat16",
    "engine__device": "cuda",
    "engine__deterministic": True,
    "engine__max_running": 64,
    "engine__max_tokens_per_step": 512,
    "engine__kv_memory": 2**28,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = ModelSource.open("tiny").tokenizer()
    path = agreeing_model(tmp_path_factory.mktemp("mtp"), width=256, vocab=len(tokenizer))
    tokenizer.save_pretrained(path)
    return path


def answers(llm: LLM) -> list[list[int]]:
    return [answer.token_ids for answer in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with LLM(str(model), **SETTINGS) as llm:
        return answers(llm)


@pytest.mark.parametrize(
    "how",
    [
        {"method": "mtp", "num_speculative_tokens": 1, "max_rows": 128},
        {"method": "mtp", "num_speculative_tokens": 4, "max_rows": 128},
        {"method": "ngram", "prompt_lookup_min": 1, "max_rows": 128},
    ],
)
def test_one_rank(model: Path, expected: list[list[int]], how: dict[str, Any]) -> None:
    with LLM(str(model), engine__speculate=how, **SETTINGS) as llm:
        assert answers(llm) == expected
        assert answers(llm) == expected  # whose prompts are found in the cache
        assert accepted(llm) > 5  # and no more, where it does not pay


def test_where_blocks_are_short(model: Path, expected: list[list[int]]) -> None:
    how = {"method": "mtp", "num_speculative_tokens": 3, "max_rows": 128}
    settings = {**SETTINGS, "engine__kv_memory": 2**22}
    with LLM(str(model), engine__speculate=how, **settings) as llm:
        assert answers(llm) == expected


@pytest.mark.usefixtures("shared_gpu")
def test_ranks_join_and_leave_under_load(model: Path, expected: list[list[int]]) -> None:
    how = {"method": "mtp", "num_speculative_tokens": 3, "max_rows": 128}
    with LLM(str(model), engine__speculate=how, ranks=2, max_ranks=4, **SETTINGS) as llm:
        found: list[list[list[int]]] = []
        traffic = threading.Thread(target=lambda: found.extend(answers(llm) for _ in range(4)))
        traffic.start()
        llm.scale(3)
        llm.scale(1)
        llm.scale(2)
        traffic.join()
        assert found == [expected] * 4


def test_a_killed_rank_costs_no_answer(model: Path, expected: list[list[int]]) -> None:
    """On one GPU without MPS, under which a killed rank takes the others down."""
    how = {"method": "mtp", "num_speculative_tokens": 2, "max_rows": 128}
    with LLM(str(model), engine__speculate=how, ranks=2, max_ranks=2, **SETTINGS) as llm:
        found: list[list[list[int]]] = []
        traffic = threading.Thread(target=lambda: found.extend(answers(llm) for _ in range(2)))
        traffic.start()
        while traffic.is_alive() and not any(rank.running for rank in llm.cluster().ranks):
            traffic.join(0.05)
        os.kill(llm.cluster().ranks[1].pid, signal.SIGKILL)
        traffic.join()
        assert found == [expected] * 2


def accepted(llm: LLM) -> float:
    read = llm._head.registry.get_sample_value
    return read("flexpert_accepted_draft_tokens_total") or 0.0
