"""Times decode steps on this GPU: layers as few kernels, in several tilings, and by modules.

    PYTHONPATH=src python tools/gpu/tune_few_tokens.py [--layers 12] [--batch 1,2,64]
        [--context 512]

A random Qwen3-MoE of Qwen3-30B-A3B's shapes. Each way is compared with the layers as transformers'
modules launch them, and timed as replays of a captured step, all ways once and then all of them
again: a GPU's clock moves by more than many of them differ. Of logits that differ, a part is other
experts, chosen where two are about as likely; so much they differ between any two ways to round.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from flexpert.bench.gpu.decode import single_rank
from flexpert.bench.gpu.decode_group import place_on
from flexpert.bench.gpu.decode_rank import DecodeRank
from flexpert.bench.gpu.model import RandomModel
from flexpert.bench.model_shapes import qwen3_30b_a3b
from flexpert.kernels.cuda import dependents
from flexpert.kernels.cuda.few_tokens import MOST_TOKENS, FewTiling, FewTokens
from flexpert.kernels.cuda.some_tokens import SomeTiling, SomeTokens
from flexpert.models.step_graphs import GraphShape

TILINGS = [
    *(FewTiling(elements) for elements in (8192, 4096, 2048)),
    *(FewTiling(4096, keys, warps) for keys, warps in ((64, 4), (128, 4), (256, 8))),
]
SOME_TILINGS = [
    SomeTiling(),
    *(SomeTiling(64, 64, stages=12), SomeTiling(128, 128, stages=4), SomeTiling(fill=2)),
]
_TURNS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch", default="1,2,64")
    parser.add_argument("--context", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), flush=True)
    with torch.inference_mode():
        device = torch.device("cuda", 0)
        model = RandomModel.build(qwen3_30b_a3b(args.layers), device, place=place_on(1))
        batches = [int(part) for part in args.batch.split(",")]
        ours = single_rank(model, batches, args.context + 64, lambda _: None)
        layers = {
            m: vars(m)["forward"]
            for m in ours.runner._model.modules()
            if type(m).__name__.endswith("DecoderLayer") and "forward" in vars(m)
        }
        print(f"{len(layers)} layers of {args.layers} fused", flush=True)
        usual = next(iter(layers.values()))._usual
        for size in batches:
            few = size <= MOST_TOKENS
            kernels = [usual.few, ours.runtime.moe._few] if few else [usual.some]
            compare(ours, size, args.context, layers, kernels)


def compare(
    ours: DecodeRank,
    size: int,
    context: int,
    layers: dict[nn.Module, Callable[..., Tensor]],
    kernels: list[FewTokens | SomeTokens],
) -> None:
    tokens = torch.randint(0, ours.model.info.vocab, (size, 1)).tolist()
    batch = ours.batch_of(tokens, context)
    with unfused(layers), following(kernels, False):
        expected, _ = timed(ours, batch, size)
    tilings = TILINGS if size <= MOST_TOKENS else SOME_TILINGS
    ways = [("modules, no kernel begins early", None, False), ("modules", None, True)]
    ways += [(f"{tiling}, none begins early", tiling, False) for tiling in tilings[:1]]
    ways += [(str(tiling), tiling, True) for tiling in tilings]
    for _ in range(_TURNS):
        for name, tiling, early in ways:
            by_modules = contextlib.nullcontext() if tiling else unfused(layers)
            with by_modules, following(kernels, early):
                for one in kernels:
                    one._tiling = tiling or one._tiling
                try:
                    found, took = timed(ours, batch, size)
                except Exception as failure:  # noqa: BLE001 - what cannot be, is no candidate
                    print(f"  {name}: {type(failure).__name__} {str(failure)[:300]}", flush=True)
                    continue
            error = float((found - expected).norm() / expected.norm())
            print(f"batch {size}: {took:7.1f} us, error {error:.4f}  {name}", flush=True)
    for one in kernels:
        one._tiling = tilings[0] if isinstance(one, SomeTokens) else FewTiling()
    ours.runner.capture([GraphShape(size, size)], ours.width)
    advances(f"batch {size}", lambda: ours.runner.forward(batch))


@contextlib.contextmanager
def following(kernels: list[FewTokens | SomeTokens], early: bool) -> Iterator[None]:
    """early: kernels begin before the one in front has ended, as they do on Hopper."""
    real = dependents.follows
    every = [*kernels, *(one._attention for one in kernels if isinstance(one, SomeTokens))]

    def launch() -> None:
        for one in every:
            one._launched = dependents.following(torch.device("cuda", 0))

    if not early:
        dependents.follows = lambda device: False
    try:
        launch()
        yield
    finally:
        dependents.follows = real
        launch()


def advances(what: str, step: Callable[[], object]) -> None:
    """By kernel, how far the end of each is behind that of the one before: of kernels that begin
    early, durations say little."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    found = sorted(
        (event.time_range.end, event.name, event.device_time)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    steps: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (before, *_), (end, name, took) in itertools.pairwise(found):
        steps[name].append((end - before, took))
    print(f"{what}: mean advance (duration) in microseconds")
    for name, times in sorted(steps.items(), key=lambda item: -len(item[1])):
        if len(times) >= 10:
            advance, took = (statistics.median(part) for part in zip(*times, strict=True))
            print(f"    {len(times):4d} x {advance:6.2f} ({took:6.2f})  {name[:60]}", flush=True)


@contextlib.contextmanager
def unfused(layers: dict[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    for module in layers:
        del vars(module)["forward"]
    try:
        yield
    finally:
        for module, forward in layers.items():
            vars(module)["forward"] = forward


def timed(ours: DecodeRank, batch: object, size: int) -> tuple[Tensor, float]:
    """Logits of a step, and the median of its replays in microseconds."""
    ours.runner.graphs = None
    ours.runner.forward(batch)  # compiles
    torch.cuda.synchronize()
    ours.runner.capture([GraphShape(size, size)], ours.width)
    found = ours.runner.forward(batch).float().clone()
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        ours.runner.forward(batch)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return found, statistics.median(times)


if __name__ == "__main__":
    main()
