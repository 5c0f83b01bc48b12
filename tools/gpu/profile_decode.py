"""Where the time of a decode step goes: kernels of one replay, by their total time.

PYTHONPATH=src python tools/gpu/profile_decode.py [--layers 8] [--batch 1,64]
    [--shape qwen3-next | --gpt-oss none,mxfp4]
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from flexpert.bench.formats.format_model import DenseModel, FormatModel, gpt_oss_20b
from flexpert.bench.formats.format_run import decode_batch
from flexpert.bench.gpu.decode import single_rank
from flexpert.bench.gpu.decode_group import place_on
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.model_shapes import DECODE_SHAPES

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", default="1,64")
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(DECODE_SHAPES))
    parser.add_argument("--gpt-oss", metavar="FORMATS", help="gpt-oss-20b's shapes instead")
    args = parser.parse_args()
    batches = [int(part) for part in args.batch.split(",")]
    with torch.inference_mode():
        if args.gpt_oss:
            profile_gpt_oss(args.layers, batches, args.gpt_oss.split(","))
        else:
            profile_shape(args.shape, args.layers, batches)


def profile_shape(shape: str, layers: int, batches: list[int]) -> None:
    config = DECODE_SHAPES[shape].config(layers)
    model = RandomModel.build(config, torch.device("cuda", 0), place=place_on(1))
    ours = single_rank(model, batches, CONTEXT + 1, lambda _: None)
    for size in batches:
        batch = ours.batch_of([[7]] * size, CONTEXT)
        profile(f"batch {size}", lambda batch=batch: ours.runner.forward(batch))


def profile_gpt_oss(layers: int, batches: list[int], formats: list[str]) -> None:
    dense = DenseModel.draw(gpt_oss_20b(layers), torch.device("cuda", 0), 0)
    for name in formats:
        for size in batches:
            with contextlib.ExitStack() as closing:
                model = FormatModel(dense, name, size, CONTEXT + 1, closing)
                batch = decode_batch(model, torch.full((size,), 7), CONTEXT)
                profile(
                    f"gpt-oss in {name}, batch {size}",
                    lambda model=model, batch=batch: model.runner.forward(batch),
                )


def profile(what: str, step: Callable[[], object]) -> None:
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    took = (time.perf_counter() - began) / 20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    show(seen, f"{what}: a step of {took * 1e6:.0f} us")


def show(seen: torch.profiler.profile, what: str) -> None:
    totals: dict[str, list[float]] = defaultdict(list)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name].append(event.device_time)
    whole = sum(map(sum, totals.values()))
    print(f"{what}, {sum(map(len, totals.values()))} launches, {whole:.0f} us in kernels")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:24]:
        each = f"{len(times):4d} x {sum(times) / len(times):6.2f}"
        print(f"    {sum(times):8.1f} us  {each}  {name[:90]}")


if __name__ == "__main__":
    main()
