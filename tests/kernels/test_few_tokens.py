"""The kernels of a layer with few tokens against those for any number; in Triton's interpreter."""

from __future__ import annotations

from typing import Final

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda.attention import attend
from flexpert.kernels.cuda.few_tokens import FewTokens
from flexpert.kernels.cuda.norm import rms_norm
from flexpert.kernels.cuda.rotary import rotate_and_store
from flexpert.kernels.cuda.router import choose_experts

CPU: Final = torch.device("cpu")
HIDDEN, HEADS, KV_HEADS, DIM, BLOCK = 48, 4, 2, 16, 16  # not a power of two
EPS = 1e-5
TOKENS = (1, 2, 4)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS)
def test_products_with_what_stands_around_them(tokens: int) -> None:
    few, x = FewTokens(CPU), torch.randn(tokens, HIDDEN)
    weight, bias = torch.randn(130, HIDDEN), torch.randn(130)
    scale, residual = torch.rand(HIDDEN) + 0.5, torch.randn(tokens, 130)
    normed = rms_norm(x, scale, EPS, early=True)
    equal(few.project(x, weight, bias, norm=(scale, EPS, True)), normed @ weight.T + bias)
    equal(few.project(x, weight, residual=residual), x @ weight.T + residual)


@pytest.mark.parametrize("window", [0, 37, -50], ids=["all keys", "window", "chunks"])
@pytest.mark.parametrize("dressed", [False, True], ids=["plain", "norms and sinks"])
@pytest.mark.parametrize("contexts", [[700], [1, 130], [0, 65, 64, 312]], ids=str)
def test_attention_with_what_stands_before_it(
    contexts: list[int], dressed: bool, window: int
) -> None:
    """Contexts of 0 are padding; those of 700 are cut among several programs."""
    tokens, width = len(contexts), 44
    tables = torch.randperm(tokens * width).reshape(tokens, width).int()
    context_len = torch.tensor(contexts, dtype=torch.int32)
    slots = [
        int(tables[s, (c - 1) // BLOCK]) * BLOCK + (c - 1) % BLOCK if c else -1
        for s, c in enumerate(contexts)
    ]
    keys, values = torch.randn(2, tokens * width, BLOCK, KV_HEADS, DIM)
    caches = keys.clone(), values.clone()
    qkv = torch.randn(tokens, HEADS + 2 * KV_HEADS, DIM)
    angles = DIM if dressed else DIM // 2
    front = (qkv, torch.randn(tokens, angles), torch.randn(tokens, angles), torch.tensor(slots))
    norms = (torch.rand(DIM) + 0.5, torch.rand(DIM) + 0.5) if dressed else None
    sinks = torch.randn(HEADS) if dressed else None
    query = rotate_and_store(*front, keys, values, norms=norms, eps=EPS, early=dressed)
    expected = attend(
        *(query, keys, values, torch.arange(tokens + 1, dtype=torch.int32), context_len, tables),
        scaling=0.2,
        window=window,
        sinks=sinks,
    )
    few = FewTokens(CPU)
    for _ in range(2):  # what counts programs is left as it was found
        found = few.attend(
            *(*front, *caches, context_len, tables),
            norms=norms,
            eps=EPS,
            early=dressed,
            scaling=0.2,
            window=window,
            sinks=sinks,
        )
        equal(found, expected.flatten(1))
        assert torch.equal(caches[0], keys)
        assert torch.equal(caches[1], values)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("normalised", [True, False])
def test_a_choice_of_experts_with_its_norm(tokens: int, normalised: bool) -> None:
    experts, topk = 70, 6
    x, scale = torch.randn(tokens, HIDDEN), torch.rand(HIDDEN) + 0.5
    weight, bias = torch.randn(experts, HIDDEN), torch.randn(experts)
    weight[40], bias[40] = weight[7], bias[7]  # of equal ones the first
    normed = rms_norm(x, scale, EPS, early=False)
    expected = choose_experts(
        normed @ weight.T + bias, topk, normalised=normalised, dtype=torch.float32
    )
    few = FewTokens(CPU)
    for _ in range(2):
        found = few.route(
            *(x, (scale, EPS, False), weight, bias, topk),
            normalised=normalised,
            dtype=torch.float32,
        )
        equal(found[0], normed)
        equal(found[1], expected[0])
        assert torch.equal(found[2], expected[1])


@pytest.mark.parametrize("tokens", TOKENS)
def test_chosen_experts_added_to_what_came_in(tokens: int) -> None:
    """The last token is padding, and of the first one choice is of no expert."""
    experts, topk, inter = 9, 3, 24
    x, residual = torch.randn(2, tokens, HIDDEN)
    ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)])
    weights = torch.rand(tokens, topk)
    slot_of = torch.randperm(experts).int()
    slot_of[ids[0, 1]] = -1
    ups = torch.randn(experts, 2 * inter, HIDDEN)
    downs = torch.randn(experts, HIDDEN, inter)
    up, down = torch.zeros((2, experts), dtype=torch.int64)
    for expert, slot in enumerate(slot_of.tolist()):
        if slot >= 0:
            up[slot], down[slot] = ups[expert].data_ptr(), downs[expert].data_ptr()
    counted = max(1, tokens - 1)
    expected = residual.clone()
    for token in range(counted):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if slot_of[expert] >= 0:
                gate, raised = (ups[expert] @ x[token]).chunk(2)
                expected[token] += weight * (downs[expert] @ (F.silu(gate) * raised))
    found = FewTokens(CPU).experts(
        *(x, ids, weights, slot_of, torch.tensor([counted], dtype=torch.int32)),
        *(up, down, inter, residual),
    )
    equal(found, expected)
