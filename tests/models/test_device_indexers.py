"""Attention to picked keys with the kernels of a GPU is transformers' own, in Triton's interpreter.

Of 12 keys here, with blocks of 16 tokens.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint, prompt_of, reference_logits, single_runner
from support.small_configs import small_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.errors import UnsupportedModel
from flexpert.kernels.kernel_set import IndexKernels, gpu_kernels
from flexpert.models import device_indexers
from flexpert.models.architecture import model_classes
from flexpert.models.batch import ForwardBatch
from flexpert.models.device_indexers import DeviceIndexedAttention, DeviceIndexer
from flexpert.models.step_graphs import GraphShape

CPU = torch.device("cpu")
PICKED, BLOCK = 12, 16
FAMILIES = ("deepseek_v32", "glm_moe_dsa", "axk2", "dots3_note_text", "hy_v4", "mistral_large4")
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "n_routed_experts": 4, "n_group": 2}


def kernels() -> IndexKernels:
    found = gpu_kernels(CPU).indexers
    assert found is not None
    return found


def indexer_of(family: str) -> Any:
    """Of the first layer that has one, with random weights."""
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    torch.manual_seed(0)
    chosen, settings = model_classes(small_config(family))[0]
    with torch.device("meta"):
        model = chosen._from_config(settings, dtype=torch.float32)
    module = next(m for m in model.modules() if type(m).__name__.endswith("Indexer"))
    module.to_empty(device="cpu")
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.3)
        elif hasattr(part, "weight"):
            nn.init.normal_(part.weight, mean=1.0, std=0.2)
        for name, own in part.named_parameters(recurse=False):
            if name == "bias":
                nn.init.normal_(own, std=0.2)
            elif name != "weight":
                nn.init.normal_(own, mean=1.0, std=0.2)
    return module.eval()


def names(module: Any) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


class Inputs:
    """What an indexer is given of the tokens of a sequence."""

    def __init__(self, module: Any, tokens: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(1, tokens, *shape, generator=generator)

        self.hidden = randn(module.wk.in_features)
        self.resid = randn(module.wq_b.in_features)
        self.turns = randn(module.qk_rope_head_dim), randn(module.qk_rope_head_dim)
        self.at = torch.arange(tokens).unsqueeze(0)


def asked(inputs: list[tuple[Inputs, int, int]], named: list[str]) -> dict[str, Any]:
    """Of rows of several sequences. named: what the module's forward takes."""

    def rows(field: Any) -> Tensor:
        return torch.cat([field(one)[:, begin:end] for one, begin, end in inputs], dim=1)

    given = {
        "hidden_states": rows(lambda one: one.hidden),
        "q_resid": rows(lambda one: one.resid),
        "position_embeddings": (
            rows(lambda one: one.turns[0]),
            rows(lambda one: one.turns[1]),
        ),
        "position_ids": rows(lambda one: one.at),
    }
    return {name: value for name, value in given.items() if name in named}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_of_a_step_pick_what_each_sequence_picks_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a step with two prompts, of which five rows are scored at a time, and one that decodes
    beside a chunk and padding."""
    monkeypatch.setattr(device_indexers, "SCORES", 5 * 3 * BLOCK)
    module = indexer_of(family)
    keys = torch.full((8, BLOCK, 1, module.head_dim), torch.nan)
    indexer = DeviceIndexer(module, 7, keys, kernels())
    given = [Inputs(module, 40, seed=1), Inputs(module, 9, seed=2)]
    tables = torch.tensor([[3, 6, 1], [5, 0, 2]], dtype=torch.int32)
    at = torch.arange(3 * BLOCK)
    slots = tables.long()[:, at // BLOCK] * BLOCK + at % BLOCK
    alone = []
    for one in given:
        mask = torch.ones(one.at.shape[1], one.at.shape[1], dtype=torch.bool).tril().unsqueeze(0)
        alone.append(module(**asked([(one, 0, 40)], names(module)), attention_mask=mask)[0])
    for ends in ([(0, 33), (0, 8)], [(33, 34), (8, 9)], [(34, 40), (9, 9)]):
        rows = [slice(begin, end) for begin, end in ends]
        starts = torch.tensor([0, *(end - begin for begin, end in ends)]).cumsum(0).int()
        none = torch.zeros(0, dtype=torch.int64)
        indexer.batch = ForwardBatch(
            none,
            none,
            starts,
            torch.tensor([end for _, end in ends], dtype=torch.int32),
            tables,
            torch.cat([own[some] for own, some in zip(slots, rows, strict=True)]),
            none,
        )
        step = [(one, *end) for one, end in zip(given, ends, strict=True)]
        answer = indexer.forward(**asked(step, names(module)), attention_mask=None)
        assert answer.tolist() == [[[7]] * int(starts[-1])]
        assert indexer.picked is not None
        for s, (begin, end) in enumerate(ends):
            for row in range(begin, end):
                found = int(starts[s]) + row - begin
                count = int(indexer.picked.context_len[found])
                assert count == min(row + 1, PICKED)
                numbers = alone[s][row][alone[s][row] <= row].long()
                expected = set(slots[s][numbers].tolist())
                assert set(indexer.picked.block_tables[found, :count].tolist()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [("deepseek_v32", {}), ("glm_moe_dsa", {"indexer_types": ["full", "shared"]})],
    ids=["deepseek_v32", "shared choices"],
)
def test_chunks_prefixes_and_captured_steps_give_the_logits_of_transformers(
    family: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(family, tmp_path, **{**SMALL, **changes})
    sequences = single_runner(
        path, latent_cache=True, block_size=BLOCK, kernels=gpu_kernels(CPU)
    )  # experts are computed as on a CPU
    assert {type(layer) for layer in sequences.runner._attention} == {DeviceIndexedAttention}
    a, b = prompt_of(22, 1), prompt_of(18, 2)
    prompts = {"a": a, "b": b, "c": [*a[:16], *prompt_of(4, 3)]}
    expected = {name: reference_logits(path, prompt) for name, prompt in prompts.items()}
    ends = {"a": 0, "b": 0, "c": 16}

    def step(**counts: int) -> None:
        work = {name: prompts[name][ends[name] : ends[name] + n] for name, n in counts.items()}
        for name, logits in sequences.step(work).items():
            rows = slice(ends[name], ends[name] + counts[name])
            torch.testing.assert_close(logits, expected[name][rows], **CLOSE)
            ends[name] = rows.stop

    step(a=17, b=4)
    sequences._tables["c"], sequences._lengths["c"] = sequences._tables["a"][:1], 16
    step(c=2, a=1, b=7)
    sequences.runner.capture([GraphShape(n, n) for n in (1, 4)] + [GraphShape(8, 4)], max_blocks=2)
    assert sequences.runner.graphs is not None
    assert sequences.runner.graphs.captures == 2  # prompts are cut by the host
    step(b=5, c=1)
    monkeypatch.setattr(sequences.runner, "_walk", None)
    step(a=1, b=1, c=1)  # with padding
    step(a=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: scores + 1.0,
        lambda scores: nn.functional.relu(nn.functional.relu(scores)),
        lambda scores: scores * -1.0,
        lambda scores: torch.softmax(scores, -1),
    ],
    ids=["adds", "cuts twice", "turns around", "softmax"],
)
def test_an_indexer_that_does_something_else_with_keys_is_refused(change: Any) -> None:
    def forward(hidden_states: Tensor, attention_mask: Any, cache: Any) -> Tensor:
        keys = cache.update_indexer(hidden_states, 0)
        query = hidden_states.unsqueeze(2)
        scores = torch.matmul(query, keys.transpose(-1, -2).float().unsqueeze(1))
        scores = change(scores) if turned else scores
        scores = nn.functional.relu(scores)
        ones = torch.ones(1, hidden_states.shape[1], 1, 1)
        scores = torch.matmul(ones, scores).squeeze(-2)
        best: Tensor = scores.masked_fill(~attention_mask, float("-inf")).topk(2, dim=-1).indices
        return best

    module = nn.Module()
    module.forward = forward
    indexer = DeviceIndexer(module, 0, torch.zeros(1, 4, 1, 8), kernels())
    none = torch.zeros(0, dtype=torch.int64)
    lengths, slots = torch.tensor([3], dtype=torch.int32), torch.arange(3)
    starts, tables = torch.tensor([0, 3], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    indexer.batch = ForwardBatch(none, none, starts, lengths, tables, slots, none)
    turned = False
    assert indexer.forward(torch.randn(1, 3, 8), None).shape == (1, 3, 1)
    turned = True
    with pytest.raises(UnsupportedModel, match="serve it with --device cpu"):
        indexer.forward(torch.randn(1, 3, 8), None)
