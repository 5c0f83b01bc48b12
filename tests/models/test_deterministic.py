"""`deterministic=True`: a token's logits have the same bits whatever shares its batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import MAIN_FAMILIES, Sequences, prompt_of, single_runner
from torch import Tensor

from flexpert.errors import UnsupportedModel
from flexpert.models.deterministic import RowwiseMode

Checkpoints = Callable[..., Path]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@pytest.fixture(params=[(f, d) for f in MAIN_FAMILIES for d in DTYPES], ids="-".join)
def sequences(request: pytest.FixtureRequest, checkpoint: Checkpoints) -> Sequences:
    family, dtype = request.param
    return single_runner(checkpoint(family, DTYPES[dtype]), deterministic=True, blocks=400)


def in_chunks(sequences: Sequences, tokens: list[int], size: int) -> Tensor:
    """[tokens, vocab] logits of a sequence computed `size` tokens a step."""
    pieces = [
        sequences.step({"alone": tokens[i : i + size]})["alone"]
        for i in range(0, len(tokens), size)
    ]
    sequences.drop("alone")
    return torch.cat(pieces)


def test_decoded_tokens_equal_prefilled_ones_for_any_chunking(sequences: Sequences) -> None:
    tokens = prompt_of(67, seed=3)
    whole = in_chunks(sequences, tokens, len(tokens))
    for size in (1, 2, 3, 7, 16, 17, 32, 64):
        assert torch.equal(in_chunks(sequences, tokens, size), whole), f"chunks of {size}"


def test_a_decoded_token_is_the_same_in_batches_of_1_to_33(sequences: Sequences) -> None:
    tokens = prompt_of(30, seed=4)
    alone = in_chunks(sequences, tokens, 1)[-1]
    for others in range(33):
        context = {i: prompt_of(1 + (5 * i) % 23, seed=i) for i in range(others)}
        sequences.step({**context, "same": tokens[:-1]})
        logits = sequences.step({**{i: [7 + i] for i in context}, "same": tokens[-1:]})
        assert torch.equal(logits["same"][-1], alone), f"{others} others"
        for name in (*context, "same"):
            sequences.drop(name)


def test_a_decoded_token_is_the_same_beside_prefills(sequences: Sequences) -> None:
    tokens = prompt_of(41, seed=5)
    alone = in_chunks(sequences, tokens, len(tokens))
    for length in (1, 2, 15, 16, 33, 64, 129):
        sequences.step({"same": tokens[:-1]})
        before = sequences.step({"p": prompt_of(length, seed=6), "same": tokens[-1:], "q": [9, 8]})
        assert torch.equal(before["same"][-1], alone[-1]), f"beside a prefill of {length}"
        for name in ("same", "p", "q"):
            sequences.drop(name)


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean of squares": lambda x: x.float().pow(2).mean(-1, keepdim=True),
    "sum": lambda x: x.sum(-1, keepdim=True),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "topk": lambda x: x.topk(min(2, x.shape[-1]), -1)[0],
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_reductions_left_to_torch_are_row_by_row(name: str, dtype: torch.dtype) -> None:
    reduce = REDUCTIONS[name]
    for width in (1, 2, 3, 4, 8, 31, 48, 72, 256, 1000, 4096):
        wide = torch.randn(33, width + 13).to(dtype)  # rows with a gap, as a split leaves them
        x = wide[:, :width].contiguous()
        each = torch.cat([reduce(row[None]) for row in x])
        for rows in (2, 3, 16, 17, 33):
            assert torch.equal(reduce(x[None, :rows])[0], each[:rows])
            assert torch.equal(reduce(wide[:rows, :width]), each[:rows])


def test_elementwise_functions_see_whole_vectors() -> None:
    x = torch.randn(17, 72)
    with RowwiseMode():
        for function in (torch.nn.functional.silu, torch.sigmoid, torch.exp, torch.cos):
            each = torch.cat([function(row[None]) for row in x])
            for rows in (1, 2, 5, 17):
                assert torch.equal(function(x[:rows]), each[:rows])
                strided = torch.cat([x, x], 1)[:, :72]
                assert torch.equal(function(strided[:rows]), each[:rows])


def test_products_whose_sums_are_not_ordered_are_refused() -> None:
    with RowwiseMode():
        with pytest.raises(UnsupportedModel, match="batched"):
            torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
        with pytest.raises(UnsupportedModel, match="float64"):
            torch.nn.functional.linear(torch.ones(2, 3).double(), torch.ones(4, 3).double())
