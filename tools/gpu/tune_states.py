"""Times the kernels of layers with a state: steps that decode, in several tilings, and prompts.

PYTHONPATH=src:tests python tools/gpu/tune_states.py [--batch 1,16,64,256] [--prompts 1,8,64]
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from support.state_cases import delta_case, space_case

from flexpert.bench.gpu.gpu_device import measure_gpu, replay_us
from flexpert.bench.statistics import SpreadUs
from flexpert.kernels.cuda import delta_rule, state_space
from flexpert.kernels.state_steps import StateRows

TILES = (2048, 4096, 8192)
WARPS = (2, 4, 8)
SCANNED = (512, 1024, 2048)  # of a prompt
LAYERS = 4  # of a replay, each with states of its own
ROWS = 2048  # of all prompts together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,16,64,256")
    parser.add_argument("--prompts", default="1,8,64", help=f"that have {ROWS} tokens together")
    parser.add_argument("--tilings", action="store_true", help="all of them, at the last batch")
    args = parser.parse_args()
    batches, prompts = (
        [int(part) for part in text.split(",")] for text in (args.batch, args.prompts)
    )
    gpu = measure_gpu(torch.device("cuda"))
    print(f"{gpu.name}: {gpu.bytes_per_s / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for name, module_ in (("delta rule", delta_rule), ("state space", state_space)):
            module: Any = module_
            usual = module._TILE, module._WARPS, module._SCANNED
            for batch in batches:
                show_decode(name, batch, gpu.bytes_per_s, "")
            for tile, warps in itertools.product(TILES, WARPS) if args.tilings else ():
                module._TILE, module._WARPS = tile, warps
                show_decode(name, batches[-1], gpu.bytes_per_s, f", tile {tile}, {warps} warps")
            for count in prompts:
                for tile in SCANNED if args.tilings else (usual[2],):
                    module._SCANNED = tile
                    show_prompts(name, count, tile)
            module._TILE, module._WARPS, module._SCANNED = usual


def show_decode(name: str, batch: int, rate: float, how: str) -> None:
    made = [prepared(name, batch) for _ in range(LAYERS)]
    moved = made[0][1]
    took = SpreadUs.of(replay_us([launch for launch, _ in made], repeat=10)).p50
    print(
        f"{name}, {batch} sequences{how}: {took:.1f} us, {moved / took / 1e6:.2f} TB/s, "
        f"{took * rate / moved / 1e6:.2f} of the limit"
    )


def show_prompts(name: str, count: int, tile: int) -> None:
    starts = torch.linspace(0, ROWS, count + 1).long().cuda()
    begins = starts[:-1].repeat_interleave(starts.diff())
    targets = torch.full_like(begins, -1)
    targets[starts[1:] - 1] = torch.arange(count, device="cuda")
    rows = StateRows(torch.full_like(begins, -1), targets, begins, starts)
    launch, _ = prepared(name, ROWS, rows, slots=count)
    took = SpreadUs.of(replay_us([launch], repeat=5)).p50
    print(f"{name}, {count} prompts of {ROWS // count}, tile {tile}: {took:.0f} us")


def prepared(
    name: str, count: int, rows: StateRows | None = None, slots: int | None = None
) -> tuple[Callable[[], object], float]:
    """A launch, and the bytes that a step which decodes reads and writes at least."""
    if name == "delta rule":
        inputs, of_rule, case = delta_case(count, slots=slots)
        launch: Callable[..., object] = functools.partial(
            delta_rule.gated_delta_rule, inputs, of_rule
        )
    else:
        projected, of_space, case = space_case(count, slots=slots)
        launch = functools.partial(state_space.state_space, projected, of_space)
    moved = 2.0 * count * (case.convolved[0].nbytes + case.states[0].nbytes)
    return functools.partial(launch, case.convolved, case.states, rows or case.rows), moved


if __name__ == "__main__":
    main()
