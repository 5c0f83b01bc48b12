"""Attention to the keys that an indexer picks, on a GPU: at DeepSeek-V3.2's sizes against plain
torch, captured, then a service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import greedy, make_checkpoint, prompt_of
from torch import Tensor
from transformers import CONFIG_MAPPING

from flexpert import LLM, SamplingParams
from flexpert.kernels.cuda.absorbed_attention import store_latents
from flexpert.kernels.cuda.index_scores import score_keys
from flexpert.kernels.device_stream import stream_of
from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models.batch import ForwardBatch
from flexpert.models.device_indexers import DeviceIndexedAttention, DeviceIndexer
from flexpert.models.device_latents import DeviceLatentAttention
from flexpert.models.latent_attention import LatentShape
from flexpert.models.source import ModelSource

SHAPE = LatentShape(heads=128, nope=128, rope=64, rank=512, value_dim=128)
BLOCK, HEADS, DIM, PICKED = 16, 64, 128, 2048
SCALING = (SHAPE.nope + SHAPE.rope) ** -0.5
LONGEST = 6144
CUDA = torch.device("cuda")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


def known(family: str) -> str:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this version of transformers")
    return family


class Step:
    """Rows of sequences with keys and latents in scattered blocks, and what a layer is given."""

    def __init__(self, contexts: Sequence[int], counts: Sequence[int], width: int) -> None:
        """width: blocks of the tables."""
        self.contexts, self.counts = contexts, counts
        order = torch.randperm(len(contexts) * width, device="cuda")
        self.tables = order.int().view(len(contexts), width)
        at = torch.arange(width * BLOCK, device="cuda")
        self.slots = self.tables.long()[:, at // BLOCK] * BLOCK + at % BLOCK
        self.keys = torch.full(
            (len(order), BLOCK, 1, DIM), torch.nan, dtype=torch.bfloat16, device="cuda"
        )
        size = SHAPE.rank + SHAPE.rope
        self.latents = self.keys.new_full((len(order), BLOCK, 1, size), torch.nan)
        for own, context in zip(self.slots, contexts, strict=True):
            store_latents(randn(context, DIM), self.keys, own[:context])
            store_latents(randn(context, size), self.latents, own[:context])
        self.starts = torch.tensor([0, *counts]).cumsum(0).int()

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(sequence, how many keys it sees) of each."""
        return [
            (s, context - count + row + 1)
            for s, (context, count) in enumerate(zip(self.contexts, self.counts, strict=True))
            for row in range(count)
        ]

    def batch(self) -> ForwardBatch:
        nothing = torch.zeros(0, dtype=torch.int64)
        slots = [
            own[context - count : context]
            for own, context, count in zip(self.slots, self.contexts, self.counts, strict=True)
        ]
        lengths = torch.tensor(self.contexts, dtype=torch.int32)
        there = self.starts.cuda(), lengths.cuda(), self.tables, torch.cat(slots)
        host = ForwardBatch(
            nothing, nothing, self.starts, lengths, self.tables.cpu(), nothing, nothing
        )
        return ForwardBatch(nothing, nothing, *there, nothing, host=host)


CASES = {
    "decode": ([6144, 2049, 2048, 17, 4000], [1] * 5),
    "mixed": ([5000, 3000, 300], [40, 1, 130]),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_torch(case: str) -> None:
    step = Step(*CASES[case], width=LONGEST // BLOCK)
    rows = len(step.rows)
    query, weights = randn(rows, HEADS, DIM).float(), torch.randn(rows, HEADS, device="cuda")
    batch = step.batch()
    scores = score_keys(
        query,
        weights,
        step.keys,
        batch.query_start,
        batch.context_len,
        batch.block_tables,
        decode=case == "decode",
    )
    for row, (sequence, last) in enumerate(step.rows):
        kept = step.keys.flatten(0, 2)[step.slots[sequence, :last]].double()
        expected = weights[row].double() @ (query[row].double() @ kept.t()).relu()
        error = (scores[row, :last].double() - expected).norm() / expected.norm()
        assert error < 1e-5
        assert (scores[row, last:] == -torch.inf).all()


class Layer:
    """DeepSeek-V3.2's indexer, and attention to what it picks."""

    def __init__(self, step: Step) -> None:
        known("deepseek_v32")
        from transformers import DeepseekV32Config
        from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

        kernels = gpu_kernels(CUDA)
        assert kernels.indexers is not None
        config = DeepseekV32Config()
        assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, PICKED)
        with CUDA:
            self.module: Any = DeepseekV32Indexer(config, 0).bfloat16()
        self.indexer = DeviceIndexer(self.module, 0, step.keys, kernels.indexers)
        self.weight = randn(SHAPE.heads * (SHAPE.nope + SHAPE.value_dim), SHAPE.rank) / 20
        inner = DeviceLatentAttention(
            SimpleNamespace(kv_b_proj=SimpleNamespace(weight=self.weight)),
            SHAPE,
            step.latents,
            step.latents[..., : SHAPE.rank],
            kernels,
            isolated=False,
        )
        self.attention = DeviceIndexedAttention(inner, [self.indexer])
        rows = len(step.rows)
        self.given = {
            "hidden_states": randn(1, rows, config.hidden_size),
            "q_resid": randn(1, rows, config.q_lora_rank),
            "position_embeddings": (randn(1, rows, 64), randn(1, rows, 64)),
            "position_ids": torch.zeros(1, rows, dtype=torch.int64, device="cuda"),
        }
        self.query = randn(1, SHAPE.heads, rows, SHAPE.nope + SHAPE.rope)
        self.key = randn(1, 1, rows, SHAPE.rank + SHAPE.rope)

    def compute(self, batch: ForwardBatch) -> Tensor:
        self.indexer.batch = self.attention.batch = batch
        indices = self.indexer.forward(**self.given, attention_mask=None)
        found: Tensor = self.attention.attention(
            torch.nn.Identity(),
            self.query,
            self.key,
            self.key,
            None,
            indices=indices,
            scaling=SCALING,
        )
        return found[0]

    def check(self, step: Step, ours: Tensor) -> None:
        """That a row attends to what it picked, and has picked what scores best."""
        assert self.indexer.picked is not None
        places, counts = self.indexer.picked.block_tables, self.indexer.picked.context_len
        each = self.weight.double().view(SHAPE.heads, -1, SHAPE.rank)
        for row, (sequence, last) in enumerate(step.rows):
            slots = step.slots[sequence, :last]
            its = places[row, : counts[row]].long()
            assert len(its) == len(its.unique()) == min(last, PICKED)
            best = slots[self.best(step, row, slots)]
            assert torch.isin(its, best).float().mean() > 0.98  # bf16 of one row and of many
            assert torch.isin(its, slots).all()
            kept = step.latents.flatten(0, 2)[its].double()
            expanded = kept[:, : SHAPE.rank] @ each.transpose(1, 2)
            asked = self.query[0, :, row].double().unsqueeze(1)
            score = asked[..., : SHAPE.nope] @ expanded[..., : SHAPE.nope].transpose(1, 2)
            score = (score + asked[..., SHAPE.nope :] @ kept[:, SHAPE.rank :].t()) * SCALING
            expected = (score.softmax(-1) @ expanded[..., SHAPE.nope :])[:, 0]
            assert (ours[row].double() - expected).norm() / expected.norm() < 2e-2

    def best(self, step: Step, row: int, slots: Tensor) -> Tensor:
        """The numbers that transformers' module picks of the keys in these slots."""

        class Keys:
            def update_indexer(self, new: Tensor, layer: int) -> Tensor:
                return step.keys.flatten(0, 2)[slots].unsqueeze(0)

        turns = tuple(turn[:, row : row + 1] for turn in self.given["position_embeddings"])
        found: Tensor = type(self.module).forward(
            self.module,
            self.given["hidden_states"][:, row : row + 1],
            self.given["q_resid"][:, row : row + 1],
            turns,
            torch.ones(1, 1, len(slots), dtype=torch.bool, device="cuda"),
            self.given["position_ids"][:, row : row + 1],
            cache=Keys(),
        )
        return found[0, 0].long()


@pytest.mark.parametrize("case", CASES)
def test_a_step_attends_to_what_scores_best_and_waits_for_nothing(case: str) -> None:
    step = Step(*CASES[case], width=LONGEST // BLOCK)
    layer = Layer(step)
    batch = step.batch()
    stream_of(CUDA).synchronize()
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = layer.compute(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        layer.check(step, ours)


def test_a_captured_step_picks_anew_each_time() -> None:
    """What the first step had in its tables, lengths and hidden states is no part of the graph."""
    step = Step([6144, 2500, 40], [1] * 3, width=LONGEST // BLOCK)
    layer = Layer(step)
    batch = step.batch()
    stream = stream_of(CUDA)
    with torch.inference_mode():
        replay, result = stream.capture(lambda: layer.compute(batch), stream.graph_pool())
        step.contexts = [3000, 2501, 6000]
        for own, context in zip(step.slots, step.contexts, strict=True):
            store_latents(randn(context, DIM), step.keys, own[:context])
            store_latents(randn(context, SHAPE.rank + SHAPE.rope), step.latents, own[:context])
        batch.context_len.copy_(torch.tensor(step.contexts))
        last = torch.tensor(step.contexts, device="cuda") - 1
        batch.slot_mapping.copy_(step.slots.gather(1, last[:, None])[:, 0])
        layer.given["hidden_states"].copy_(randn(1, 3, 7168))
        replay()
        stream.synchronize()
        layer.check(step, result)


def test_a_service_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """A small DeepSeek-V3.2 with the real one's sizes of heads, of which 64 keys are picked;
    float32. Prompts of several chunks, decoded by graphs, and again from the cache."""
    tokenizer = ModelSource.open("tiny").tokenizer()
    model = make_checkpoint(
        known("deepseek_v32"),
        tmp_path,
        vocab_size=len(tokenizer),
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        index_topk=64,
        index_head_dim=128,
        index_n_heads=64,
        max_position_embeddings=512,
    )
    tokenizer.save_pretrained(model)
    prompts = [prompt_of(length, seed=length) for length in (3, 60, 300, 410)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(
        str(model),
        engine__device="cuda",
        model__dtype="float32",
        engine__max_tokens_per_step=256,
        engine__kv_memory="64MiB",
    ) as llm:
        answers = [answer.token_ids for answer in llm.generate(prompts, params)]
        again = [answer.token_ids for answer in llm.generate(prompts, params)]
        assert all(rank.graphs for rank in llm.cluster().ranks)
    assert answers == again == [greedy(model, prompt, 8) for prompt in prompts]
