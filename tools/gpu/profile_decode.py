"""Where the time of a decode step goes: kernels of one replay, by their total time.

PYTHONPATH=src python tools/gpu/profile_decode.py [--layers 8] [--batch 1,64]
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch

from flexpert.bench.gpu.decode import single_rank
from flexpert.bench.gpu.decode_group import place_on
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.model_shapes import qwen3_30b_a3b

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", default="1,64")
    args = parser.parse_args()
    batches = [int(part) for part in args.batch.split(",")]
    model = RandomModel.build(
        qwen3_30b_a3b(args.layers), torch.device("cuda", 0), place=place_on(1)
    )
    with torch.inference_mode():
        ours = single_rank(model, batches, CONTEXT + 1, lambda _: None)
        for size in batches:
            batch = ours.batch_of([[7]] * size, CONTEXT)
            for _ in range(3):
                ours.runner.forward(batch)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                ours.runner.forward(batch)
                torch.cuda.synchronize()
            show(seen, size)


def show(seen: torch.profiler.profile, size: int) -> None:
    totals: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name].append(event.device_time)
    whole = sum(map(sum, totals.values()))
    print(f"batch {size}: {sum(map(len, totals.values()))} launches, {whole:.0f} us in kernels")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:24]:
        each = f"{len(times):4d} x {sum(times) / len(times):6.2f}"
        print(f"    {sum(times):8.1f} us  {each}  {name[:90]}")


if __name__ == "__main__":
    main()
