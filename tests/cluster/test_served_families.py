"""Every family gives transformers' own greedy tokens, on one rank and on three."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import MAIN_FAMILIES, greedy, make_checkpoint, reference_logits
from support.service import Service, change, running

import flexpert.models
from flexpert.cluster.head import Head
from flexpert.engine.request import SamplingParams

pytestmark = pytest.mark.slow

TOKENS = 12


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, 160) for _ in range(length)] for length in (1, 7, 23, 40)]


async def answer_with_logprobs(head: Head, prompt: list[int]) -> tuple[list[int], list[float]]:
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    tokens: list[int] = []
    logprobs: list[float] = []
    async with head.submit(prompt, params) as stream:
        async for delta in stream:
            tokens += delta.tokens
            logprobs += [entry.chosen for entry in delta.logprobs or []]
    return tokens, logprobs


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "qwen3_next"])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path / family)
    for file in (Path(flexpert.models.__path__[0]) / "tiny").glob("*token*"):
        shutil.copy(file, model)

    async def scenario(head: Head) -> None:
        for ranks in (1, 3):
            assert (await change(head, ranks=ranks)).state == "done"
            for prompt in prompts():
                tokens, logprobs = await answer_with_logprobs(head, prompt)
                assert tokens == greedy(model, prompt, TOKENS), (family, ranks)
                logits = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
                expected = torch.log_softmax(logits, -1)[range(TOKENS), tokens]
                torch.testing.assert_close(torch.tensor(logprobs), expected, atol=2e-4, rtol=1e-4)

    def run(service: Service) -> None:
        service.run(scenario(service.head))

    with running(model__model=str(model), cluster__ranks=1, engine__kv_memory="4MiB") as service:
        run(service)
