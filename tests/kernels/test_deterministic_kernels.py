"""The kernels of `--deterministic` on GPUs: a row's sums have an order of their own, in Triton's
interpreter (float32, small shapes)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda import attention, fixed_attention, fixed_rows, norm, router
from flexpert.kernels.cuda import fixed_products as products
from flexpert.kernels.cuda import grouped_products as grouped

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_order(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The sums of a linear layer as its module promises them: columns one by one within a tile,
    tiles within a part, parts from the first to the last; in float32."""
    depth = products.depth_of(x.dtype)
    part = products.part_of(*weight.shape, depth)
    total = torch.zeros(x.shape[0], weight.shape[0])
    for begin in range(0, x.shape[1], part):
        sums = torch.zeros_like(total)
        for k in range(begin, min(begin + part, x.shape[1]), depth):
            tile = torch.zeros_like(total)
            for column in range(k, min(k + depth, x.shape[1])):
                tile += x[:, column, None] * weight[None, :, column]
            sums += tile
        total += sums
    return total + bias


@pytest.mark.parametrize("shape", [(70, 1600), (24, 40), (8, 1030)], ids=str)
def test_a_linear_layer_sums_in_an_order_of_the_weights_shape(shape: tuple[int, int]) -> None:
    columns, depth = shape
    weight, bias, x = randn(columns, depth), randn(columns, seed=1), randn(40, depth, seed=2)
    fixed = products.FixedProducts(CPU)
    expected = in_order(x, weight, bias)
    for rows in (slice(0, 40), slice(0, 1), slice(5, 12), slice(3, 36)):
        assert torch.equal(fixed.linear(x[rows], weight, bias), expected[rows])


def test_parts_of_a_linear_layer_are_added_alike_by_one_program_and_by_several() -> None:
    weight, x = randn(70, 1600), randn(5, 1600, seed=2)
    fixed = products.FixedProducts(CPU)
    parts = -(-1600 // products.part_of(70, 1600, 32))
    assert parts > 2
    usual = products.choose(5, 70, parts, torch.float32)
    assert usual.parted
    assert not products.choose(2**16, 70, parts, torch.float32).parted
    from_one = products.LinearTiling(64, 32, 32, warps=4, stages=2, parted=False)
    for _ in range(2):  # counts are as they were after a launch
        together = fixed.linear(x, weight)
        assert torch.equal(together, fixed.linear(x, weight, tiling=from_one))


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 200, 2048, 8192])
@pytest.mark.parametrize("shape", [(128, 2048), (2048, 4096), (5120, 2048), (151936, 2048)])
def test_no_tiling_changes_the_depth_or_has_more_tiles_than_counts(
    rows: int, shape: tuple[int, int]
) -> None:
    columns, depth = shape
    part = products.part_of(columns, depth, 64)
    assert part % 64 == 0
    tiling = products.choose(rows, columns, -(-depth // part), torch.bfloat16)
    assert tiling.depth == products.depth_of(torch.bfloat16)
    assert tiling.columns % 64 == 0, "the tensor cores take 64 rows of a weight"
    if tiling.parted:
        tiles = -(-columns // tiling.columns) * -(-rows // tiling.rows)
        assert tiles <= products.MOST_TILES
    expected = {grouped.choose_fixed(n * 64, 64, gated=True).depth for n in (1, 9, 50, 500)}
    assert expected == {grouped.DEPTH}


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "chunks": {"window": -40},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": randn(4, seed=5)},
}


@pytest.mark.parametrize("options", ATTENTION.values(), ids=list(ATTENTION))
def test_a_query_has_the_same_bits_in_a_prompt_in_a_piece_and_decoding(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of the border of two chunks."""
    monkeypatch.setattr(fixed_attention, "CHUNK", 32)
    block, last, lengths = 16, 6, [98, 30]
    most = -(-max(lengths) // block)
    tables = torch.randperm(2 * most, generator=torch.Generator().manual_seed(0)).int()
    tables = tables.view(2, most)
    keys, values = randn(2 * most, block, 2, 16, seed=1), randn(2 * most, block, 2, 12, seed=2)
    queries = randn(2, last, 4, 16, seed=3)

    def attend(kernel: Any, pieces: list[tuple[int, int, int]], **how: Any) -> list[Tensor]:
        """pieces: (sequence, first and behind the last of its rows)."""
        counts = [end - begin for _, begin, end in pieces]
        out = kernel(
            torch.cat([queries[s, begin:end] for s, begin, end in pieces]),
            keys,
            values,
            torch.tensor([0, *counts]).cumsum(0).int(),
            torch.tensor([lengths[s] - last + end for s, _, end in pieces]).int(),
            tables[[s for s, _, _ in pieces]].contiguous(),
            scaling=0.2,
            **options,
            **how,
        )
        return list(out.split(counts))

    every = [(0, 0, last), (1, 0, last)]
    whole = attend(fixed_attention.attend, every)
    for ours, usual in zip(whole, attend(attention.attend, every), strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-5)
    for piece in ([(0, 0, 5)], [(1, 2, 3), (0, 1, 4)], [(1, 0, 6), (0, 5, 6)]):
        for (s, begin, end), found in zip(
            piece, attend(fixed_attention.attend, piece), strict=True
        ):
            assert torch.equal(found, whole[s][begin:end])
    decoding = [(0, 5, 6), (1, 5, 6), (0, 2, 3)]
    for splits in (1, 2, 3):
        found = attend(fixed_attention.attend, decoding, splits=splits)
        assert torch.equal(torch.cat(found), torch.stack([whole[s][b] for s, b, _ in decoding]))


def test_norms_routers_and_sums_have_one_shape_of_program() -> None:
    x, weight = randn(40, 96), randn(96, seed=1)
    kernels = {
        "norm": lambda rows: norm.rms_norm(x[rows], weight, 1e-6, early=True),
        "router": lambda rows: router.choose_experts(
            x[rows], 3, normalised=True, dtype=torch.float32, deterministic=True
        )[0],
        "sum": lambda rows: fixed_rows.sum_rows(x[rows]),
        "mean": lambda rows: fixed_rows.mean_rows(x[rows]),
        "softmax": lambda rows: fixed_rows.softmax_rows(x[rows]),
        "layer norm": lambda rows: fixed_rows.layer_norm_rows(x[rows], weight, None, 1e-6),
    }
    for name, kernel in kernels.items():
        whole = kernel(slice(None))
        for begin, rows in itertools.product((0, 7), (1, 2, 33)):
            assert torch.equal(kernel(slice(begin, begin + rows)), whole[begin : begin + rows]), (
                name
            )
    torch.testing.assert_close(kernels["sum"](slice(None)), x.sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels["mean"](slice(None)), x.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kernels["softmax"](slice(None)), x.softmax(-1))
