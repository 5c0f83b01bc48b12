"""Times the kernels of layers with a state, one token of each sequence, in several tilings.

PYTHONPATH=src:tests python tools/gpu/tune_states.py [--batch 1,16,64,256]
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from support.state_cases import StateCase, delta_case, space_case

from flexpert.bench.gpu.gpu_device import measure_gpu, replay_us
from flexpert.bench.statistics import SpreadUs
from flexpert.kernels.cuda import delta_rule, state_space
from flexpert.kernels.cuda.delta_rule import decode_delta_rule
from flexpert.kernels.cuda.state_space import decode_state_space

TILES = (1024, 2048, 4096, 8192)
WARPS = (2, 4, 8)
LAYERS = 4  # of a replay, each with states of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,16,64,256")
    parser.add_argument("--tilings", action="store_true", help="all of them, at the last batch")
    args = parser.parse_args()
    batches = [int(part) for part in args.batch.split(",")]
    gpu = measure_gpu(torch.device("cuda"))
    print(f"{gpu.name}: {gpu.bytes_per_s / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for name, module_ in (("delta rule", delta_rule), ("state space", state_space)):
            module: Any = module_
            usual = module._TILE, module._WARPS
            for batch in batches:
                show(name, batch, gpu.bytes_per_s, "")
            for tile, warps in itertools.product(TILES, WARPS) if args.tilings else ():
                module._TILE, module._WARPS = tile, warps
                show(name, batches[-1], gpu.bytes_per_s, f", tile {tile}, {warps} warps")
            module._TILE, module._WARPS = usual


def show(name: str, batch: int, rate: float, how: str) -> None:
    launches, moved = prepared(name, batch)
    took = SpreadUs.of(replay_us(launches, repeat=10)).p50
    print(
        f"{name}, {batch} sequences{how}: {took:.1f} us, {moved / took / 1e6:.2f} TB/s, "
        f"{took * rate / moved / 1e6:.2f} of the limit"
    )


def prepared(name: str, batch: int) -> tuple[list[Callable[[], object]], float]:
    """Launches, and the bytes that one reads and writes at least."""
    launches: list[Callable[[], object]] = []
    moved = 0.0
    for _ in range(LAYERS):
        if name == "delta rule":
            inputs, of_rule, case = delta_case(batch)
            launches.append(functools.partial(decode_delta_rule, inputs, of_rule, *tensors(case)))
        else:
            projected, of_space, case = space_case(batch)
            launch = functools.partial(decode_state_space, projected, of_space, *tensors(case))
            launches.append(launch)
        moved = 2.0 * batch * (case.convolved[0].nbytes + case.states[0].nbytes)
    return launches, moved


def tensors(case: StateCase) -> tuple[torch.Tensor, ...]:
    return case.convolved, case.states, case.sources, case.targets


if __name__ == "__main__":
    main()
