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
from torch import Tensor, nn

from flexpert.comm.cuda.driver_state import driver_is_open
from flexpert.models.meta_walk import walk
from flexpert.models.source import ModelSource

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


@pytest.mark.parametrize("family", FAMILIES)
def test_to_open_a_model_opens_no_gpu(
    family: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fork server does so, and a child of a process that has opened a GPU can use none."""

    def opened(*_: object) -> None:
        raise AssertionError("this opens CUDA's driver")

    class Asks(nn.Module):
        """As transformers 5.17 does to find out whether it is traced."""

        def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> None:
            assert torch.cuda.is_current_stream_capturing() is False

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", opened)
    monkeypatch.setattr(torch.cuda, "_lazy_init", opened)
    asks: Any = Asks()
    walk(asks)
    source = ModelSource.open(checkpoint(family))
    source.try_extents()
    assert not driver_is_open()


def test_an_idle_step_walks_every_moe_layer_in_order(checkpoint: Checkpoints) -> None:
    sequences = single_runner(checkpoint("deepseek_v3"))
    moe: Any = sequences.runner._experts[0].runtime
    sequences.runner.forward_idle()
    assert moe.calls == [0, 1]
    moe.calls.clear()
    sequences.step({"a": [5, 6]})
    assert moe.calls == [0, 1]
