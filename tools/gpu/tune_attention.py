"""Times attention of prompts on this GPU in several tilings, beside torch's: what
`prompt_attention.choose` is made from.

    PYTHONPATH=src:tests python tools/gpu/tune_attention.py [--cases 512,2048,...] [--quick]

32 query heads, 4 key heads of 128, bf16; the cache is written before. A figure is the median of
replays of a graph; every result is compared with float64. Lines come as they are found.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu.test_kernels_on_gpu import attention_case, relative
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tune_experts import microseconds

from flexpert.kernels.cuda import attention, prompt_attention
from flexpert.kernels.cuda.prompt_attention import PromptTiling

HEADS, KV_HEADS, DIM = 32, 4, 128
SCALING = DIM**-0.5
CASES: dict[str, tuple[list[int], list[int]]] = {
    "512": ([0], [512]),
    "2048": ([0], [2048]),
    "4096": ([0], [4096]),
    "16 x 512": ([0] * 16, [512] * 16),
    "512 behind 4096": ([4096], [512]),
    "2048 behind 8192": ([8192], [2048]),
    "64 decode + 512": ([1000] * 64 + [0], [1] * 64 + [512]),
}
TILINGS = [
    PromptTiling(64, 64, 4, 2, by_hand=True),
    PromptTiling(64, 32, 4, 2, by_hand=True),
    PromptTiling(128, 64, 8, 2, by_hand=True),
    PromptTiling(64, 64, 4, 2),
    PromptTiling(128, 64, 8, 3),
]


def described(tiling: PromptTiling) -> str:
    shape = f"{tiling.rows}x{tiling.keys} w{tiling.warps}"
    if tiling.by_hand:
        return f"gluon {shape}"
    return f"triton {shape} s{tiling.stages}"


def reference(case: dict[str, Any], rows: int = 64) -> tuple[Tensor, Tensor]:
    """(which tokens, what they should be in float64): some of all."""
    starts = case["query_start"].tolist()
    tokens, results = [], []
    every = max(1, starts[-1] // rows)
    for s, length in enumerate(case["context_len"].tolist()):
        count = starts[s + 1] - starts[s]
        inside = torch.arange(0, count, every, device="cuda")
        inside = torch.cat([inside, torch.tensor([count - 1], device="cuda")])
        p = torch.arange(length, device="cuda")
        at = case["block_tables"][s, p // 16].long()
        k, v = (case[c][at, p % 16].double() for c in ("key_cache", "value_cache"))
        q = case["query"][starts[s] + inside].double().view(-1, KV_HEADS, HEADS // KV_HEADS, DIM)
        scores = torch.einsum("qhgd,khd->hgqk", q, k) * SCALING
        hidden = p[None] > (length - count + inside)[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        found = torch.einsum("hgqk,khd->qhgd", weights, v)
        results.append(found.reshape(-1, HEADS, DIM))
        tokens.append(starts[s] + inside)
    return torch.cat(tokens), torch.cat(results)


def median_us(launch: Callable[[], object]) -> float:
    return microseconds([launch] * 8)


def candidates(case: dict[str, Any], quick: bool) -> dict[str, Callable[[], Tensor]]:
    """What computes a case whose cache is written."""
    taken = (
        "query", "key_cache", "value_cache", "query_start", "context_len", "block_tables",
    )  # fmt: skip
    given = {name: case[name] for name in taken}
    ways: dict[str, Callable[[], Tensor]] = {}
    for tiling in TILINGS[:2] if quick else TILINGS:
        ways[described(tiling)] = lambda t=tiling: prompt_attention.attend_prompts(
            **given, scaling=SCALING, tiling=t
        )
    return ways


def library(name: str, case: dict[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """torch's attention over the same keys without pages."""
    begins, counts = CASES[name]
    if len(set(counts)) > 1:
        return {}
    keys, values = [], []
    for s, length in enumerate(case["context_len"].tolist()):
        p = torch.arange(length, device="cuda")
        at = case["block_tables"][s, p // 16].long()
        keys.append(case["key_cache"][at, p % 16])
        values.append(case["value_cache"][at, p % 16])
    count, length = counts[0], begins[0] + counts[0]
    q = case["query"].view(len(counts), count, HEADS, DIM).transpose(1, 2)
    k, v = (torch.stack(x).transpose(1, 2) for x in (keys, values))
    ways: dict[str, Callable[[], Tensor]] = {}
    if begins[0] == 0:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

            def sdpa(backend: SDPBackend = backend) -> Tensor:
                with sdpa_kernel(backend):
                    found = torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True, scale=SCALING
                    )
                return found.transpose(1, 2).reshape(-1, HEADS, DIM)

            ways[f"torch sdpa {backend.name}"] = sdpa
    packed_k, packed_v = torch.cat(keys), torch.cat(values)
    ends = torch.tensor([0, *[length] * len(counts)], device="cuda").cumsum(0).int()

    def varlen() -> Tensor:
        return torch.ops.aten._flash_attention_forward(
            case["query"], packed_k, packed_v, case["query_start"], ends, count, length, 0.0, True,
            False, scale=SCALING,
        )[0]  # fmt: skip

    ways["torch varlen flash"] = varlen
    return ways


def flops_of(name: str) -> float:
    pairs = sum(c * b + c * (c + 1) / 2 for b, c in zip(*CASES[name], strict=True))
    return 2 * 2 * HEADS * DIM * pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--quick", action="store_true", help="few tilings")
    options = parser.parse_args()
    torch.manual_seed(1)
    began = time.monotonic()
    warm = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    for _ in range(200):  # a GPU that idles has a slow clock
        warm @ warm
    del warm
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for name in options.cases.split(","):
        case = attention_case(*CASES[name], HEADS, KV_HEADS, (DIM, DIM))
        attention.write_cache(
            *(case[n] for n in ("key", "value", "key_cache", "value_cache", "slot_mapping"))
        )
        tokens, expected = reference(case)
        found: list[tuple[float, str]] = []
        for way, call in (library(name, case) | candidates(case, options.quick)).items():
            try:
                error = relative(call()[tokens], expected)
                if not error < 1e-2:
                    print(f"WRONG {name}: {way}: error {error:.2e}", flush=True)
                    continue
                again = relative(call()[tokens], expected)
                took = median_us(call)
            except Exception as failure:  # noqa: BLE001 - what cannot be, is no candidate
                print(f"{name}: {way}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
                continue
            found.append((took, f"{way}, error {error:.1e}{'' if again == error else ' MOVES'}"))
            print(f"    {name}: {took:8.1f} us {way}", flush=True)
        flops = flops_of(name)
        print(f"attention of {name}, {flops / 1e9:.1f} GFLOP ({time.monotonic() - began:.0f} s):")
        for took, label in sorted(found):
            print(f"  {took:9.1f} us {flops / took / 1e6:6.0f} TFLOP/s  {label}", flush=True)


if __name__ == "__main__":
    main()
