"""Layers that attend within chunks, and attention whose temperature follows from positions
(Llama-4): transformers' logits, over several chunks, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint, prompt_of, reference_logits, single_runner

from flexpert.errors import UnsupportedModel
from flexpert.kernels.kernel_set import Kernels, cpu_kernels, gpu_kernels
from flexpert.models import probe
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape

CPU = torch.device("cpu")
CHUNK = 7  # of the small model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama4")
    return make_checkpoint("llama4_text", folder, attention_chunk_size=CHUNK, floor_scale=3)


@pytest.mark.parametrize(
    "kernels",
    [cpu_kernels, pytest.param(lambda: gpu_kernels(CPU), marks=pytest.mark.slow)],
    ids=["CPU", "GPU, interpreted"],
)
def test_steps_of_several_sequences_give_the_logits_of_transformers(
    model: Path, kernels: Callable[[], Kernels]
) -> None:
    sequences = single_runner(model, kernels=kernels())
    assert [layer.chunk for layer in sequences.runner._attention] == [CHUNK, 0, CHUNK, 0]
    prompts = {"a": prompt_of(23, seed=1), "b": prompt_of(15, seed=2)}
    expected = {name: reference_logits(model, prompt) for name, prompt in prompts.items()}
    at = dict.fromkeys(prompts, 0)

    def step(**counts: int) -> None:
        work = {name: prompts[name][at[name] : at[name] + n] for name, n in counts.items()}
        for name, logits in sequences.step(work).items():
            rows = slice(at[name], at[name] + counts[name])
            torch.testing.assert_close(logits, expected[name][rows], atol=5e-4, rtol=5e-4)
            at[name] = rows.stop

    step(a=17, b=4)
    step(b=9, a=3)
    if sequences.runner.recorded is None:
        sequences.runner.capture([GraphShape(4, 4)], max_blocks=3)
    step(a=1, b=1)  # into the next chunk: a has 20 tokens, and b 13
    step(a=1, b=1)


def test_what_is_not_told_positions_ends_with_the_first_chunk(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ModelSource.open(str(model)).info.max_model_len == 256
    monkeypatch.setattr(probe, "asks_for_length", lambda _: False)
    assert ModelSource.open(str(model)).info.max_model_len == CHUNK


def test_latents_in_chunks_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "kept_latent", lambda _: object())
    with pytest.raises(UnsupportedModel, match="latents in chunks"):
        ModelSource.open(str(model), latent_cache=True)
