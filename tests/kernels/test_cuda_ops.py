"""The GPU kernels compute what the CPU's do, in Triton's interpreter (float32, small shapes)."""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from flexpert.kernels.cpu import ops

pytest.importorskip("triton", reason="the GPU kernels need the package triton")

from flexpert.kernels.cuda import attention, attention_parts, norm, prompt_attention, rotary, router
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.cuda import row_sorting as routing
from flexpert.kernels.cuda.gates import clamped_swiglu, clamped_swiglu_of
from flexpert.kernels.cuda.grouped_products import ProductTiling
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat

HIDDEN, INTER = 48, 40

TILINGS = [
    ProductTiling(16, 64, 32, warps=4, stages=2, swap=True),
    ProductTiling(16, 16, 16, warps=4, stages=2, swap=False),
    ProductTiling(32, 16, 32, warps=4, stages=2, swap=False),
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


COUNTS = [[1, 0, 2, 5], [0, 0, 0], [0, 7, 0, 0, 0], [40, 3, 0, 17]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("tiling", TILINGS, ids=lambda t: f"{t.rows}x{t.columns}-{t.swap}")
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_each_row_meets_the_weights_of_its_own_expert(
    counts: list[int], tiling: ProductTiling, biased: bool, gated: bool
) -> None:
    slots, rows = len(counts), sum(counts)
    height = 2 * INTER if gated else INTER
    weights = [randn(height, HIDDEN, seed=i) / 7 for i in range(slots)]
    biases = [randn(height, seed=i + 50) for i in range(slots)]
    x = randn(11, HIDDEN, seed=99)
    room = rows + 5  # as in a captured graph: more than there are rows
    index = torch.randint(0, 11, (room,), dtype=torch.int32)
    out = torch.full((room, INTER), math.nan)
    products.grouped_product(
        x,
        addresses(weights),
        offsets_of(counts),
        out,
        index=index,
        biases=addresses(biases) if biased else None,
        gated=gated,
        tiling=tiling,
    )
    slot = torch.arange(slots).repeat_interleave(torch.tensor(counts))
    for row in range(rows):
        s = int(slot[row])
        expected = weights[s].double() @ x[int(index[row])].double()
        if biased:
            expected += biases[s]
        if gated:
            half = torch.nn.functional.silu(expected[:INTER])
            expected = half * expected[INTER:]
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-4)
    assert out[rows:].isnan().all()  # what nobody asked for is not touched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [None, FP8, MXFP4], ids=["plain", "fp8", "mxfp4"])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_the_tiles_that_are_chosen_fit_into_shared_memory(
    dtype: torch.dtype, packed: WeightFormat | None, gated: bool
) -> None:
    """Triton keeps a tile of each operand for each stage; an H100 has 227 KiB for a program."""
    for rows in (1, 64, 8 * 64, 9 * 64, 48 * 64, 49 * 64, 128 * 64, 129 * 64, 4096 * 64):
        t = products.choose(rows, 64, gated=gated, packed=packed, dtype=dtype)
        weights = (
            t.columns * t.depth * (2 if gated else 1) * (dtype.itemsize if packed is None else 1)
        )
        assert t.stages * (t.rows * t.depth * dtype.itemsize + weights) <= 227 * 1024


def test_rows_are_their_own_without_an_index() -> None:
    weight, x = randn(INTER, HIDDEN), randn(3, HIDDEN, seed=1)
    out = products.grouped_product(
        x, addresses([weight, weight]), offsets_of([2, 1]), x.new_empty(3, INTER), tiling=TILINGS[0]
    )
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_fp8_weights_count_times_the_scale_of_their_block(swap: bool, gated: bool) -> None:
    inter, hidden = 136, 272  # no multiples of a block
    height = 2 * inter if gated else inter
    weights = [randn(height, hidden, seed=i).to(torch.float8_e4m3fn) for i in range(2)]
    scales = [randn(-(-height // 128), 3, seed=i + 9).abs() / 30 for i in range(2)]
    x = randn(5, hidden, seed=5)
    out = products.grouped_product(
        x,
        addresses(weights),
        offsets_of([2, 3]),
        torch.full((5, inter), math.nan),
        packed=FP8,
        scales=addresses(scales),
        gated=gated,
        tiling=ProductTiling(16, 64, 64, warps=4, stages=2, swap=swap),
    )
    for row in range(5):
        s = int(row >= 2)
        whole = scales[s].repeat_interleave(128, 0)[:height].repeat_interleave(128, 1)[:, :hidden]
        expected = (weights[s].double() * whole) @ x[row].double()
        if gated:
            expected = torch.nn.functional.silu(expected[:inter]) * expected[inter:]
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", ["left", "right", "rows"])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_mxfp4_weights_are_what_a_cpu_dequantizes(tiles: str, gated: bool) -> None:
    inter, hidden = 72, 160  # neither is a multiple of a tile
    height = 2 * inter if gated else inter
    pairs = [MXFP4.quantize(randn(height, hidden, seed=i)) for i in range(2)]
    for _, scale in pairs:
        scale[1, 1], scale[2, 0] = 0, 200
    x = randn(5, hidden, seed=5) * 1e-6
    biases = [randn(height, seed=i + 20) for i in range(2)]
    index = torch.tensor([4, 3, 2, 1, 0, 0, 0], dtype=torch.int32)
    tiling = ProductTiling(16, 64, 64, warps=4, stages=2, swap=tiles == "left")
    out = products.grouped_product(
        x,
        addresses([weight for weight, _ in pairs]),
        offsets_of([2, 3]),
        torch.full((7, inter), math.nan),  # room for two more
        packed=MXFP4,
        scales=addresses([scale for _, scale in pairs]),
        gated=gated,
        index=index,
        biases=addresses(biases),
        expected=1,
        tiling=None if tiles == "rows" else tiling,
    )
    assert out[5:].isnan().all()
    for row in range(5):
        expected = MXFP4.restore(*pairs[int(row >= 2)]).double() @ x[4 - row].double()
        expected += biases[int(row >= 2)].double()
        if gated:
            expected = torch.nn.functional.silu(expected[:inter]) * expected[inter:]
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-8)


def test_the_gate_of_gpt_oss_is_found_and_is_transformers_own() -> None:
    config = GptOssConfig(hidden_size=8, intermediate_size=1100, num_local_experts=1)
    module = GptOssExperts(config)
    found = clamped_swiglu_of(module._apply_gate)
    assert found == (module.alpha, module.limit)
    pairs = randn(3, 2200, seed=3) * 5
    rows = torch.tensor([3], dtype=torch.int32)
    out = clamped_swiglu(pairs, rows, *found, programs=2)
    torch.testing.assert_close(out, module._apply_gate(pairs))
    assert clamped_swiglu_of(torch.nn.functional.silu) is None
    module.alpha += 0.1  # what a module says is tried
    module._apply_gate = types.MethodType(lambda self, x: x.chunk(2, -1)[0], module)
    assert clamped_swiglu_of(module._apply_gate) is None


@pytest.mark.parametrize("single", [True, False], ids=["one-program", "many-programs"])
def test_choices_are_sorted_by_slot_and_combined_by_token(
    single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "SINGLE", 4096 if single else 0)
    monkeypatch.setattr(routing, "_CHUNK", 32)
    tokens, topk, experts, valid = 33, 4, 10, 29
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(tokens, experts, generator=generator).topk(topk).indices
    ids[4, 2] = -1
    ids[7] = -1
    slot_of = torch.tensor([3, -1, 0, 5, 1, 2, 4, -1, 6, 7], dtype=torch.int32)
    found = routing.sort_by_slot(ids, slot_of, torch.tensor([valid], dtype=torch.int32), 9)

    slot = torch.where(ids >= 0, slot_of[ids], -1)
    slot[valid:] = -1
    counts = torch.bincount(slot[slot >= 0], minlength=9)
    assert found.offsets.tolist() == offsets_of(counts.tolist()).tolist()
    rows = found.row[slot >= 0]
    assert sorted(rows.tolist()) == list(range(int(counts.sum())))  # each row once
    assert (found.row[slot < 0] == -1).all()
    for t, k in (slot >= 0).nonzero().tolist():
        row = int(found.row[t, k])
        assert found.token[row] == t
        assert found.offsets[slot[t, k]] <= row < found.offsets[slot[t, k] + 1]

    y, weights = randn(tokens * topk, HIDDEN), randn(tokens, topk, seed=4)
    y[int(counts.sum()) :] = math.nan
    out = routing.combine(y, found.row, weights, torch.full((tokens, HIDDEN), math.nan))
    taken = torch.where((found.row >= 0)[..., None], y[found.row.long().clamp(0)], 0.0)
    torch.testing.assert_close(out, (taken * weights[..., None]).sum(1))


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 24), (2, 3000)], ids=str)
def test_rms_norm_is_the_one_of_the_cpu(shape: tuple[int, ...], early: bool) -> None:
    x, weight = randn(*shape), randn(shape[-1], seed=1)
    torch.testing.assert_close(
        norm.rms_norm(x, weight, 1e-5, early=early), ops.rms_norm(x, weight, 1e-5, early=early)
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 21},
    {"window": -21},
    {"softcap": 1.5},
    {"sinks": torch.tensor([2.0, -1.0, 0.0, 9.0, 0.5, -3.0])},
    {"sinks": torch.tensor([2.0, -1.0, 0.0, 9.0, 0.5, -3.0]), "window": 100, "softcap": 3.0},
]


class Sequences:
    """Sequences whose blocks lie scattered, with a cache for the CPU and one for the kernels."""

    def __init__(self, kv_heads: int, dims: tuple[int, int], block: int, longest: int) -> None:
        self.block, self.max_blocks = block, -(-longest // block)
        blocks = 3 * self.max_blocks + 2
        generator = torch.Generator().manual_seed(5)
        order = torch.randperm(blocks, generator=generator).int()
        self.tables = order[: 3 * self.max_blocks].view(3, self.max_blocks)
        shape = (blocks, block, kv_heads)
        # what no token has been written to must not be read
        self.caches = [[torch.full((*shape, d), math.nan) for d in dims] for _ in range(2)]
        self.dims, self.kv_heads, self.seed = dims, kv_heads, 0

    def step(self, begins: list[int], counts: list[int], **options: Any) -> tuple[Tensor, Tensor]:
        """(ours, the CPU's) of counts[s] tokens of each sequence, at begins[s] and on."""
        self.seed += 1
        sequences, tokens = len(counts), sum(counts)
        positions = [torch.arange(b, b + c) for b, c in zip(begins, counts, strict=True)]
        slots = torch.cat(
            [
                self.tables[s, p // self.block].long() * self.block + p % self.block
                for s, p in enumerate(positions)
            ]
        )
        query = randn(6, tokens, self.dims[0], seed=self.seed).transpose(0, 1)
        key = randn(tokens, self.kv_heads, self.dims[0], seed=self.seed + 20)
        value = randn(tokens, self.kv_heads, self.dims[1], seed=self.seed + 40)
        context = torch.tensor([b + c for b, c in zip(begins, counts, strict=True)])
        return tuple(  # type: ignore[return-value]
            attend(
                query,
                key,
                value,
                *caches,
                offsets_of(counts),
                context.int(),
                self.tables[:sequences].contiguous(),
                slots,
                scaling=0.3,
                **options,
            )
            for attend, caches in zip(
                (attention.paged_attention, ops.paged_attention), self.caches, strict=True
            )
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(("kv_heads", "dims", "block"), [(2, (24, 20), 5), (6, (16, 32), 16)])
def test_paged_attention_is_the_one_of_the_cpu(
    options: dict[str, Any], kv_heads: int, dims: tuple[int, int], block: int
) -> None:
    sequences = Sequences(kv_heads, dims, block, longest=300)
    steps = [([0, 0, 0], [150, 7, 1]), ([150, 7, 1], [1, 1, 1]), ([151, 8, 2], [30, 1, 6])]
    for begins, counts in steps:
        ours, expected = sequences.step(begins, counts, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(*sequences.caches, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_prefills_of_any_number_of_sequences_share_two_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What else they needed would be compiled while requests wait."""
    kernels: dict[str, set[Any]] = {"_attend_prompts": set(), "_merge_splits": set()}

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: kernels[self.name].add(tuple(constants.items()))

    for module, name in ((prompt_attention, "_attend_prompts"), (attention_parts, "_merge_splits")):
        monkeypatch.setattr(module, name, Launch(name))
    cache = torch.zeros(64, 16, 2, 16)
    for sequences, each, blocks in itertools.product((1, 2, 3, 17, 64), (2, 5, 40), (1, 3, 40)):
        tokens = sequences * each
        attention.attend(
            torch.zeros(tokens, 4, 16),
            cache,
            cache,
            torch.arange(sequences + 1, dtype=torch.int32) * each,
            torch.full((sequences,), each, dtype=torch.int32),
            torch.zeros(sequences, blocks, dtype=torch.int32),
            scaling=1.0,
        )
    assert len(kernels["_attend_prompts"]) == 2  # keys split among programs, or not
    assert len(kernels["_merge_splits"]) == 1


def test_a_sequence_of_padding_attends_to_nothing_and_writes_nothing() -> None:
    caches = [torch.full((4, 8, 2, 16), math.nan) for _ in range(2)]
    q, kv = randn(3, 4, 16), randn(3, 2, 16)
    out = attention.paged_attention(
        q,
        kv,
        kv,
        *caches,
        torch.arange(4, dtype=torch.int32),
        torch.tensor([1, 0, 0], dtype=torch.int32),
        torch.zeros(3, 2, dtype=torch.int32),
        torch.tensor([2, -1, -1]),
        scaling=0.3,
    )
    assert (out[1:] == 0).all()
    assert caches[0].isnan().sum() == caches[0].numel() - 2 * 16


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", [(1, 6, 2), (5, 128, 8), (300, 20, 3)], ids=str)
def test_a_router_takes_the_likeliest_experts(
    shape: tuple[int, int, int], normalised: bool
) -> None:
    tokens, experts, topk = shape
    logits = randn(tokens, experts)
    weights, ids = router.choose_experts(logits, topk, normalised=normalised, dtype=torch.float32)
    expected, expected_ids = logits.softmax(-1).topk(topk)
    if normalised:
        expected = expected / expected.sum(-1, keepdim=True)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("normed", [True, False])
def test_queries_and_keys_are_normed_turned_and_stored(normed: bool) -> None:
    tokens, heads, kv_heads, dim = 3, 6, 2, 24
    qkv = randn(tokens, heads + 2 * kv_heads, dim)
    angles = randn(tokens, dim // 2, seed=1)
    cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
    weights = (randn(dim, seed=2), randn(dim, seed=3))
    caches = [torch.full((2, 4, kv_heads, dim), math.nan) for _ in range(2)]
    slots = torch.tensor([5, -1, 2])
    query = rotary.rotate_and_store(
        qkv, cos, sin, slots, *caches, norms=weights if normed else None, eps=1e-6, early=True
    )

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        if normed:
            x = ops.rms_norm(x, weight, 1e-6, early=True)
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * cos[:, None] + half * sin[:, None]

    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    torch.testing.assert_close(query, turned(q, weights[0]))
    flat = [cache.view(8, kv_heads, dim) for cache in caches]
    keep = [0, 2]
    torch.testing.assert_close(flat[0][slots[keep]], turned(k, weights[1])[keep])
    assert torch.equal(flat[1][slots[keep]], v[keep])
    assert all(int(cache.isnan().all((1, 2)).sum()) == 6 for cache in flat)
