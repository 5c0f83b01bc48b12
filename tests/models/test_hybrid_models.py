"""Layers that keep a state of each sequence: transformers' logits, however the work is cut.

That every such family gives transformers' own tokens, on one rank and on three, is shown by
test_every_family.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import Sequences, prompt_of, reference_logits, single_runner
from torch import Tensor

from flexpert.config import EngineConfig
from flexpert.engine.device_memory_plan import device_memory_plan
from flexpert.engine.memory_plan import state_slots
from flexpert.errors import FlexpertError, UnsupportedModel
from flexpert.models import probe
from flexpert.models.batch import ForwardBatch, rows_and_starts
from flexpert.models.source import ModelSource
from flexpert.models.state_runs import NO_STATE, StateRuns

Checkpoints = Callable[..., Path]

HYBRIDS = (
    "qwen3_next",  # gated delta rule
    "jamba",  # Mamba; the plain code of transformers begins several rows anew
    "granitemoehybrid",  # Mamba-2
    "lfm2_moe",  # short convolutions, and no other state
    "minimax",  # lightning attention, with a cache of its own kind
    "zaya",  # state and attention in one layer
    "kimi_linear",  # Kimi's delta rule beside MLA
    "bailing_hybrid",
    "lara_mini",
    "nemotron_h",
    "qwen3_5_moe_text",
)
USUAL = [f if f in HYBRIDS[:4] else pytest.param(f, marks=pytest.mark.slow) for f in HYBRIDS]


def test_an_older_transformers_is_named(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There layers get their caches by names of their own."""
    path = checkpoint("qwen3_next")
    monkeypatch.setattr(probe, "cached_modules", lambda *_: {})
    monkeypatch.setattr(probe, "_version", lambda: (5, 17))
    with pytest.raises(UnsupportedModel, match=r"pip install 'transformers>=5\.24'"):
        ModelSource.open(str(path))


def in_chunks(sequences: Sequences, tokens: list[int], size: int) -> Tensor:
    """[tokens, vocab] logits of a sequence computed `size` tokens a step."""
    pieces = [
        sequences.step({"alone": tokens[i : i + size]})["alone"]
        for i in range(0, len(tokens), size)
    ]
    sequences.drop("alone")
    return torch.cat(pieces)


@pytest.mark.parametrize("family", USUAL)
def test_chunks_and_decodes_give_the_logits_of_transformers(
    family: str, checkpoint: Checkpoints
) -> None:
    path = checkpoint(family)
    tokens = prompt_of(41, seed=1)
    expected = reference_logits(path, tokens)
    sequences = single_runner(path)
    for size in (41, 1, 2, 17):
        logits = in_chunks(sequences, tokens, size)
        torch.testing.assert_close(logits, expected, atol=5e-4, rtol=5e-4, msg=f"chunks of {size}")


@pytest.mark.parametrize("family", USUAL)
def test_proposed_tokens_of_several_sequences_give_the_logits_of_one_after_the_other(
    family: str, checkpoint: Checkpoints
) -> None:
    sequences = single_runner(checkpoint(family))
    prompts = {name: prompt_of(count, seed=count) for name, count in (("a", 9), ("b", 5), ("c", 7))}
    further = {"a": [3, 1, 4], "b": [1], "c": [5, 9]}
    sequences.step(prompts)
    expected = {
        name: torch.cat([sequences.step({name: [token]})[name] for token in (*tokens, 2)])
        for name, tokens in further.items()
    }
    for name in prompts:
        sequences.drop(name)
    sequences.step(prompts)
    found = sequences.step(further, each=True)
    then = sequences.step({name: [2] for name in prompts})
    for name, logits in expected.items():
        ours = torch.cat([found[name], then[name]])
        torch.testing.assert_close(ours, logits, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("family", USUAL)
def test_in_deterministic_mode_a_tokens_bits_do_not_depend_on_chunks_or_batch(
    family: str, checkpoint: Checkpoints
) -> None:
    path = checkpoint(family, torch.bfloat16)
    sequences = single_runner(path, deterministic=True, blocks=400)
    tokens = prompt_of(35, seed=3)
    whole = in_chunks(sequences, tokens, len(tokens))
    for size in (1, 16):
        assert torch.equal(in_chunks(sequences, tokens, size), whole), f"chunks of {size}"
    for others in (1, 13):
        context = {i: prompt_of(1 + 5 * i % 23, seed=i) for i in range(others)}
        sequences.step({**context, "same": tokens[:-1]})
        logits = sequences.step({**{i: [7 + i] for i in context}, "same": tokens[-1:]})
        assert torch.equal(logits["same"][-1], whole[-1]), f"{others} others"
        for name in (*context, "same"):
            sequences.drop(name)


def test_a_state_in_the_middle_of_a_chunk_is_that_of_a_chunk_that_ends_there(
    checkpoint: Checkpoints,
) -> None:
    sequences = single_runner(checkpoint("qwen3_next"))
    kv, tokens = sequences.runner.kv, prompt_of(20, seed=5)
    sequences.runner.forward(_alone(tokens, StateRuns([0, 12, 20], [NO_STATE, 3], [3, 4], 0)))
    sequences.runner.forward(_alone(tokens[:12], StateRuns([0, 12], [NO_STATE], [5], 0)))
    for layer in kv.states:
        for state in layer.values():
            torch.testing.assert_close(state[3], state[5])
            assert not torch.allclose(state[3], state[4])


def test_a_broken_step_that_runs_again_changes_nothing_it_reads(checkpoint: Checkpoints) -> None:
    """It may have been computed in full, or as far as some layer: slots that are read stay."""
    sequences = single_runner(checkpoint("qwen3_next"))
    kv, tokens = sequences.runner.kv, prompt_of(20, seed=5)
    sequences.runner.forward(_alone(tokens[:19], StateRuns([0, 19], [NO_STATE], [0], 0)))
    before = [state[0].clone() for layer in kv.states for state in layer.values()]
    step = _alone(tokens[19:], StateRuns([0, 1], [0], [1], 1), first=19)
    logits = sequences.runner.forward(step)
    for layer in kv.states:
        for state in layer.values():
            state[1].fill_(float("nan"))  # whatever it left there
    assert torch.equal(sequences.runner.forward(step), logits)
    for kept, state in zip(before, (s for layer in kv.states for s in layer.values()), strict=True):
        assert torch.equal(state[0], kept)


@pytest.mark.parametrize(("family", "continues"), [("qwen3_next", True), ("jamba", False)])
def test_layers_whose_plain_code_begins_anew_are_computed_row_by_row(
    family: str, continues: bool, checkpoint: Checkpoints
) -> None:
    layers = single_runner(checkpoint(family)).runner._states
    assert {layer.continues for layer in layers} == {continues}


def test_runs_of_one_sequence_are_one_sequence_for_kernels() -> None:
    """Two that decode, and a prompt that keeps a state on the way."""
    rows, starts = rows_and_starts(StateRuns([0, 1, 2, 6, 8], [3, 4, NO_STATE, 7], [5, 6, 7, 8], 2))
    assert rows.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2],
        [3, 4, -1, -1, -1, -1, -1, -1],
        [5, 6, -1, -1, -1, 7, -1, 8],
    ]
    assert starts.tolist() == [0, 1, 2, 8]
    # two rows of one that decodes, beside another one
    rows, starts = rows_and_starts(StateRuns([0, 1, 2, 3], [3, 5, 4], [5, 6, 7], 3))
    assert rows.tolist() == [[0, 0, 2], [3, 3, 4], [5, 6, 7]]
    assert starts.tolist() == [0, 2, 3]


def test_on_a_gpu_states_are_planned_for_and_deterministic_is_refused(
    checkpoint: Checkpoints,
) -> None:
    source = ModelSource.open(str(checkpoint("qwen3_next")))
    config = EngineConfig(device="cuda", kv_memory=2**20, max_running=10)
    more = config.model_copy(update={"max_running": 20})
    few, many = (device_memory_plan(source, each, 1).kv for each in (config, more))
    assert abs(many - few - 10 * 4 * source.info.state_nbytes) < 4096
    with pytest.raises(FlexpertError, match="--device cpu"):
        state_slots(source.info, config.model_copy(update={"deterministic": True}))


def _alone(tokens: list[int], runs: StateRuns, first: int = 0) -> ForwardBatch:
    """One sequence in the first blocks of the KV cache."""
    positions = torch.arange(first, first + len(tokens))
    return ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=positions,
        query_start=torch.tensor([0, len(tokens)], dtype=torch.int32),
        context_len=torch.tensor([first + len(tokens)], dtype=torch.int32),
        block_tables=torch.arange(8, dtype=torch.int32).unsqueeze(0),
        slot_mapping=positions.clone(),
        sample_rows=torch.tensor([len(tokens) - 1]),
        states=runs,
    )
