"""Which steps of a rank are slow once: what its warm-up has not met.

    PYTHONPATH=src python tools/gpu/first_calls.py [--model FOLDER] [--capacity 4] [--slow-ms 25]

A rank that is alone gets bursts of requests; steps slower than that are told with their batch and
the functions that took the time. What is slow in the first burst and not in the next is a first
call. Each step waits for the device here.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexpert.config import load_config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.sampler import Sampler
from flexpert.models.batch import ForwardBatch
from flexpert.models.model_runner import ModelRunner
from flexpert.models.source import ModelSource
from flexpert.moe.placement import replan

BURSTS = (8, 32, 32, 48)
PROMPT, ANSWER = 128, 64
LIMIT_S = 60.0


@dataclass(frozen=True)
class Slow:
    what: str
    ms: float
    profile: cProfile.Profile


class Told:
    """What the rank tells; most of it does not matter here."""

    def __init__(self) -> None:
        self.said: queue.Queue[str] = queue.Queue()

    def __call__(self, report: msg.Report) -> None:
        match report:
            case msg.Published(events, _):
                for event in events:
                    if event.finish is not None:
                        self.said.put("finished")
            case msg.Prepared():
                self.said.put("prepared")
            case msg.Failed() | msg.Broken() | msg.Rejected():
                self.said.put(str(report))

    def wait_for(self, desired: str) -> None:
        said = self.said.get(timeout=LIMIT_S)
        if said != desired:
            raise SystemExit(f"the rank says {said}")


def watch(slow: list[Slow], limit_ms: float, cuda: bool) -> None:
    """Time the halves of each step from now on."""

    def timed(kind: type, name: str, describe: Callable[..., str]) -> None:
        call = getattr(kind, name)

        def watched(*args: Any) -> Any:
            profile = cProfile.Profile()
            began = time.perf_counter()
            result = profile.runcall(call, *args)
            if cuda:
                torch.cuda.synchronize()
            ms = (time.perf_counter() - began) * 1e3
            if ms > limit_ms:
                slow.append(Slow(f"{name} of {describe(*args[1:])}", ms, profile))
            return result

        setattr(kind, name, watched)

    def sizes(batch: ForwardBatch) -> str:
        sequences, samples = batch.context_len.shape[0], batch.sample_rows.shape[0]
        return f"{batch.token_ids.shape[0]} tokens, {sequences} sequences, {samples} samples"

    timed(ModelRunner, "forward", sizes)
    timed(Sampler, "sample", lambda logits, samples: f"{len(samples)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--capacity", type=int, default=4, help="ranks that there may be")
    parser.add_argument("--slow-ms", type=float, default=25.0)
    args = parser.parse_args()
    overrides = {"engine.device": args.device, "cluster.max_ranks": args.capacity}
    config = load_config(environment={}, overrides=overrides).engine
    source = ModelSource.open(args.model)
    told = Told()
    engine = RankEngine(
        0,
        source,
        config,
        capacity=args.capacity,
        exchange_timeout_s=LIMIT_S,
        report=told,
    )
    running = threading.Thread(target=engine.run, daemon=True)
    running.start()
    placement = replan(None, [0], experts=source.info.experts, layers=source.info.moe_layers)
    engine.submit(msg.Prepare(1, {0: engine.buffer.address}, placement))
    told.wait_for("prepared")
    engine.submit(msg.Commit(1))
    slow: list[Slow] = []
    watch(slow, args.slow_ms, args.device == "cuda")
    for burst, count in enumerate(BURSTS):
        slow.clear()
        began = time.perf_counter()
        work = [request(f"{burst}/{i}", i, source.info.vocab) for i in range(count)]
        engine.submit(msg.Admit(work))
        for _ in range(count):
            told.wait_for("finished")
        print(f"burst of {count}: {time.perf_counter() - began:.2f} s, {len(slow)} slow steps")
        for step in slow:
            print(f"    {step.ms:.0f} ms: {step.what}")
            entries = pstats.Stats(step.profile).stats.items()  # type: ignore[attr-defined]
            for (file, line, function), times in sorted(entries, key=lambda e: -e[1][2])[:5]:
                where = f"{Path(file).name}:{line}" if line else ""
                print(f"        {times[2] * 1e3:6.1f} ms in {times[1]} calls: {function} {where}")
    engine.submit(msg.Stop())
    running.join(LIMIT_S)


def request(name: str, seed: int, vocab: int) -> RequestSequence:
    prompt = [(7 * seed + i) % (vocab - 8) + 8 for i in range(PROMPT)]
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, ignore_eos=True)
    return RequestSequence(id=name, prompt=prompt, generated=[], params=params, eos=())


if __name__ == "__main__":
    main()
