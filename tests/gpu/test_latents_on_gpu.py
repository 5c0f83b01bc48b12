"""Latents in a GPU's cache: the kernels at DeepSeek-V3's shapes against float64, then a service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import greedy, make_checkpoint, prompt_of
from torch import Tensor

from flexpert import LLM, SamplingParams
from flexpert.kernels.cuda.absorbed_attention import attend_latents, store_latents
from flexpert.kernels.device_stream import stream_of
from flexpert.kernels.kernel_set import gpu_kernels
from flexpert.models.batch import ForwardBatch
from flexpert.models.device_latents import DeviceLatentAttention, cut_pieces
from flexpert.models.latent_attention import LatentShape
from flexpert.models.source import ModelSource

SHAPE = LatentShape(heads=128, nope=128, rope=64, rank=512, value_dim=128)
BLOCK = 16
SCALING = (SHAPE.nope + SHAPE.rope) ** -0.5


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


class Cache:
    """Sequences of latents in scattered blocks. contexts: their lengths."""

    def __init__(self, contexts: Sequence[int]) -> None:
        self.contexts = torch.tensor(contexts, dtype=torch.int32, device="cuda")
        width = -(-max(contexts) // BLOCK)
        order = torch.randperm(len(contexts) * width + 1, device="cuda")[:-1]
        self.tables = order.int().view(len(contexts), width)
        size = SHAPE.rank + SHAPE.rope
        self.memory = torch.full(
            (len(order) + 1, BLOCK, 1, size), float("nan"), dtype=torch.bfloat16, device="cuda"
        )
        for sequence, context in enumerate(contexts):
            store_latents(randn(context, size), self.memory, self.slots(sequence, 0, context))

    def slots(self, sequence: int, begin: int, end: int) -> Tensor:
        at = torch.arange(begin, end, device="cuda")
        return self.tables[sequence, at // BLOCK].long() * BLOCK + at % BLOCK

    def latents(self, sequence: int) -> Tensor:
        """[context, rank + rope] float64."""
        kept = self.memory[self.tables[sequence].long()].flatten(0, 2)
        return kept[: int(self.contexts[sequence])].double()


@pytest.mark.parametrize(
    "contexts",
    [[1], [4096], [33] * 3, [1, 4096, 64, 65, 777] * 3 + [0], [4096] * 64, list(range(1, 65))],
    ids=["one token", "one", "three", "sixteen", "sixty-four", "all lengths"],
)
def test_a_decode_step_attends_as_in_float64(contexts: list[int]) -> None:
    cache = Cache(contexts)
    query, rotary = randn(SHAPE.heads, len(contexts), SHAPE.rank), randn(len(contexts), 128, 64)
    ours = attend_latents(
        query / 8,
        rotary.transpose(0, 1),
        cache.memory,
        torch.arange(len(contexts) + 1, dtype=torch.int32, device="cuda"),
        cache.contexts,
        cache.tables,
        scaling=SCALING,
        decode=True,
    )
    for sequence, context in enumerate(contexts):
        if context == 0:
            assert (ours[:, sequence] == 0).all()
            continue
        keys = cache.latents(sequence)
        asked = torch.cat([query[:, sequence] / 8, rotary[sequence]], -1).double()
        expected = (asked @ keys.t() * SCALING).softmax(-1) @ keys[:, : SHAPE.rank]
        assert relative(ours[:, sequence], expected) < 1e-2


@pytest.mark.parametrize(
    ("contexts", "counts"),
    [
        ([700, 33, 1500, 64], [700, 1, 200, 5]),  # a prompt, a decode, a later chunk, a short one
        ([4096, 900, 900], [300, 1, 1]),
        ([40, 2], [40, 2]),
    ],
    ids=["mixed", "a long prompt", "short"],
)
def test_a_step_with_prompts_attends_as_in_float64(contexts: list[int], counts: list[int]) -> None:
    cache = Cache(contexts)
    weight = randn(SHAPE.heads * (SHAPE.nope + SHAPE.value_dim), SHAPE.rank) / SHAPE.rank**0.5
    layer = DeviceLatentAttention(
        SimpleNamespace(kv_b_proj=SimpleNamespace(weight=weight)),
        SHAPE,
        cache.memory,
        cache.memory[..., : SHAPE.rank],
        gpu_kernels(weight.device),
        isolated=False,
    )
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    pieces = cut_pieces(starts.tolist(), contexts, 171, 1024)
    assert any(piece.context for piece in pieces) == (max(counts) > 170)
    tokens = sum(counts)
    query = randn(1, SHAPE.heads, tokens, SHAPE.nope + SHAPE.rope)
    key = randn(1, 1, tokens, SHAPE.rank + SHAPE.rope)
    slots = [
        cache.slots(s, c - n, c) for s, (c, n) in enumerate(zip(contexts, counts, strict=True))
    ]
    nothing = torch.zeros(0, dtype=torch.int64)
    host = ForwardBatch(
        nothing, nothing, starts, cache.contexts.cpu(), cache.tables.cpu(), nothing, nothing
    )
    layer.batch = ForwardBatch(
        nothing, nothing, starts.cuda(), cache.contexts, cache.tables, torch.cat(slots), nothing,
        host=host,
    )  # fmt: skip
    stream_of(weight.device).synchronize()
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = layer.attention(torch.nn.Identity(), query, key, key, None, scaling=SCALING)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    each = weight.double().view(SHAPE.heads, -1, SHAPE.rank)
    for s, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        kept = cache.latents(s)
        expanded = kept[:, : SHAPE.rank] @ each.transpose(1, 2)  # [heads, context, nope + value]
        keys = expanded[..., : SHAPE.nope]
        asked = query[0, :, int(starts[s]) : int(starts[s + 1])].double()
        score = asked[..., : SHAPE.nope] @ keys.transpose(1, 2)
        score = (score + asked[..., SHAPE.nope :] @ kept[:, SHAPE.rank :].t()) * SCALING
        at = torch.arange(context, device="cuda")
        score.masked_fill_(at[None] > at[context - count :, None], float("-inf"))
        expected = (score.softmax(-1) @ expanded[..., SHAPE.nope :]).transpose(0, 1)
        assert relative(ours[int(starts[s]) : int(starts[s + 1])], expected) < 2e-2


def test_a_service_gives_the_tokens_of_transformers(tmp_path: Path) -> None:
    """A small DeepSeek-V3 with the real one's heads, of which there are fewer; float32. Prompts
    whose keys and values are expanded, and those that are not, decoded by graphs."""
    tokenizer = ModelSource.open("tiny").tokenizer()
    model = make_checkpoint(
        "deepseek_v3",
        tmp_path,
        vocab_size=len(tokenizer),
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=128,
        v_head_dim=128,
        max_position_embeddings=512,
    )
    tokenizer.save_pretrained(model)
    prompts = [prompt_of(length, seed=length) for length in (3, 40, 300, 410)]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(
        str(model),
        engine__device="cuda",
        model__dtype="float32",
        engine__max_tokens_per_step=256,
        engine__kv_memory="64MiB",
    ) as llm:
        answers = [answer.token_ids for answer in llm.generate(prompts, params)]
        again = [answer.token_ids for answer in llm.generate(prompts, params)]  # from the cache
        assert all(rank.graphs for rank in llm.cluster().ranks)
    assert answers == again == [greedy(model, prompt, 8) for prompt in prompts]
