"""The C kernels compute what torch does, and each row's bits depend on that row alone."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexpert.kernels.cpu import ops

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
REFERENCE_DTYPE = torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 31), (16, 32), (33, 72), (40, 515)])
def test_linear_is_the_product_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for rows in (0, 1, 2, 3, 4, 5, 9, 24, 150):
        x = torch.randn(2, rows, shape[1]).to(dtype)
        expected = torch.nn.functional.linear(
            x.to(REFERENCE_DTYPE), weight.to(REFERENCE_DTYPE), bias.to(REFERENCE_DTYPE)
        )
        torch.testing.assert_close(
            ops.linear(x, weight, bias).double(),
            expected,
            rtol=TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * math.sqrt(shape[1]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 20), (64, 64), (130, 200)])
def test_a_row_of_linear_has_the_same_bits_in_any_company(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    x = torch.randn(67, shape[1]).to(dtype)
    each = torch.cat([ops.linear(row[None], weight) for row in x])
    for rows in range(1, len(x) + 1):
        assert torch.equal(ops.linear(x[:rows], weight), each[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [512, 1024, 2560])
def test_long_rows_have_the_same_bits_wherever_the_weights_begin(
    inner: int, dtype: torch.dtype
) -> None:
    memory = torch.randn(40 * inner + 64).to(dtype)
    begin = (-memory.data_ptr() % 64 + 16) // memory.element_size()  # as in a mapped file
    weight, bias = memory[begin : begin + 40 * inner].view(40, inner), torch.randn(40).to(dtype)
    x = torch.randn(70, inner).to(dtype)
    each = torch.cat([ops.linear(row[None], weight.clone(), bias) for row in x])
    for rows in (2, 3, 4, 5, 6, 7, 12, 16, 19, 33, 70):
        assert torch.equal(ops.linear(x[:rows], weight, bias), each[:rows])


def test_linear_keeps_nan_and_infinity_in_bf16() -> None:
    x = torch.tensor([[math.nan, 1.0], [math.inf, 1.0], [3e38, 3e38]], dtype=torch.bfloat16)
    y = ops.linear(x, torch.ones(1, 2, dtype=torch.bfloat16))
    assert y[0].isnan()
    assert y[1] == math.inf
    assert y[2] == math.inf


def test_a_weight_table_refuses_experts_of_unequal_shapes() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        ops.WeightTable([torch.zeros(2, 3), torch.zeros(3, 3)], None)
    with pytest.raises(ValueError, match="contiguous"):
        ops.WeightTable([torch.zeros(3, 2).t()], None)


class Cache:
    """Sequences in scattered blocks, and what attention over them should be."""

    def __init__(
        self, heads: tuple[int, int], dims: tuple[int, int], block_size: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(7)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.heads, self.kv_heads = heads
        self.dims, self.block_size, self.dtype, self.longest = dims, block_size, dtype, 83
        blocks = -(-self.longest // block_size)
        self.table = torch.randperm(blocks + 3, generator=generator)[:blocks].int()
        # what no token has been written to must not be read
        shape = (blocks + 3, block_size, self.kv_heads)
        self.key_cache = torch.full((*shape, dims[0]), math.nan, dtype=dtype)
        self.value_cache = torch.full((*shape, dims[1]), math.nan, dtype=dtype)
        self.query = randn(self.longest, self.heads, dims[0])
        self.key = randn(self.longest, self.kv_heads, dims[0])
        self.value = randn(self.longest, self.kv_heads, dims[1])

    def attend(self, begin: int, end: int, **options: Any) -> Tensor:
        positions = torch.arange(begin, end)
        blocks = self.table[positions // self.block_size].long()
        return ops.paged_attention(
            self.query[begin:end],
            self.key[begin:end],
            self.value[begin:end],
            self.key_cache,
            self.value_cache,
            torch.tensor([0, end - begin], dtype=torch.int32),
            torch.tensor([end], dtype=torch.int32),
            self.table[None],
            blocks * self.block_size + positions % self.block_size,
            scaling=0.3,
            **options,
        )

    def expected(
        self, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None
    ) -> Tensor:
        group = self.heads // self.kv_heads
        key = self.key.double().repeat_interleave(group, 1)
        value = self.value.double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", self.query.double(), key) * 0.3
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        q, k = torch.arange(self.longest)[:, None], torch.arange(self.longest)[None]
        seen = (k <= q) & ((k > q - window) if window > 0 else True)
        seen &= (k // -window == q // -window) if window < 0 else True
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            extra = sinks.double()[:, None, None].expand(-1, self.longest, 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., : self.longest]
        return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_values_may_be_the_first_part_of_the_keys(dtype: torch.dtype) -> None:
    apart, within = (Cache((4, 1), (40, 24), 16, dtype) for _ in range(2))
    within.value_cache = within.key_cache[..., :24]
    for cache in (apart, within):
        cache.value = cache.key[..., :24]
    for begin, end in ((0, 50), (50, 51), (51, 83)):
        assert torch.equal(within.attend(begin, end), apart.attend(begin, end))


OPTIONS = [
    {},
    {"window": 1},
    {"window": 16},
    {"window": 21},
    {"window": -21},
    {"softcap": 1.5},
    {"sinks": torch.tensor([2.0, -1.0, 0.0, 9.0])},
    {"sinks": torch.tensor([2.0, -1.0, 0.0, 9.0]), "window": 9},
]
"""A window below 0: of chunks."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(32, 32), (24, 20), (72, 40)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_paged_attention_is_causal_softmax_attention(
    options: dict[str, Any], kv_heads: int, dims: tuple[int, int], dtype: torch.dtype
) -> None:
    cache = Cache((4, kv_heads), dims, 8, dtype)
    given = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    result = cache.attend(0, cache.longest, **given)
    torch.testing.assert_close(
        result.double(), cache.expected(**options), rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 5, 16, 32])
@pytest.mark.parametrize(
    "options", [{}, {"window": 21}, {"window": -21}], ids=["all", "window", "chunks"]
)
def test_attention_of_a_row_has_the_same_bits_for_any_chunking(
    options: dict[str, Any], block_size: int, dtype: torch.dtype
) -> None:
    whole = Cache((4, 2), (24, 20), block_size, dtype)
    expected = whole.attend(0, whole.longest, **options)
    for chunk in (1, 2, 3, 16, 40):
        cache = Cache((4, 2), (24, 20), block_size, dtype)
        steps = range(0, cache.longest, chunk)
        pieces = [cache.attend(i, min(i + chunk, cache.longest), **options) for i in steps]
        assert torch.equal(torch.cat(pieces), expected)


SCRIPT = """
import torch
from flexpert.kernels.cpu import ops
torch.manual_seed(0)
x, w = torch.randn(9, 200), torch.randn(40, 200)
for dtype in (torch.float32, torch.bfloat16):
    a, b = x.to(dtype), w.to(dtype)
    y = ops.linear(a, b)
    assert all(torch.equal(ops.linear(a[i : i + 1], b)[0], y[i]) for i in range(9))
    torch.testing.assert_close(y.double(), a.double() @ b.double().t(), rtol=1e-2, atol=1e-1)
    cache = torch.empty(4, 16, 2, 24, dtype=dtype)
    q, k = torch.randn(50, 4, 24).to(dtype), torch.randn(50, 2, 24).to(dtype)
    at = lambda i, j: ops.paged_attention(
        q[i:j], k[i:j], k[i:j], cache, cache.clone() if i == 0 else values,
        torch.tensor([0, j - i], dtype=torch.int32), torch.tensor([j], dtype=torch.int32),
        torch.arange(4, dtype=torch.int32)[None], torch.arange(i, j), scaling=0.2)
    values = torch.empty_like(cache)
    each = torch.cat([ops.paged_attention(
        q[i:i+1], k[i:i+1], k[i:i+1], cache, values, torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([i + 1], dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None],
        torch.tensor([i]), scaling=0.2) for i in range(50)])
    assert torch.equal(each, at(0, 50))
    full = torch.nn.functional.scaled_dot_product_attention(
        *(t.double().transpose(0, 1)[None] for t in (q, k, k)), is_causal=True, scale=0.2,
        enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(each.double(), full, rtol=2e-2, atol=1e-2)
print(ops.instruction_set())
"""


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_lesser_instruction_sets_keep_the_promises(instruction_set: str) -> None:
    order = ["portable", "avx2", "avx512", "avx512_bf16", "amx"]
    if order.index(ops.instruction_set()) < order.index(instruction_set):
        pytest.skip(f"this CPU has no {instruction_set}")
    source = str(Path(ops.__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ
        | {"FLEXPERT_CPU": instruction_set, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.stdout.strip() == instruction_set, done.stderr


@pytest.mark.skipif(ops.instruction_set() != "avx512_bf16", reason="needs products of bf16")
def test_products_of_bf16_are_two_fused_additions() -> None:
    """So ranks with and without the instruction give the same bits."""
    x, weight = torch.randn(9, 200).bfloat16(), torch.randn(40, 200).bfloat16()
    torch.save((x, weight), buffer := io.BytesIO())
    script = (
        "import io, sys, torch; from flexpert.kernels.cpu import ops\n"
        "x, weight = torch.load(io.BytesIO(sys.stdin.buffer.read()))\n"
        "y = io.BytesIO(); torch.save(ops.linear(x, weight), y)\n"
        "assert ops.instruction_set() == 'avx512'; sys.stdout.buffer.write(y.getvalue())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=buffer.getvalue(),
        env={
            **os.environ,
            "FLEXPERT_CPU": "avx512",
            "PYTHONPATH": str(Path(ops.__file__).parents[3]),
        },
        capture_output=True,
        timeout=100,
        check=True,
    )
    assert torch.equal(torch.load(io.BytesIO(done.stdout)), ops.linear(x, weight))


@pytest.fixture
def three_threads() -> Iterator[None]:
    ops.set_threads(3)
    yield
    ops.set_threads(1)


def large_product(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dice = torch.Generator().manual_seed(rows)
    x = torch.randn((rows, 512), generator=dice).bfloat16()
    weights = torch.randn((5, 1000, 512), generator=dice).bfloat16()
    offsets = torch.tensor([0, 1, 1, rows // 2, rows - 1, rows], dtype=torch.int32)
    return x, weights, offsets


@pytest.mark.parametrize("rows", [4, 9, 70])
def test_threads_share_products_and_change_no_bit(rows: int, three_threads: None) -> None:
    x, weights, offsets = large_product(rows)
    table = ops.WeightTable(list(weights), [weight[:, 0].clone() for weight in weights])
    shared = [table.linear(x, offsets) for _ in range(20)]
    ops.set_threads(1)
    alone = table.linear(x, offsets)
    assert all(torch.equal(each, alone) for each in shared)


def test_threads_share_attention_and_change_no_bit(three_threads: None) -> None:
    shared = Cache((8, 4), (64, 64), 16, torch.bfloat16)
    outs = [shared.attend(0, shared.longest) for _ in range(3)]
    ops.set_threads(1)
    alone = Cache((8, 4), (64, 64), 16, torch.bfloat16)
    expected = [alone.attend(0, alone.longest) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))


def test_a_product_beside_another_and_in_a_forked_child(three_threads: None) -> None:
    """The pool takes one at a time; its threads are made anew where a fork has none of them."""
    x, weights, offsets = large_product(40)
    table = ops.WeightTable(list(weights), None)
    expected = table.linear(x, offsets)
    with ThreadPoolExecutor(4) as threads:
        for each in threads.map(lambda _: table.linear(x, offsets), range(40)):
            assert torch.equal(each, expected)
    child = os.fork()
    if not child:
        found = table.linear(x, offsets)  # compared without torch: its threads do not come along
        same = bytes(found.view(torch.uint8).numpy()) == bytes(expected.view(torch.uint8).numpy())
        os._exit(0 if same and len(os.listdir("/proc/self/task")) > 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
