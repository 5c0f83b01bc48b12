"""Latents in the cache of a GPU: the logits are transformers', whatever a step is cut into.

Kernels in Triton's interpreter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import MLA, Sequences, make_checkpoint, prompt_of, reference_logits

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models import device_latents
from flexpert.models.device_latents import DeviceLatentAttention, cut_pieces, fewest_expanded
from flexpert.models.latent_attention import LatentShape
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.models.step_graphs import GraphShape
from flexpert.moe.cuda.device_expert_store import SlotAddresses
from flexpert.moe.cuda.local_experts import LocalExperts
from flexpert.moe.moe_layers import LayerState
from flexpert.moe.placement import replan
from flexpert.moe.runtime import expert_tables

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2}
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


def runner(path: Path) -> Sequences:
    source = ModelSource.open(str(path), latent_cache=True)
    info, cpu = source.info, torch.device("cpu")
    local = LocalExperts(0, info.moe_layers, info.experts, source.expert_shape(), cpu)
    made = ModelRunner.load(
        source,
        moe=local,
        kv_blocks=64,
        kv_block_size=8,
        deterministic=False,
        kernels=gpu_kernels(torch.device("cpu")),
    )
    placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
    held = [
        SlotAddresses.of([source.load_experts(layer, [expert])[expert] for expert in experts])
        for layer, experts in enumerate(placement.held_by(0))
    ]
    tables = expert_tables(placement, 0)
    local.install(local.stage([LayerState(*each) for each in zip(tables, held, strict=True)]))
    return Sequences(made, 8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("small"), **SMALL)


@pytest.mark.slow
def test_prompts_long_and_short_and_decodes_share_a_step(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded from 72 tokens on, here of three heads at a time."""
    each = 128 * (MLA["qk_nope_head_dim"] + MLA["qk_rope_head_dim"] + MLA["v_head_dim"])
    monkeypatch.setattr(device_latents, "WORKSPACE_NUMBERS", 3 * each)
    sequences = runner(path)
    assert {type(layer) for layer in sequences.runner._attention} == {DeviceLatentAttention}
    kept = MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"]
    assert {shape.pieces for shape in sequences.runner.info.attention} == {((1, kept),)}
    tokens = {name: prompt_of(125, seed) for seed, name in enumerate("abc")}
    ends = dict.fromkeys("abc", 0)
    for work in ({"a": 80, "b": 5}, {"b": 1, "a": 75 - 35, "c": 1}, {"c": 7, "b": 1, "a": 1}):
        step = {name: tokens[name][ends[name] : ends[name] + n] for name, n in work.items()}
        for name, logits in sequences.step(step).items():
            ends[name] += work[name]
            expected = reference_logits(path, tokens[name][: ends[name]])[-work[name] :]
            torch.testing.assert_close(logits, expected, **CLOSE)


@pytest.mark.slow
def test_captured_steps_give_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = runner(path)
    shapes = [GraphShape(n, n) for n in (1, 4)]
    sequences.runner.capture([*shapes, GraphShape(64, 4)], max_blocks=4)
    graphs = sequences.runner.graphs
    assert graphs is not None
    assert graphs.captures == 2  # prompts are cut by the host
    tokens = {name: prompt_of(12, seed) for seed, name in enumerate("abc")}
    sequences.step({name: prompt[:9] for name, prompt in tokens.items()})
    monkeypatch.setattr(sequences.runner, "_walk", None)
    for at, names in ((9, "abc"), (10, "b")):  # with padding, and without
        found = sequences.step({name: tokens[name][at : at + 1] for name in names})
        for name in names:
            expected = reference_logits(path, tokens[name][: at + 1])[-1:]
            torch.testing.assert_close(found[name], expected, **CLOSE)


def test_a_step_is_cut_where_expanding_pays() -> None:
    assert fewest_expanded(LatentShape(128, 128, 64, 512, 128)) == pytest.approx(512 / 3)
    # what is longer than all its latents is not worth it for any number
    assert fewest_expanded(LatentShape(4, 64, 8, 32, 64)) == float("inf")

    def cut(counts: list[int], most: int) -> list[tuple[tuple[int, int], tuple[int, int], int]]:
        starts = [sum(counts[:s]) for s in range(len(counts) + 1)]
        pieces = cut_pieces(starts, [100 + s for s in range(len(counts))], 10, most)
        return [
            ((p.rows.start, p.rows.stop), (p.sequences.start, p.sequences.stop), p.context)
            for p in pieces
        ]

    assert cut([1, 1, 1], 2) == [((0, 2), (0, 2), 0), ((2, 3), (2, 3), 0)]
    assert cut([1, 10, 11, 1, 9, 2], 8) == [
        ((0, 1), (0, 1), 0),
        ((1, 11), (1, 2), 101),
        ((11, 22), (2, 3), 102),
        ((22, 23), (3, 4), 0),
        ((23, 31), (4, 6), 0),
        ((31, 34), (4, 6), 0),
    ]
    assert cut([2] * 65, 200) == [((0, 128), (0, 64), 0), ((128, 130), (64, 65), 0)]
    assert cut([], 8) == []
