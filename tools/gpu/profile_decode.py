"""Where the time of a decode step goes: kernels of replays, by how far they move its end.

Of kernels that begin before the one in front has ended, durations say little: so what counts is the
*advance*, how far the end of each is behind the latest end before it. *gap*: the part of it in
which no kernel ran.

PYTHONPATH=src python tools/gpu/profile_decode.py [--layers 8] [--batch 1,64]
    [--shape qwen3-next | --gpt-oss none,mxfp4]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
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
_REPLAYS = 7


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
        for _ in range(_REPLAYS):
            step()
            torch.cuda.synchronize()
    show(seen, f"{what}: a step of {took * 1e6:.0f} us")


def show(seen: torch.profiler.profile, what: str) -> None:
    """Of `_REPLAYS` steps, each of the same kernels."""
    events = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    each = len(events) // _REPLAYS
    if each * _REPLAYS != len(events):
        raise RuntimeError(f"{len(events)} launches in {_REPLAYS} steps")
    rows: list[list[tuple[float, float, float]]] = [[] for _ in range(each)]
    for begin in range(0, len(events), each):
        latest = events[begin][0]
        for at, (start, end, _) in enumerate(events[begin : begin + each]):
            gap = max(0.0, start - latest)
            rows[at].append((max(0.0, end - latest), gap, end - start))
            latest = max(latest, end)
    names = [name for _, _, name in events[:each]]
    middle = [tuple(statistics.median(part) for part in zip(*row, strict=True)) for row in rows]
    span, gaps, busy = (sum(part) for part in zip(*middle, strict=True))
    print(f"{what}, {each} launches, {span:.0f} us of which {gaps:.0f} are gaps")
    print(f"    {busy:.0f} us in kernels; advance (gap, duration) of each:", flush=True)
    totals: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for name, found in zip(names, middle, strict=True):
        totals[name].append(found)
    for name, times in sorted(totals.items(), key=lambda item: -sum(t[0] for t in item[1]))[:24]:
        advance, gap, took = (sum(part) / len(times) for part in zip(*times, strict=True))
        print(
            f"    {advance * len(times):8.1f} us  {len(times):4d} x {advance:6.2f} "
            f"({gap:5.2f}, {took:6.2f})  {name[:90]}"
        )


if __name__ == "__main__":
    main()
