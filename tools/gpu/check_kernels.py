"""Compares the kernels of `flexpert.moe.cuda` with float32 torch on this GPU, and times attention.

    PYTHONPATH=src python tools/gpu/check_kernels.py

Exit status 1 if one computes something else.
"""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from flexpert.kernels.cuda import attention, norm
from flexpert.kernels.cuda import row_sorting as routing

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
        if window := options.get("window"):
            seen &= p[None] > position - window
        scores = scores.masked_fill(~seen, -math.inf)
        if (sinks := options.get("sinks")) is not None:
            extra = sinks.float()[:, None, None].expand(-1, q.shape[0], 1)
            scores = torch.cat([scores, extra], -1)
        weights = scores.softmax(-1)[..., :length]
        results.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(results)


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.float() - expected.float()).norm() / expected.float().norm())


def check_attention() -> bool:
    good = True
    sinks = torch.randn(32, device="cuda", dtype=torch.bfloat16)
    plans = {
        "decode": ([700, 3, 64, 1023], [1, 1, 1, 1]),
        "decode one": ([5000], [1]),
        "prefill": ([0, 0, 33], [700, 1, 500]),
        "mixed": ([512, 100, 0], [1, 1, 777]),
    }
    for heads, kv_heads, dims in ((32, 4, (128, 128)), (32, 32, (192, 128)), (24, 8, (64, 64))):
        for name, (begins, counts) in plans.items():
            for extra in ({}, {"window": 100}, {"softcap": 20.0}, {"sinks": sinks[:heads]}):
                options = {"scaling": dims[0] ** -0.5, **extra}
                case = attention_case(begins, counts, heads, kv_heads, dims)
                error = relative(
                    attention.paged_attention(**case, **options), attention_reference(case, options)
                )
                if not error < 1e-2:
                    good = False
                    print(f"WRONG attention {name} {heads}/{kv_heads} {dims} {extra}: {error}")
    print("attention: all right" if good else "attention: WRONG")
    return good


def time_attention() -> None:
    for sequences, context in ((1, 512), (1, 4096), (16, 512), (64, 512), (64, 4096), (256, 512)):
        cases = [
            attention_case([context - 1] * sequences, [1] * sequences, 32, 4, (128, 128))
            for _ in range(4)
        ]
        moved = sequences * context * 4 * 256 * 2
        time = replay([lambda c=c: attention.paged_attention(**c, scaling=0.1) for c in cases])
        rate = f"{moved / time / 1e6:.2f} TB/s"
        print(f"attention decode {sequences} x {context}: {time:.1f} us, {rate}")
    for count in (512, 2048, 4096):
        case = attention_case([0], [count], 32, 4, (128, 128))
        time = replay([lambda: attention.paged_attention(**case, scaling=0.1)])
        flops = 2 * 2 * 32 * 128 * count * count / 2
        q, k, v = (case[n].transpose(0, 1)[None] for n in ("query", "key", "value"))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        library = replay([lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)])
        print(
            f"attention prefill {count}: {time:.1f} us, {flops / time / 1e6:.0f} TFLOP/s; torch "
            f"sdpa {library:.1f} us"
        )


def replay(launches: list[Any]) -> float:
    """Median microseconds of a launch in replays of a graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            for launch in launches:
                launch()
    graph.replay()
    times = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches) / 4)
    return statistics.median(times)


def check_small() -> bool:
    """Norms, sorting and combining."""
    good = True
    for shape in ((64, 2048), (7, 32, 128), (3, 7168)):
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(shape[-1], device="cuda", dtype=torch.bfloat16)
        expected = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        expected = expected.bfloat16() * w
        good &= relative(norm.rms_norm(x, w, 1e-6, early=True), expected) < 1e-2
    experts, topk, hidden = 128, 8, 2048
    slot_of = torch.randperm(experts, device="cuda").int()
    for tokens in (1, 3, 64, 512, 513, 4096):
        ids = torch.rand(tokens, experts, device="cuda").topk(topk).indices
        counted = max(1, tokens - 2)
        valid = torch.tensor([counted], dtype=torch.int32, device="cuda")
        found = routing.sort_by_slot(ids, slot_of, valid, experts)
        slots = slot_of[ids[:counted]].long()
        counts = torch.bincount(slots.flatten(), minlength=experts)
        good &= torch.equal(found.offsets[1:].long(), counts.cumsum(0))
        row = found.row[:counted].long()
        good &= bool((found.offsets[slots] <= row).all() and (row < found.offsets[slots + 1]).all())
        good &= row.flatten().unique().numel() == counted * topk
        good &= torch.equal(
            found.token[row.flatten()].long(),
            torch.arange(counted, device="cuda").repeat_interleave(topk),
        )
        y = torch.randn(tokens * topk, hidden, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, topk, device="cuda")
        out = torch.full((tokens, hidden), math.nan, device="cuda", dtype=torch.bfloat16)
        routing.combine(y, found.row, weights, out)
        expected = (y[row].float() * weights[:counted, :, None]).sum(1)
        good &= relative(out[:counted], expected) < 1e-2
        good &= bool((out[counted:] == 0).all())
        sort = replay([lambda: routing.sort_by_slot(ids, slot_of, valid, experts)])
        gather = replay([lambda: routing.combine(y, found.row, weights, out)])
        print(f"{tokens} tokens: sort {sort:.1f} us, combine {gather:.1f} us")
    print("norm, sort, combine: " + ("all right" if good else "WRONG"))
    return good


def main() -> None:
    torch.manual_seed(1)
    print(torch.cuda.get_device_name())
    good = check_small()
    good &= check_attention()
    time_attention()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
