"""The exchange on GPUs beside nixl_ep, without the command line's dependencies.

    python tools/gpu/bench_exchange.py --ranks 1 --tokens 1,128,512

The same as `flexpert bench comm --device cuda`, for a machine that has only torch and msgspec.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from rich.console import Console

from flexpert.bench.comm.cuda.gpu_comm_report import gpu_text
from flexpert.bench.comm.cuda.gpu_comm_run import run_gpu
from flexpert.bench.comm.ranks import Settings
from flexpert.bench.comm.workload import Workload


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", default="128")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--baselines", default="nixl_ep,interface,torch,checks")
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    works = [
        Workload(
            ranks=o.ranks, tokens=int(n), hidden=o.hidden, topk=o.topk, experts=o.experts,
            dtype="bfloat16", seed=o.seed,
        )
        for n in o.tokens.split(",")
    ]  # fmt: skip
    settings = Settings("shm", "float32", 1, o.timeout)
    report = run_gpu(
        works, settings, o.baselines.split(","), repeat=o.repeat,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    Console(width=120).print(gpu_text(report))
    if o.json:
        o.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2))
    return 0 if report.correct else 1


if __name__ == "__main__":
    sys.exit(main())
