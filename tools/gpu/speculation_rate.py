"""A rank's engine with and without proposed tokens: tokens/s, how many came true, equal answers.

    PYTHONPATH=src python tools/gpu/speculation_rate.py MODEL [--how off,mtp:1,mtp:3] \
        [--concurrency 1,4,16,64] [--prompts FILE] [--deterministic]

Answers are greedy unless a temperature is given. `random_model.py --mtp` makes a model whose layer
for multi-token prediction is often right; `--no-pause` proposes tokens whether they come true or
not, which shows what a step with them costs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import threading
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest import mock

import torch

from flexpert.config import Config
from flexpert.engine import rank_protocol as msg
from flexpert.engine.draft_counts import DraftCounts
from flexpert.engine.rank_engine import RankEngine
from flexpert.engine.request import RequestSequence, SamplingParams
from flexpert.engine.speculation import SequenceSpeculation
from flexpert.engine.step_costs import DraftPhases
from flexpert.models.source import ModelSource
from flexpert.moe.placement import replan

_LIMIT_S = 300.0
Answers = dict[str, list[int]]


class Told:
    """What a rank says."""

    def __init__(self) -> None:
        self.heard = threading.Condition()
        self.prepared = False
        self.begin(0)

    def begin(self, count: int) -> None:
        self.left = count
        self.tokens: Answers = defaultdict(list)
        self.steps: list[float] = []  # when those were over in which nothing was a prompt's
        self.drafts = DraftCounts(0, 0, [])

    def __call__(self, report: msg.Report) -> None:
        now = time.perf_counter()
        with self.heard:
            if isinstance(report, msg.Prepared):
                self.prepared = True
            elif isinstance(report, msg.Published):
                for event in report.events:
                    self.tokens[event.id] += event.tokens
                    self.left -= event.finish is not None
                self.steps.append(now)
                self.drafts += report.drafts or DraftCounts(0, 0, [])
            elif isinstance(report, msg.Failed | msg.Rejected | msg.Broken | msg.Unable):
                raise SystemExit(f"the rank says: {report}")
            self.heard.notify()

    def wait(self) -> None:
        with self.heard:
            assert self.heard.wait_for(lambda: self.prepared and self.left == 0, _LIMIT_S)


def never_pause(patches: contextlib.ExitStack) -> None:
    most = property(lambda self: self._most)
    for name in ("depth", "wanted"):
        patches.enter_context(mock.patch.object(SequenceSpeculation, name, most))
    patches.enter_context(mock.patch.object(DraftPhases, "passed"))


def prompts_of(args: argparse.Namespace, source: ModelSource, count: int) -> list[list[int]]:
    draw = random.Random(0)
    if args.prompts is None:
        vocab = source.info.vocab
        return [draw.choices(range(vocab), k=args.input_len) for _ in range(count)]
    encode = source.tokenizer().encode
    lines = args.prompts.read_text("utf-8").splitlines()
    return [encode(lines[at % len(lines)]) for at in range(count)]


def measure(args: argparse.Namespace, how: str, expected: dict[int, Answers]) -> None:
    method, _, proposed = how.partition(":")
    engine = {"device": args.device, "deterministic": args.deterministic}
    if method != "off":
        speculate = {"method": method, "max_rows": args.max_rows}
        engine["speculate"] = speculate | (
            {"num_speculative_tokens": int(proposed)} if proposed else {}
        )
    config = Config.model_validate({"model": {"model": args.model}, "engine": engine}).engine
    source, told = ModelSource.open(args.model, drafts=method == "mtp"), Told()
    info = source.info
    began = time.perf_counter()
    rank = RankEngine(0, source, config, capacity=1, exchange_timeout_s=_LIMIT_S, report=told)
    running = threading.Thread(target=rank.run, daemon=True)
    running.start()
    placement = replan(None, [0], experts=info.experts, layers=info.moe_layers)
    rank.submit(msg.Prepare(1, {0: rank.buffer.address}, placement))
    told.wait()
    rank.submit(msg.Commit(1))
    print(f"{how}: ready after {time.perf_counter() - began:.1f} s", flush=True)
    for at_once in map(int, args.concurrency.split(",")):
        prompts = prompts_of(args, source, at_once * (1 + args.rounds))
        rates, steps, unequal = list[float](), list[float](), 0
        for turn in range(1 + args.rounds):  # the first one does not count
            batch = [
                RequestSequence(
                    id=f"{turn}-{place}",
                    prompt=prompts[place],
                    generated=[],
                    params=SamplingParams(
                        max_tokens=args.output_len, temperature=args.temperature, seed=place
                    ),
                    eos=(),
                )
                for place in range(turn * at_once, (turn + 1) * at_once)
            ]
            kept = told.drafts if turn > 1 else DraftCounts(0, 0, [])
            answers = expected.setdefault(at_once, {})
            told.begin(at_once)
            began = time.perf_counter()
            rank.submit(msg.Admit(batch))
            told.wait()
            took = time.perf_counter() - began
            told.drafts += kept
            differ = sum(
                answers.setdefault(name, tokens) != tokens for name, tokens in told.tokens.items()
            )
            unequal += differ
            if turn:
                rates.append(at_once * args.output_len / took)
                steps += [b - a for a, b in pairwise(told.steps)]
        true = told.drafts.accepted
        result = {
            "how": how,
            "at_once": at_once,
            "tokens_per_s": round(median(rates), 1),
            "rates": [round(rate, 1) for rate in rates],
            "step_ms_p50": round(median(steps) * 1e3, 3),
            "steps": len(steps),
            "runs": told.drafts.drafts,
            "proposed": told.drafts.tokens,
            "came_true": true,
            "unequal": f"{unequal} of {at_once * (1 + args.rounds)}",
        }
        print(json.dumps(result), flush=True)
    rank.submit(msg.Stop())
    running.join(_LIMIT_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--how", default="off,mtp:1,mtp:3")
    parser.add_argument("--concurrency", default="1,4,16,64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--prompts", type=Path, help="one a line; random ones without")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--no-pause", action="store_true")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    expected: dict[int, Answers] = {}
    for how in args.how.split(","):
        with contextlib.ExitStack() as patches:
            if args.no_pause:
                never_pause(patches)
            measure(args, how, expected)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
