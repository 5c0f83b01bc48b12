"""The kernels on a GPU against float32 torch, at sizes that the interpreter is too slow for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flexpert.kernels.cuda import attention, mxfp4_few, norm, prompt_attention
from flexpert.kernels.cuda import grouped_products as products
from flexpert.kernels.cuda import row_sorting as routing
from flexpert.kernels.cuda.few_tokens import FewTokens
from flexpert.kernels.cuda.mxfp4_few import FewRowsTiling
from flexpert.kernels.cuda.prompt_attention import PromptTiling
from flexpert.kernels.cuda.rotary import rotate_and_store
from flexpert.kernels.weight_formats import FP8, MXFP4, WeightFormat

BLOCK = 16


def attention_case(
    begins: list[int], counts: list[int], heads: int, kv_heads: int, dims: tuple[int, int]
) -> dict[str, Any]:
    """Arguments of `paged_attention` for sequences that have begins[s] tokens in the cache."""
    lengths = [b + c for b, c in zip(begins, counts, strict=True)]
    most = max(-(-n // BLOCK) for n in lengths)
    blocks = most * len(counts) + 1
    tables = torch.randperm(blocks, device="cuda")[: most * len(counts)].int()
    tables = tables.view(len(counts), most)
    caches = [
        torch.randn(blocks, BLOCK, kv_heads, d, device="cuda", dtype=torch.bfloat16) for d in dims
    ]
    tokens = sum(counts)
    slots = []
    for s, (b, c) in enumerate(zip(begins, counts, strict=True)):
        p = torch.arange(b, b + c, device="cuda")
        slots.append(tables[s, p // BLOCK].long() * BLOCK + p % BLOCK)

    def randn(n: int, d: int) -> Tensor:
        return torch.randn(tokens, n, d, device="cuda", dtype=torch.bfloat16)

    return {
        "query": randn(heads, dims[0]),
        "key": randn(kv_heads, dims[0]),
        "value": randn(kv_heads, dims[1]),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "query_start": torch.tensor([0, *counts], device="cuda").cumsum(0).int(),
        "context_len": torch.tensor(lengths, device="cuda").int(),
        "block_tables": tables,
        "slot_mapping": torch.cat(slots),
    }


def attention_reference(case: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """After a call that has written the cache: softmax attention in float32, one by one."""
    results = []
    starts = case["query_start"].tolist()
    for s, length in enumerate(case["context_len"].tolist()):
        q = case["query"][starts[s] : starts[s + 1]].float()
        p = torch.arange(length, device="cuda")
        at = case["block_tables"][s, p // BLOCK].long()
        k, v = (case[c][at, p % BLOCK].float() for c in ("key_cache", "value_cache"))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * options["scaling"]
        if cap := options.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        position = torch.arange(length - q.shape[0], length, device="cuda")[:, None]
        seen = p[None] <= position
        window = options.get("window", 0)
        if window > 0:
            seen &= p[None] > position - window
        elif window < 0:
            seen &= p[None] // -window == position // -window
        scores = scores.masked_fill(~seen, -math.inf)
        if (sinks := options.get("sinks")) is not None:
            extra = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., :length]
        results.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(results)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


SHAPES = ((32, 4, (128, 128)), (32, 32, (192, 128)), (24, 8, (64, 64)))
# tokens in the cache before, and of this step, of each sequence
BATCHES = {
    "decode": ([700, 3, 64, 1023], [1, 1, 1, 1]),
    "decode one": ([5000], [1]),
    "prefill": ([0, 0, 33], [700, 1, 500]),
    "mixed": ([512, 100, 0], [1, 1, 777]),
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 100},
    "chunks": {"window": -100},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}/{shape[1]}")
def test_paged_attention(shape: tuple[int, int, tuple[int, int]], batch: str, extra: str) -> None:
    heads, kv_heads, dims = shape
    options = {"scaling": dims[0] ** -0.5, **EXTRAS[extra]}
    if "sinks" in options:
        options["sinks"] = torch.randn(heads, device="cuda", dtype=torch.bfloat16)
    case = attention_case(*BATCHES[batch], heads, kv_heads, dims)
    ours = attention.paged_attention(**case, **options)
    assert relative(ours, attention_reference(case, options)) < 1e-2


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("batch", ["prefill", "mixed", "long"])
@pytest.mark.parametrize(
    "tiling",
    [
        PromptTiling(64, 64, 4, 2, by_hand=True),
        PromptTiling(128, 128, 8, 2, by_hand=True),
        PromptTiling(64, 64, 4, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape", [SHAPES[0], SHAPES[2]], ids=lambda shape: f"{shape[0]}/{shape[1]}"
)
def test_attention_of_prompts_in_tilings(
    shape: tuple[int, int, tuple[int, int]], tiling: PromptTiling, batch: str, extra: str
) -> None:
    """What lies behind the keys of a sequence is not a number, and must not be looked at."""
    heads, kv_heads, dims = shape
    options = {"scaling": dims[0] ** -0.5, **EXTRAS[extra]}
    if "sinks" in options:
        options["sinks"] = torch.randn(heads, device="cuda", dtype=torch.bfloat16)
    case = attention_case(*BATCHES.get(batch, ([3000], [100])), heads, kv_heads, dims)
    unused = torch.ones(case["key_cache"].shape[:2], dtype=torch.bool, device="cuda")
    for s, length in enumerate(case["context_len"].tolist()):
        p = torch.arange(length, device="cuda")
        unused[case["block_tables"][s, p // BLOCK].long(), p % BLOCK] = False
    caches = [case[name] for name in ("key_cache", "value_cache")]
    for cache in caches:
        cache[unused] = math.nan
    new = [case.pop(name) for name in ("key", "value")]
    attention.write_cache(*new, *caches, case.pop("slot_mapping"))
    ours = prompt_attention.attend_prompts(**case, **options, tiling=tiling)
    assert relative(ours, attention_reference(case, options)) < 1e-2


@pytest.mark.parametrize("shape", [(64, 2048), (7, 32, 128), (3, 7168)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(shape[-1], device="cuda", dtype=torch.bfloat16)
    expected = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert relative(norm.rms_norm(x, w, 1e-6, early=True), expected.bfloat16() * w) < 1e-2


@pytest.mark.parametrize("tokens", [1, 3, 64, 512, 513, 4096])
def test_rows_are_sorted_by_slot_and_summed_back(tokens: int) -> None:
    experts, topk, hidden = 128, 8, 2048
    slot_of = torch.randperm(experts, device="cuda").int()
    ids = torch.rand(tokens, experts, device="cuda").topk(topk).indices
    counted = max(1, tokens - 2)
    valid = torch.tensor([counted], dtype=torch.int32, device="cuda")
    found = routing.sort_by_slot(ids, slot_of, valid, experts)
    slots = slot_of[ids[:counted]].long()
    counts = torch.bincount(slots.flatten(), minlength=experts)
    assert torch.equal(found.offsets[1:].long(), counts.cumsum(0))
    row = found.row[:counted].long()
    assert (found.offsets[slots] <= row).all()
    assert (row < found.offsets[slots + 1]).all()
    assert row.flatten().unique().numel() == counted * topk
    assert torch.equal(
        found.token[row.flatten()].long(),
        torch.arange(counted, device="cuda").repeat_interleave(topk),
    )
    y = torch.randn(tokens * topk, hidden, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(tokens, topk, device="cuda")
    out = torch.full((tokens, hidden), math.nan, device="cuda", dtype=torch.bfloat16)
    routing.combine(y, found.row, weights, out)
    expected = (y[row].float() * weights[:counted, :, None]).sum(1)
    assert relative(out[:counted], expected) < 1e-2
    assert (out[counted:] == 0).all()


@pytest.mark.parametrize("each", [1, 2, 3, 16, 100], ids="{} rows an expert".format)
@pytest.mark.parametrize("packed", [None, FP8, MXFP4], ids=["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_products_are_those_of_the_weights_that_a_cpu_dequantizes(
    gated: bool, packed: WeightFormat | None, each: int
) -> None:
    """gpt-oss-20b's sizes, bf16 rows; the reference is float64."""
    slots, hidden, inter = 3, 2880, 2880
    height = 2 * inter if gated else inter
    whole = [torch.randn(height, hidden).bfloat16() / 50 for _ in range(slots)]
    weights, scales = [w.cuda() for w in whole], None
    if packed is not None:
        pairs = [packed.quantize(weight) for weight in whole]
        whole = [packed.restore(*pair).bfloat16() for pair in pairs]
        weights = [pair[0].cuda() for pair in pairs]
        scales = [pair[1].cuda() for pair in pairs]
    biases = [torch.randn(height).bfloat16().cuda() for _ in range(slots)]
    x = torch.randn(slots * each, hidden).bfloat16()
    out = products.grouped_product(
        x.cuda(),
        addresses(weights),
        torch.arange(slots + 1, dtype=torch.int32).cuda() * each,
        torch.empty(slots * each, inter, dtype=torch.bfloat16, device="cuda"),
        packed=packed,
        scales=None if scales is None else addresses(scales),
        biases=addresses(biases),
        gated=gated,
    )
    for slot in range(slots):
        rows = slice(slot * each, (slot + 1) * each)
        expected = x[rows].cuda().double() @ whole[slot].cuda().double().t()
        expected += biases[slot].double()
        if gated:
            expected = torch.nn.functional.silu(expected[:, :inter]) * expected[:, inter:]
        error = (out[rows].double() - expected).norm() / expected.norm()
        assert float(error) < 5e-3


@pytest.mark.parametrize("tiling", [FewRowsTiling(2, 1), FewRowsTiling(4, 2)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["product", "gated"])
def test_few_rows_of_an_expert_take_its_mxfp4_weights_as_they_lie(
    gated: bool, tiling: FewRowsTiling
) -> None:
    """Experts with up to 19 rows, some with none; sizes that fill no tile; scales of all sizes."""
    counts = [1, 0, 8, 19, 3, 0, 2, *([0] * 32), 5]
    hidden, inter = 32 * 19, 72
    height = 2 * inter if gated else inter
    codes = [torch.randint(0, 256, (height, hidden // 2), dtype=torch.uint8) for _ in counts]
    scales = [torch.randint(110, 140, (height, hidden // 32), dtype=torch.uint8) for _ in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    rows = int(offsets[-1])
    x = torch.randn(rows, hidden).bfloat16()
    index = torch.randperm(rows)
    biases = [torch.randn(height).bfloat16() for _ in counts]
    out = torch.full((rows + 3, inter), math.nan, dtype=torch.bfloat16, device="cuda")
    on_gpu = [[t.cuda() for t in tensors] for tensors in (codes, scales, biases)]
    mxfp4_few.few_rows_product(
        x.cuda(),
        addresses(on_gpu[0]),
        addresses(on_gpu[1]),
        offsets.int().cuda(),
        out,
        index=index.int().cuda(),
        biases=addresses(on_gpu[2]),
        gated=gated,
        launched=rows,
        tiling=tiling,
    )
    assert out[rows:].isnan().all()
    for slot, count in enumerate(counts):
        if count:
            part = slice(int(offsets[slot]), int(offsets[slot + 1]))
            whole = MXFP4.restore(codes[slot], scales[slot]).double()
            expected = x[index[part]].double() @ whole.t() + biases[slot].double()
            if gated:
                expected = torch.nn.functional.silu(expected[:, :inter]) * expected[:, inter:]
            error = (out[part].cpu().double() - expected).norm() / expected.norm()
            assert float(error) < 5e-3


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_layer_of_few_tokens_as_kernels_that_begin_early(tokens: int) -> None:
    """Captured and replayed, with weights of several layers, so that one that read too early what
    another writes would be seen; sizes of Qwen3-30B-A3B."""
    hidden, heads, kv_heads, dim, experts, topk, inter = 2048, 32, 4, 128, 128, 8, 768
    layers, width = 3, 40
    bf16 = torch.bfloat16
    few = FewTokens(torch.device("cuda"))
    lengths = torch.tensor([513, 1, 640, 77][:tokens], dtype=torch.int32, device="cuda")
    tables = torch.randperm(tokens * width, device="cuda").view(tokens, width).int()
    last = (lengths - 1).long()
    slots = tables.gather(1, (last // BLOCK)[:, None])[:, 0].long() * BLOCK + last % BLOCK
    angles = torch.rand(tokens, dim, device="cuda") * 6
    cos, sin = angles.cos().to(bf16), angles.sin().to(bf16)
    slot_of = torch.randperm(experts, device="cuda").int()
    valid = torch.tensor([tokens], dtype=torch.int32, device="cuda")

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(bf16)

    every = [
        {
            "qkv": randn((heads + 2 * kv_heads) * dim, hidden, scale=hidden**-0.5),
            "o": randn(hidden, heads * dim, scale=(heads * dim) ** -0.5),
            "router": randn(experts, hidden, scale=4 * hidden**-0.5),
            "norm": torch.rand(hidden, device="cuda").to(bf16) + 0.5,
            "head": torch.rand(dim, device="cuda").to(bf16) + 0.5,
            "up": randn(experts, 2 * inter, hidden, scale=hidden**-0.5),
            "down": randn(experts, hidden, inter, scale=inter**-0.5),
            "cache": randn(2, tokens * width, BLOCK, kv_heads, dim),
        }
        for _ in range(layers)
    ]
    order = slot_of.argsort()
    addresses = [
        [
            torch.tensor([layer[name][e].data_ptr() for e in order.tolist()], device="cuda")
            for name in ("up", "down")
        ]
        for layer in every
    ]
    x = randn(tokens, hidden)

    def norm_of(layer: dict[str, Tensor]) -> tuple[Tensor, float, bool]:
        return layer["norm"], 1e-6, True

    def ours() -> list[Tensor]:
        given, found = x, []
        for layer, (up, down) in zip(every, addresses, strict=True):
            qkv = few.project(given, layer["qkv"], norm=norm_of(layer))
            attended = few.attend(
                *(qkv.view(tokens, -1, dim), cos, sin, slots, *layer["cache"], lengths, tables),
                norms=(layer["head"], layer["head"]), eps=1e-6, early=True, scaling=dim**-0.5,
            )  # fmt: skip
            between = few.project(attended, layer["o"], residual=given)
            normed, weights, ids = few.route(
                between, norm_of(layer), layer["router"], None, topk, normalised=True, dtype=bf16
            )
            given = few.experts(normed, ids, weights, slot_of, valid, up, down, inter, between)
            found += [qkv, attended, between, ids, given]
        return found

    ours()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ours()
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()

    starts = torch.arange(tokens + 1, device="cuda").int()
    given = x
    for index, layer in enumerate(every):  # each from what ours gave before
        qkv, attended, between, ids, after = outputs[5 * index : 5 * index + 5]
        rounded = norm.rms_norm(given, *norm_of(layer)[:2], early=True)
        close(qkv, rounded.float() @ layer["qkv"].float().T)
        query = rotate_and_store(
            *(qkv.view(tokens, -1, dim), cos, sin, slots, *layer["cache"]),
            norms=(layer["head"], layer["head"]), eps=1e-6, early=True,
        )  # fmt: skip
        expected = attention.attend(
            query, *layer["cache"], starts, lengths, tables, scaling=dim**-0.5
        )
        close(attended, expected.flatten(1).float())
        close(between, given.float() + attended.float() @ layer["o"].float().T)
        normed = norm.rms_norm(between, *norm_of(layer)[:2], early=True)
        likely = (normed.float() @ layer["router"].float().T).softmax(-1)
        chosen = likely.gather(1, ids)
        assert float(chosen.min(1).values.div(likely.topk(topk).values[:, -1]).min()) > 0.97
        expected = between.float()
        for token in range(tokens):
            for expert, weight in zip(ids[token], chosen[token] / chosen[token].sum(), strict=True):
                gate, raised = (layer["up"][expert].float() @ normed[token].float()).chunk(2)
                inner = (gate * gate.sigmoid() * raised).to(bf16).float()
                expected[token] += weight * (layer["down"][expert].float() @ inner)
        close(after, expected)
        given = after


def close(ours: Tensor, expected: Tensor) -> None:
    """But for rounding, row by row."""
    difference = (ours.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(difference.max()) < 2e-2, difference.tolist()
