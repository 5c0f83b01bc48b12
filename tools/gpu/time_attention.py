"""Times paged attention on this GPU, decode steps and prompts, against torch's, and decode steps
over latents at DeepSeek-V3's shapes in several tilings.

PYTHONPATH=src:tests python tools/gpu/time_attention.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu.test_kernels_on_gpu import attention_case
from gpu.test_latents_on_gpu import Cache, randn

from flexpert.bench.gpu.gpu_device import replay_us
from flexpert.kernels.cuda import absorbed_attention, attention
from flexpert.kernels.cuda.absorbed_attention import LatentTiling

TILINGS = [
    LatentTiling(heads, keys, warps, stages, fill)
    for heads, keys, warps, stages, fill in (
        (64, 32, 8, 3, 1),
        (64, 32, 8, 2, 1),
        (64, 64, 8, 2, 1),
        (64, 16, 8, 4, 1),
        (32, 32, 8, 3, 1),
        (32, 64, 8, 2, 1),
        (16, 32, 4, 3, 2),
    )
]


def time_attention() -> None:
    for sequences, context in ((1, 512), (1, 4096), (16, 512), (64, 512), (64, 4096), (256, 512)):
        cases = [
            attention_case([context - 1] * sequences, [1] * sequences, 32, 4, (128, 128))
            for _ in range(4)
        ]
        moved = sequences * context * 4 * 256 * 2
        time = _median([lambda c=c: attention.paged_attention(**c, scaling=0.1) for c in cases])
        rate = f"{moved / time / 1e6:.2f} TB/s"
        print(f"attention decode {sequences} x {context}: {time:.1f} us, {rate}")
    for count in (512, 2048, 4096):
        case = attention_case([0], [count], 32, 4, (128, 128))
        time = _median([lambda: attention.paged_attention(**case, scaling=0.1)])
        flops = 2 * 2 * 32 * 128 * count * count / 2
        q, k, v = (case[n].transpose(0, 1)[None] for n in ("query", "key", "value"))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        library = _median([lambda: sdpa(q, k, v, is_causal=True, enable_gqa=True)])
        print(
            f"attention prefill {count}: {time:.1f} us, {flops / time / 1e6:.0f} TFLOP/s; torch "
            f"sdpa {library:.1f} us"
        )


def time_latents() -> None:
    heads, rank, rope = 128, 512, 64
    for sequences, context in ((1, 512), (1, 4096), (16, 4096), (64, 4096)):
        cache = Cache([context] * sequences)
        query, rotary = randn(heads, sequences, rank), randn(heads, sequences, rope)
        starts = torch.arange(sequences + 1, dtype=torch.int32, device="cuda")
        flops = 2 * sequences * context * heads * (2 * rank + rope)
        chosen = absorbed_attention.choose(heads, rank, decode=True, dtype=torch.bfloat16)
        for tiling in TILINGS:
            time = _median(
                [
                    lambda t=tiling: absorbed_attention.attend_latents(
                        query,
                        rotary,
                        cache.memory,
                        starts,
                        cache.contexts,
                        cache.tables,
                        scaling=0.1,
                        decode=True,
                        tiling=t,
                    )
                ]
            )
            print(
                f"latents {sequences} x {context}, {tiling.heads} heads x {tiling.keys} keys, "
                f"{tiling.warps} warps, {tiling.stages} stages: {time:.1f} us, "
                f"{flops / time / 1e6:.0f} TFLOP/s{'  (chosen)' if tiling == chosen else ''}"
            )


def _median(launches: list[Callable[[], object]]) -> float:
    times = sorted(replay_us(launches, repeat=9))
    return times[len(times) // 2]


if __name__ == "__main__":
    torch.manual_seed(1)
    print(torch.cuda.get_device_name())
    time_attention()
    time_latents()
