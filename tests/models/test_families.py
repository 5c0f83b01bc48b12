"""Every family gives transformers' own logits and greedy tokens, however its work is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import (
    FAMILIES,
    greedy,
    prompt_of,
    reference_logits,
    single_runner,
)

Checkpoints = Callable[..., Path]
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prefill_gives_the_logits_of_transformers(family: str, checkpoint: Checkpoints) -> None:
    path = checkpoint(family)
    tokens = prompt_of(50, seed=1)
    logits = single_runner(path).step({"a": tokens})["a"]
    torch.testing.assert_close(logits, reference_logits(path, tokens), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_decodes_of_packed_sequences_give_its_greedy_tokens(
    family: str, checkpoint: Checkpoints
) -> None:
    path = checkpoint(family)
    prompts = {name: prompt_of(n, seed=n) for name, n in {"a": 33, "b": 7, "c": 21}.items()}
    sequences = single_runner(path)
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    done = dict.fromkeys(prompts, 0)
    for step in range(16):
        work: dict[Any, Sequence[int]] = {}
        for name, prompt in prompts.items():
            if done[name] < len(prompt):
                chunk = prompt[done[name] : done[name] + 3 + 4 * (step % 3)]
                done[name] += len(chunk)
                work[name] = chunk
            else:
                work[name] = answers[name][-1:]
        for name, logits in sequences.step(work).items():
            if done[name] == len(prompts[name]):
                answers[name].append(int(logits[-1].argmax()))
    for name, prompt in prompts.items():
        assert len(answers[name]) > 5
        assert answers[name] == greedy(path, prompt, len(answers[name]))


def test_an_idle_step_walks_every_moe_layer_in_order(checkpoint: Checkpoints) -> None:
    sequences = single_runner(checkpoint("deepseek_v3"))
    moe: Any = sequences.runner._experts[0].runtime
    sequences.runner.forward_idle()
    assert moe.calls == [0, 1]
    moe.calls.clear()
    sequences.step({"a": [5, 6]})
    assert moe.calls == [0, 1]
